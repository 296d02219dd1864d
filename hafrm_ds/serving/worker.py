"""A worker process (`main`): it holds the reward on one device and answers batches of questions.

It gets its options, sends "" when the reward is loaded, else what is wrong. Then it gets batches, and sends their
answers.
"""

import math
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal, NamedTuple

import torch

from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.errors import DataError, ModelError, NoRoomError, UserError
from hafrm_ds.hardware.devices import refuse_untried
from hafrm_ds.rewards.model import NOT_FINITE, ModelReward, OpenedModel
from hafrm_ds.rewards.reward import Loader, OpenedReward, Reward, Score
from hafrm_ds.saved.classifier import SavedClassifier
from hafrm_ds.saved.implicit import ImplicitRewardModel, SavedImplicitReward
from hafrm_ds.saved.opening import BASE, open_reference, trained_beta
from hafrm_ds.saved.policy import PolicyModel
from hafrm_ds.saved.scorer import Scorer
from hafrm_ds.serving.options import ServingOptions
from hafrm_ds.serving.rendered import Item, Rendered, Template, encode, pieces

Kind = Literal["score", "logprobs"]
NO_MESSAGES = (
    "is a rendered text, which a composition or a function cannot read; send messages (in `label`, or to /score), or "
    "start the server with --prompts text if your prompts are the words of a user"
)
ONE_MESSAGE = "a log-prob needs a prompt and an answer: a conversation of two messages at least"
NO_POLICY = "the served reward has no policy: it is a classifier, a function or a composition"


class Question(NamedTuple):
    """What is asked about one conversation."""

    kind: Kind
    item: Item


class Answer(NamedTuple):
    """What is said of one conversation: a score, or a mapping for its tokens; or the reason why there is none.

    tokens: how many it has; 0 where no model has read it. attributes: what a model says beside its reward, by name.
    """

    value: Any
    error: str = ""
    tokens: int = 0
    attributes: dict[str, float] = {}  # noqa: RUF012  # nobody changes it


@dataclass(frozen=True)
class Policy:
    """What tells the log-probs of tokens, and with a reference the implicit reward of each."""

    scorer: Scorer
    reference: Scorer | None
    beta: float

    def of_tokens(self, encoded: Sequence[PromptWithResponses]) -> list[dict[str, Any]]:
        """Of the answer of each conversation: its tokens with the log-prob and the implicit reward of each. The texts
        of the tokens, joined, are the answer as the template writes it (`pieces`)."""
        ours, theirs = (
            each.of_conversations(encoded, each.token_logprobs) if each else None
            for each in (self.scorer, self.reference)
        )
        assert ours is not None
        found = []
        for number, (prompt, (response,)) in enumerate(encoded):
            ids, logprobs = [int(token) for token in response], ours[number]
            tokens = pieces(self.scorer.formatter.tokenizer, prompt, ids)
            found.append({"token_ids": ids, "tokens": tokens, "logprobs": logprobs, "logprob": sum(logprobs)})
            if theirs is not None:
                rewards = [self.beta * (our - their) for our, their in zip(logprobs, theirs[number], strict=True)]
                found[-1] |= {"reference_logprobs": theirs[number], "implicit_rewards": rewards}
                found[-1]["implicit_reward"] = sum(rewards)
        return found


