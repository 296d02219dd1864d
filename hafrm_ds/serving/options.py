"""What launch/serve.py is asked for."""

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from hafrm_ds.config import NonNegative, Positive, PositiveInt, ScoringSection
from hafrm_ds.errors import ConfigError
from hafrm_ds.rewards.composition import open_reward
from hafrm_ds.rewards.reward import OpenedReward
from hafrm_ds.saved.opening import Judge

END_MARKS = [
    *("<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "<|end|>", "<|return|>", "</s>", "<eos>"),
    *("<end_of_turn>", "<|END_OF_TURN_TOKEN|>"),
]


class ServingOptions(ScoringSection):
    """A reward, and how it is served."""

    model: Path
    """The final/ folder of a training, another reward model (AutoModelForSequenceClassification with one label), a
    function FILE.py:NAME, or FILE.yaml, which composes rewards."""
    judge: Judge | None = None
    """Of a model, what scores: reward (the reward head), implicit (the policy against its reference) or combined (both
    as one). Default: the reward head, and without one the implicit reward."""
    reference: str | None = None
    """Of the implicit reward, the combined judge and --credit, what the policy is measured against. Default: base."""
    chat_template: str | None = None
    """Name or file of a template, for a tokenizer without one."""
    credit: bool = False
    """Load the reference also where the reward head scores, so that /logprobs gives the implicit reward of each
    token."""
    page: bool = False
    """Show the model at /: two answers side by side, what each judge says of them, and with --credit what each token is
    worth."""
    host: str = "127.0.0.1"
    """Address that is listened on. 0.0.0.0 is all of this machine's; give a --key then."""
    port: Annotated[int, Field(ge=0, le=65535)] = 5000
    """0: any that is free."""
    key: str | None = None
    """What a request must bring, as `Authorization: Bearer KEY` or as ?key=KEY. @FILE: it stands in that file."""
    workers: PositiveInt | None = None
    """Processes that hold the reward. Default: one for each GPU; on CPUs one."""
    max_wait_ms: NonNegative = 5.0
    """How long an idle worker waits for further requests to merge with the first."""
    max_queue: PositiveInt = 4096
    """Conversations that may wait. Beyond it a request is answered with 503."""
    max_body_mb: Positive = 16.0
    """Largest body of a request."""
    timeout: Positive = 110.0
    """Seconds until a request is given up. Clients wait 120 (slime) and 180 (OpenRLHF)."""
    prompts: Literal["rendered", "text"] = "rendered"
    """What a prompt is that comes as a text: rendered by the chat template of the reward model (rendered), or the words
    of a user, which the template is still to be put around (text). Messages are always welcome."""
    end_marks: list[str] = END_MARKS
    """What policies write at the end of an answer, which is no part of its text."""

    def contradictions(self) -> list[str]:
        problems = super().contradictions()
        if self.key == "":
            problems.append("--key is empty; leave it out to serve everybody")
        return problems

    @property
    def is_local(self) -> bool:
        """Whether nobody else's machine can ask."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def open(self) -> OpenedReward:
        """Raises ConfigError or ModelError if it cannot be used, or gives no reward."""
        # With --credit a reward head scores, and the reference stands beside it.
        scores_by_head = self.credit and self.judge in (None, "reward")
        reference = None if scores_by_head else self.reference
        return open_reward(self.model, judge=self.judge, reference=reference, **self.loading)

    def secret(self) -> str | None:
        """The key. Raises ConfigError if its file cannot be read or is empty."""
        if self.key is None or not self.key.startswith("@"):
            return self.key
        file = Path(self.key.removeprefix("@"))
        try:
            key = file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError([f"--key {self.key}: {file} cannot be read: {error}"]) from error
        if not key:
            raise ConfigError([f"--key {self.key}: {file} is empty"])
        return key
