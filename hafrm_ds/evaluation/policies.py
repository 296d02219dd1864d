"""What a policy answers to prompts that nothing was trained on, and how far it has gone from its start.

One answer to each prompt is drawn from the policy as it is (temperature 1), so that the mean of log pi - log pi_start
over them is an estimate of the divergence KL(pi || pi_start) of whole answers, in nats.

Legend: P prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hafrm_ds.data.files import file_table
from hafrm_ds.data.pairs import Message, Row, assistant
from hafrm_ds.data.tokenization import tokenize_conversation
from hafrm_ds.durability import write_whole
from hafrm_ds.errors import DataError, ModelError
from hafrm_ds.evaluation.best_of_n.ranking import read_lines, score
from hafrm_ds.evaluation.bootstrap import estimate
from hafrm_ds.evaluation.scoring import score_parts
from hafrm_ds.generation.parts import answers_in_parts
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.saved.folder import SavedModel
from hafrm_ds.saved.opening import open_model
from hafrm_ds.saved.policy import SavedPolicy
from hafrm_ds.scoring.files import ScoringOptions
from hafrm_ds.scoring.rows import json_line, prompt_of

ANSWERS_FILE, GOLD_FILE = "answers.jsonl", "gold.jsonl"


@dataclass(frozen=True)
class Measuring:
    """How policies are measured.

    start: what their divergence is measured to. prompts: a file with the prompts. gold: a reward that judges their
    answers; None without one. max_tokens: of one forward pass. loading: as `open_model` takes it.
    """

    start: str
    prompts: Path
    gold: str | None
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

    def scoring(self, folder: Path) -> ScoringOptions | None:
        """How the answers in a folder are scored by gold."""
        if self.gold is None:
            return None
        return ScoringOptions(
            model=Path(self.gold),
            input=folder / ANSWERS_FILE,
            output=folder / GOLD_FILE,
            max_tokens_per_micro_batch=self.max_tokens,
            **self.loading,
        )


@dataclass(frozen=True)
class Measured:
    """What is known of a policy.

    texts: [P] its answers. divergence: [P] log pi - log pi_start of each. gold: [P]; None without a gold reward.
    """

    texts: list[str]
    divergence: np.ndarray
    gold: np.ndarray | None

    @property
    def words(self) -> np.ndarray:
        """[P] words of each answer."""
        return np.array([len(text.split()) for text in self.texts], dtype=np.float64)

    @property
    def distinct(self) -> float:
        """How many different answers there are for each that was given."""
        return len(set(self.texts)) / len(self.texts)

    def to_json(self) -> dict[str, Any]:
        """Means over the prompts with intervals: gold (None without one), kl and words; distinct."""
        names = [str(place) for place in range(len(self.texts))]
        return {
            "prompts": len(self.texts),
            "gold": None if self.gold is None else estimate(self.gold, names),
            "kl": estimate(self.divergence, names),
            "words": estimate(self.words, names),
            "distinct": self.distinct,
        }


def measure_policy(folder: Path, model: str, how: Measuring, processes: Processes, log: Console) -> Measured | None:
    """Draw answers and measure them; all processes call this together, and the first gets the results.

    Args:
        folder: keeps the answers and what is found of them; what it has is not done again.

    Raises:
        DataError: a prompt cannot be asked, or an answer cannot be scored. ModelError: the model does not answer.
    """
    name = str(how.prompts)
    rows = [Row(fields, f"{name}:{number}", "") for number, fields in file_table(how.prompts, name).rows()]
    asked = [prompt_of(row) for row in rows]
    policy, start = how.policy(model), how.policy(how.start)
    formatter = policy.formatter()
    folder.mkdir(parents=True, exist_ok=True)
    answers = answers_in_parts(
        "answers",
        policy,
        formatter,
        [formatter.encode_prompt(each) for each in asked],
        folder,
        processes,
        log,
        max_new_tokens=how.max_new_tokens,
        temperature=1.0,
        seed=how.seed,
    )
    texts = [answer.text for answer in answers]
    groups = [[tokenize_conversation(formatter, [*p, assistant(text)])] for p, text in zip(asked, texts, strict=True)]
    logprobs = {}
    for name, saved in (("policy", policy), ("start", start)):
        found = score_parts(
            name, saved, ("logprob",), {"": groups}, folder, processes, log, deepspeed=None, max_tokens=how.max_tokens
        )
        logprobs[name] = np.array(found.get("", []), dtype=np.float64).ravel()
    processes.from_first("answers", lambda: write_answers(folder / ANSWERS_FILE, rows, asked, texts))
    if (gold := how.scoring(folder)) is not None:
        score(str(gold.model), gold, processes, log)
    if not processes.is_first:
        return None
    divergence = logprobs["policy"] - logprobs["start"]
    return Measured(texts, divergence, None if gold is None else scores_of(gold.output))


def write_answers(file: Path, rows: Sequence[Row], asked: Sequence[list[Message]], texts: Sequence[str]) -> None:
    """Unless they are there: `scoring.files` knows its input by the time of its change."""
    lines = [{"id": row.id, "prompt": prompt, "response": text} for row, prompt, text in zip(rows, asked, texts)]
    if not file.exists():
        write_whole(file, b"".join(map(json_line, lines)))


def scores_of(file: Path) -> np.ndarray:
    """The scores in a scored file, [P]. Raises DataError for a row without one."""
    rows = read_lines(file)
    if faults := [row["score_error"] for row in rows if row["score"] is None]:
        raise DataError(f"the gold reward cannot score {len(faults):,} of {len(rows):,} answers: {faults[0]}")
    return np.array([row["score"] for row in rows], dtype=np.float64)
