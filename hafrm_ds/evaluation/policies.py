"""What a policy answers to prompts that nothing was trained on, and how far it has gone from its start.

One answer to each prompt is drawn from the policy as it is (temperature 1), so that the mean of log pi - log pi_start
of the tokens that were drawn is an estimate of the divergence KL(pi || pi_start) of answers of at most max_new_tokens,
in nats.

Legend: P prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.durability import write_whole
from hafrm_ds.errors import DataError, ModelError
from hafrm_ds.evaluation.best_of_n.ranking import identity_of_scorer, read_lines, score
from hafrm_ds.evaluation.bootstrap import estimates
from hafrm_ds.evaluation.scoring import score_parts
from hafrm_ds.generation.parts import answers_in_parts
from hafrm_ds.generation.prompts import encode_prompt
from hafrm_ds.generation.samplers import Answer
from hafrm_ds.model.loading import load_model_config
from hafrm_ds.model.sizes import ModelSizes
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.parts import claim_folder, stamp
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.saved.folder import SavedModel
from hafrm_ds.saved.opening import identity_of_model, open_model
from hafrm_ds.saved.policy import SavedPolicy
from hafrm_ds.scoring.files import ScoringOptions
from hafrm_ds.scoring.prompts import Prompt, read_prompts
from hafrm_ds.scoring.rows import json_line

ANSWERS_FILE = "answers.jsonl"


@dataclass(frozen=True)
class Measuring:
    """How policies are measured.

    start: what their divergence is measured to. prompts: a file with the prompts, which `option` names. rewards: name
    -> a reward that judges their answers, as options of `ScoringOptions`. max_tokens: of one forward pass. loading: as
    `open_model` takes it.
    """

    start: str
    option: str
    prompts: Path
    rewards: Mapping[str, Mapping[str, Any]]
    max_new_tokens: int
    max_tokens: int
    seed: int
    loading: dict[str, Any]

    def policy(self, name: str) -> SavedModel | SavedPolicy:
        """A model that answers. Raises ModelError if it has no LM head."""
        saved = open_model(name, **self.loading)
        if not isinstance(saved, SavedModel | SavedPolicy):
            raise ModelError(f"{name} has no LM head: it cannot answer")
        return saved

    def scorings(self, folder: Path) -> dict[str, ScoringOptions]:
        """How each reward scores the answers in a folder."""
        of_all = {"input": folder / ANSWERS_FILE, "max_tokens_per_micro_batch": self.max_tokens, **self.loading}
        return {
            name: ScoringOptions(output=folder / f"{name}.jsonl", **reward, **of_all)
            for name, reward in self.rewards.items()
        }

    def identity(self) -> dict[str, Any]:
        """Collect all that the measures of a policy depend on, but for the policy."""
        return {
            "start": identity_of_model(self.policy(self.start)),
            "prompts": stamp(self.prompts),
            "rewards": {name: identity_of_scorer(each) for name, each in self.scorings(Path()).items()},
            "max_new_tokens": self.max_new_tokens,
            "max_tokens_per_micro_batch": self.max_tokens,
            "seed": self.seed,
        }


@dataclass(frozen=True)
class PolicyMeasures:
    """What is known of a policy.

    prompts: [P] their keys. answers: [P]. divergence: [P] log pi - log pi_start of each. rewards: name -> [P].
    """

    prompts: list[str]
    answers: list[Answer]
    divergence: np.ndarray
    rewards: dict[str, np.ndarray]

    @property
    def words(self) -> np.ndarray:
        """[P] words of each answer."""
        return np.array([len(answer.text.split()) for answer in self.answers], dtype=np.float64)

    @property
    def distinct(self) -> float:
        """How many different answers there are for each that was given."""
        return len({answer.text for answer in self.answers}) / len(self.answers)

    @property
    def truncated(self) -> float:
        """Share of the answers that max_new_tokens ended."""
        return sum(not answer.ended for answer in self.answers) / len(self.answers)

    def to_json(self) -> dict[str, Any]:
        """Means over the prompts with intervals: of each reward, kl and words; distinct and truncated."""
        columns = {**self.rewards, "kl": self.divergence, "words": self.words}
        return {
            "prompts": len(self.prompts),
            **estimates(columns, self.prompts),
            "distinct": self.distinct,
            "truncated": self.truncated,
        }


def measure_policy(
    folder: Path, model: str, how: Measuring, processes: Processes, log: Console
) -> PolicyMeasures | None:
    """Draw answers and measure them; all processes call this together, and the first gets the results.

    Args:
        folder: keeps the answers and what is found of them; what it has is not done again.

    Raises:
        DataError: a prompt cannot be asked, an answer cannot be scored, or the folder is of another measurement.
            ModelError: the model does not answer.
    """
    policy, start = how.policy(model), how.policy(how.start)
    formatter = policy.formatter()
    prompts = read_prompts(how.option, how.prompts)
    sizes = ModelSizes.of(str(policy.folder), load_model_config(policy.config))
    encoded = [encoded_or_refused(each, formatter, sizes.positions - how.max_new_tokens) for each in prompts]
    sizes.check_ids(encoded, formatter.tokenizer)
    processes.from_first(
        "claim", lambda: claim_folder(folder, {"policy": identity_of_model(policy), "how": how.identity()})
    )
    answers = answers_in_parts(
        "answers",
        policy,
        formatter,
        encoded,
        folder,
        processes,
        log,
        max_new_tokens=how.max_new_tokens,
        temperature=1.0,
        seed=how.seed,
    )
    groups = [[PromptWithResponses(ids, (answer.ids,))] for ids, answer in zip(encoded, answers, strict=True)]
    logprobs = {}
    for name, saved in (("policy", policy), ("start", start)):
        found = score_parts(
            name, saved, ("logprob",), {"": groups}, folder, processes, log, deepspeed=None, max_tokens=how.max_tokens
        )
        logprobs[name] = np.array(found.get("", []), dtype=np.float64).ravel()
    processes.from_first("answers", lambda: write_answers(folder / ANSWERS_FILE, prompts, answers))
    scorings = how.scorings(folder)
    for each in scorings.values():
        score(str(each.model), each, processes, log)
    if not processes.is_first:
        return None
    rewards = {name: scores_of(each.output) for name, each in scorings.items()}
    return PolicyMeasures([each.key for each in prompts], answers, logprobs["policy"] - logprobs["start"], rewards)


def encoded_or_refused(prompt: Prompt, formatter: ChatFormatter, longest: float) -> list[int]:
    """Ids of a prompt. Raises DataError naming its row if it cannot be asked."""
    encoded = encode_prompt(formatter, prompt.messages, longest)
    if isinstance(encoded, str):
        raise DataError(f"{prompt.row.id}: {encoded}")
    return encoded


def write_answers(file: Path, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> None:
    """Unless they are there: `scoring.files` knows its input by the time of its change."""
    lines = [
        {"id": each.row.id, "prompt": each.messages, "response": answer.text, "ended": answer.ended}
        for each, answer in zip(prompts, answers, strict=True)
    ]
    if not file.exists():
        write_whole(file, b"".join(map(json_line, lines)))


def scores_of(file: Path) -> np.ndarray:
    """The scores in a scored file, [P]. Raises DataError for a row without one."""
    rows = read_lines(file)
    if faults := [row["score_error"] for row in rows if row["score"] is None]:
        raise DataError(f"{file.stem} cannot score {len(faults):,} of {len(rows):,} answers: {faults[0]}")
    return np.array([row["score"] for row in rows], dtype=np.float64)