@dataclass(frozen=True)
class Served:
    """A loaded reward. policy: of a model that has one. template: of a single model."""

    reward: Reward
    policy: Policy | None
    template: Template | None

    @classmethod
    def load(cls, options: ServingOptions, device: torch.device) -> "Served":
        """Raises ConfigError or ModelError if it cannot be used."""
        refuse_untried(device)
        opened = options.open()
        reward = Loader(device, options.max_tokens_per_micro_batch).load(opened)
        if not isinstance(reward, ModelReward):
            if options.credit:
                raise ModelError("--credit is of a single model, not of a composition or a function; leave it out")
            return cls(reward, None, None)
        policy = policy_of(reward.scorer, opened, options, device)
        return cls(reward, policy, Template.of(reward.scorer.formatter))

    def answers(self, questions: Sequence[Question]) -> list[Answer]:
        """In order. Questions that the device has no room for together are asked in halves; one that it has no room for
        alone has the error for its answer."""
        try:
            return self.together(questions)
        except (NoRoomError, torch.OutOfMemoryError) as error:
            if len(questions) == 1:
                return [Answer(None, str(error))]
        # Here the error is gone, and with it what its forward held.
        torch.cuda.empty_cache()
        half = len(questions) // 2
        return self.answers(questions[:half]) + self.answers(questions[half:])

    def together(self, questions: Sequence[Question]) -> list[Answer]:
        """As `answers`. Raises NoRoomError, or torch.OutOfMemoryError of a reward that is no model."""
        found: dict[int, Answer] = {}
        for kind, ask in (("score", self.scores), ("logprobs", self.logprobs)):
            places = [place for place, question in enumerate(questions) if question.kind == kind]
            found |= zip(places, ask([questions[place].item for place in places]), strict=True)
        return [found[place] for place in range(len(questions))]

    def scores(self, items: Sequence[Item]) -> list[Answer]:
        if not isinstance(self.reward, ModelReward):
            messages = [item for item in items if not isinstance(item, Rendered)]
            known = iter(self.reward.scores(messages) if messages else ())
            scores = [Score.none(NO_MESSAGES) if isinstance(item, Rendered) else next(known) for item in items]
            return [Answer(score.value, score.error) for score in scores]
        encoded = [self.encode(item) for item in items]
        return [
            Answer(score.value, score.error, num_tokens(ids), dict(zip(self.reward.attributes, score.attributes)))
            for score, ids in zip(self.reward.of_encoded(encoded), encoded, strict=True)
        ]

    def logprobs(self, items: Sequence[Item]) -> list[Answer]:
        if self.policy is None:
            return [Answer(None, NO_POLICY)] * len(items)
        encoded = [ONE_MESSAGE if is_prompt_alone(item) else self.encode(item) for item in items]
        known = [ids for ids in encoded if not isinstance(ids, str)]
        values = iter(self.policy.of_tokens(known) if known else ())
        return [Answer(None, ids) if isinstance(ids, str) else of_finite(next(values), ids) for ids in encoded]

    def encode(self, item: Item) -> PromptWithResponses | str:
        """Its token ids, or what is wrong with it."""
        assert isinstance(self.reward, ModelReward) and self.template is not None
        if not isinstance(item, Rendered):
            return self.reward.encode(item)
        try:
            return encode(self.reward.scorer, self.template, item)
        except DataError as error:
            return str(error)


def of_finite(value: dict[str, Any], ids: PromptWithResponses) -> Answer:
    is_finite = math.isfinite(value["logprob"] + value.get("implicit_reward", 0.0))  # which are sums over all tokens
    return Answer(value if is_finite else None, "" if is_finite else NOT_FINITE, num_tokens(ids))


def is_prompt_alone(item: Item) -> bool:
    return not isinstance(item, Rendered) and len(item) < 2


def num_tokens(ids: PromptWithResponses | str) -> int:
    return 0 if isinstance(ids, str) else ids.longest_conversation


def policy_of(scorer: Scorer, opened: OpenedReward, options: ServingOptions, device: torch.device) -> Policy | None:
    """The policy of a loaded model, which shares its weights; with its reference if that is there or is asked for."""
    assert isinstance(opened, OpenedModel)
    saved = opened.saved
    if isinstance(scorer, ImplicitRewardModel):
        assert isinstance(saved, SavedImplicitReward)
        return Policy(scorer.policy, scorer.reference, saved.beta)
    if "logprob" not in scorer.heads:
        if options.credit:
            raise ModelError(f"--credit: {options.model} has no LM head; leave it out")
        return None
    assert not isinstance(saved, SavedImplicitReward | SavedClassifier)
    if not options.credit:
        return Policy(scorer, None, trained_beta(saved))
    against = open_reference(options.reference or BASE, saved, **options.loading)
    reference = PolicyModel.load(against, device, options.max_tokens_per_micro_batch)
    return Policy(scorer, reference, trained_beta(saved))


def device_of(number: int) -> torch.device:
    """The device of a worker: GPUs are dealt out in turn."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", number % torch.cuda.device_count())


def main(descriptor: int) -> None:
    """Run the process. descriptor: of its end of the pipe."""
    connection = Connection(descriptor)
    os.set_inheritable(connection.fileno(), False)
    for number in (signal.SIGINT, signal.SIGTERM):  # the front ends this process, when all requests are answered
        signal.signal(number, signal.SIG_IGN)
    options, number, num_workers = connection.recv()
    device = device_of(number)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // num_workers))
    try:
        served = Served.load(options, device)
    except UserError as error:
        connection.send(str(error))
        return
    connection.send("")
    while True:
        try:
            questions = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answers = served.answers(questions)
        except UserError as error:  # the reward can score nothing, whoever asks
            answers = [Answer(None, str(error))] * len(questions)
        connection.send(answers)
