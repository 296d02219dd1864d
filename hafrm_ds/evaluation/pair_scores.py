"""The scores of every comparison of a set: what an evaluation leaves behind, and all that analyses and reports read.

Legend: P pairs of answers that are compared; the second axis of [P, 2] is (chosen, rejected), the better and the worse.
G groups, N answers of all of them.
"""

import io
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from hafrm_ds.data.lengths import starts_of
from hafrm_ds.data.prepared import PreparedGroups, compared
from hafrm_ds.data.report import Example
from hafrm_ds.durability import write_whole
from hafrm_ds.errors import DataError
from hafrm_ds.objective import JudgeFit, judges

SCORES_FOLDER = "evaluation"
"""In the folder of a run or an evaluation: SCORES_FOLDER/SET.parquet for each set."""
EVALUATION_FILE = "evaluation.json"
"""In the folder of an evaluation: what is said about its sets."""
NUM_MISTAKES = 10
VALUES = ("reward", "logprob", "reference", "combined")
SIDES = ("chosen", "rejected")
TEXTS = ("prompt", *SIDES)
METADATA = b"hafrm_ds"


@dataclass(frozen=True)
class Grouping:
    """Which comparisons are of the same group.

    number: [P] int64, ascending, the group of each. answers: [P, 2] int32, positions of the better and the worse answer
    in it. target, weight: [P] fp32, as `Comparison` has them.
    """

    number: np.ndarray
    answers: np.ndarray
    target: np.ndarray
    weight: np.ndarray

    @classmethod
    def of_pairs(cls, num_pairs: int) -> "Grouping":
        ones = np.ones(num_pairs, dtype=np.float32)
        return cls(np.arange(num_pairs), np.tile(np.arange(2, dtype=np.int32), (num_pairs, 1)), ones, ones)

    def names(self, ids: list[str]) -> list[str]:
        """The id of the group of each comparison -> that of the comparison, with its answers counted from 1 on."""
        return [f"{id} ({better + 1}>{worse + 1})" for id, (better, worse) in zip(ids, self.answers.tolist())]


@dataclass(frozen=True)
class Answers:
    """The answers that the comparisons of a set are made of, each once, those of a group beside one another.

    place: [P, 2] int64, which of them each comparison is of. group: [N] int64, ascending, the group of each, from 0 on.
    row, side: [N] where the values of each stand among those of the comparisons.
    """

    place: np.ndarray
    group: np.ndarray
    row: np.ndarray
    side: np.ndarray

    @classmethod
    def of(cls, groups: Grouping) -> "Answers":
        # An answer as one number, ascending by group and position; of pairs chosen and rejected in turns.
        names = groups.number[:, None] * (int(groups.answers.max(initial=0)) + 1) + groups.answers
        _, first, place = np.unique(names, return_index=True, return_inverse=True)
        row, side = np.divmod(first, 2)
        _, group = np.unique(groups.number[row], return_inverse=True)
        return cls(place.reshape(-1, 2), group, row, side)

    def values(self, of_comparisons: np.ndarray) -> np.ndarray:
        """[P, 2] -> [N]."""
        return of_comparisons[self.row, self.side]

    @property
    def sizes(self) -> np.ndarray:
        """[G] answers of each group."""
        return np.bincount(self.group)


@dataclass
class PairScores:
    """Scores of the comparisons of one evaluation set, of pairs one each.

    set: its name. step: optimizer steps that the model had been trained; None where that is not known.
    beta: scale of the implicit reward. ids, sources: [P]. prompts: [P] a name of each prompt, by its tokens before any
    truncation.
    num_tokens: [P, 2] int64 tokens of the responses.
    reward, logprob, reference: [P, 2] fp32, None where not computed: score of the reward head, summed log-prob of the
    policy, summed log-prob of the reference.
    combined, fit: [P, 2] fp32 what both heads say as one judge, and the fit that this comes from; None without one.
    texts: position -> the comparison as text, for the most confident mistakes alone.
    groups: which comparisons belong together; None for pairs, each of which is a group of its own.
    margin: [P] fp32 of the data, 0 where it has none; None where that is not known any more.
    """

    set: str
    step: int | None
    beta: float
    ids: list[str]
    sources: list[str]
    prompts: list[str]
    num_tokens: np.ndarray
    reward: np.ndarray | None = None
    logprob: np.ndarray | None = None
    reference: np.ndarray | None = None
    combined: np.ndarray | None = None
    fit: JudgeFit | None = None
    texts: dict[int, Example] = field(default_factory=dict)
    groups: Grouping | None = None
    margin: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        name: str,
        groups: PreparedGroups,
        index: np.ndarray,
        scores: dict[str, np.ndarray],
        reference: np.ndarray | None,
        *,
        beta: float,
        step: int | None = None,
    ) -> "PairScores":
        """Scores of the groups at `index` [G] of a prepared set.

        Args:
            scores: "reward" and "logprob" where known, each [R] fp32 of the responses of these groups.
            reference: [R] fp32 or None.
        """
        columns = groups.rows.select(index).select_columns(["id", "source"])[:]
        lengths, table = groups.lengths.take(index), groups.table.take(groups.comparisons_of(index))
        sizes = groups.num_comparisons(index)
        owner = np.repeat(np.arange(len(index)), sizes)
        sides = compared(lengths.first, sizes, table)  # [P, 2] of the responses
        ids = [columns["id"][place] for place in owner.tolist()]
        grouping = None
        if not groups.are_pairs:
            grouping = Grouping(owner, np.stack([table.better, table.worse], axis=1), table.target, table.weight)
            ids = grouping.names(ids)
        prompts = [key.tobytes().hex() for key in groups.prompt_keys[index]]

        def of_sides(values: np.ndarray | None) -> np.ndarray | None:
            return None if values is None else values[sides]

        return cls(
            name,
            step,
            beta,
            ids,
            [columns["source"][place] for place in owner.tolist()],
            [prompts[place] for place in owner.tolist()],
            lengths.response[sides],
            reward=of_sides(scores.get("reward")),
            logprob=of_sides(scores.get("logprob")),
            reference=of_sides(reference),
            groups=grouping,
            margin=np.nan_to_num(table.margin),
        )

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def answers(self) -> Answers:
        return Answers.of(self.groups or Grouping.of_pairs(len(self)))

    @property
    def judges(self) -> dict[str, np.ndarray]:
        """Name -> [P, 2], as `objective.judges` defines them."""
        found = judges(self.reward, self.logprob, self.reference, self.beta)
        return found if self.combined is None else found | {"combined": self.combined}

    def margins(self, judge: str) -> np.ndarray:
        """Score of the chosen answer less that of the rejected one, [P] float64."""
        values = self.judges[judge].astype(np.float64)
        return values[:, 0] - values[:, 1]

    def mistakes(self) -> list[int]:
        """Positions of the pairs that the first judge gets most confidently wrong, the worst first."""
        margins = self.margins(next(iter(self.judges)))
        return [int(place) for place in np.argsort(margins, kind="stable")[:NUM_MISTAKES] if margins[place] < 0]

    def keep_texts(self, groups: PreparedGroups, index: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the texts of the most confident mistakes. `groups` and `index` as for `of`."""
        first = starts_of(groups.num_comparisons(index))
        for place in self.mistakes():
            owner = int(np.searchsorted(first, place, side="right")) - 1
            self.texts[place] = Example.of(groups[index[owner]], tokenizer, comparison=place - int(first[owner]))

    # ---- on disk ----

    def save(self, folder: Path) -> None:
        """Write FOLDER/SET.parquet. Raises DataError if it cannot be written."""
        columns: dict[str, list | np.ndarray] = {"id": self.ids, "source": self.sources, "prompt_key": self.prompts}
        for k, side in enumerate(SIDES):
            columns[f"tokens_{side}"] = self.num_tokens[:, k]
            for name in VALUES:
                if (values := getattr(self, name)) is not None:
                    columns[f"{name}_{side}"] = values[:, k]
            if self.groups is not None:
                columns[f"answer_{side}"] = self.groups.answers[:, k]
        if self.groups is not None:
            columns |= {"group": self.groups.number, "target": self.groups.target, "weight": self.groups.weight}
        for name in TEXTS:
            texts = [getattr(self.texts[place], name) if place in self.texts else None for place in range(len(self))]
            columns[name] = pa.array(texts, pa.string())
        metadata: dict[str, Any] = {"set": self.set, "step": self.step, "beta": self.beta}
        if self.fit is not None:
            metadata["judge"] = self.fit.to_json()
        table = pa.table(columns).replace_schema_metadata({METADATA: json.dumps(metadata)})
        folder.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        pq.write_table(table, content)
        write_whole(folder / f"{quote(self.set, safe='')}.parquet", content.getvalue())

    @classmethod
    def load(cls, file: Path) -> "PairScores":
        """Raises DataError if the file cannot be read or is none that `save` has written."""
        try:
            table = pq.read_table(file)
            metadata = json.loads(table.schema.metadata[METADATA])
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{file} holds no scores of an evaluation: {error}") from error

        def both_sides(name: str) -> np.ndarray:
            return np.stack([table[f"{name}_{side}"].to_numpy() for side in SIDES], axis=1)

        ids, sources, prompts = (table[name].to_pylist() for name in ("id", "source", "prompt_key"))
        texts = {
            place: Example(ids[place], sources[place], *row)
            for place, row in enumerate(zip(*(table[name].to_pylist() for name in TEXTS)))
            if row[0] is not None
        }
        known = {name: both_sides(name) for name in VALUES if f"{name}_chosen" in table.column_names}
        fit, groups = metadata.get("judge"), None
        if "group" in table.column_names:
            number, target, weight = (table[name].to_numpy() for name in ("group", "target", "weight"))
            groups = Grouping(number, both_sides("answer"), target, weight)
        return cls(
            set=metadata["set"],
            step=metadata["step"],
            beta=metadata["beta"],
            ids=ids,
            sources=sources,
            prompts=prompts,
            num_tokens=both_sides("tokens"),
            fit=None if fit is None else JudgeFit.from_json(fit),
            texts=texts,
            groups=groups,
            **known,
        )


def load_all(folder: Path) -> dict[str, PairScores]:
    """Every set in a folder of scores, by its name; empty if there is none."""
    found = [PairScores.load(file) for file in sorted(folder.glob("*.parquet"))]
    return {scores.set: scores for scores in found}


def fixed_choice(num_pairs: int, limit: int | None) -> np.ndarray:
    """Positions of the pairs of a set that are used: all, or a random choice of `limit` that is always the same."""
    if limit is None or limit >= num_pairs:
        return np.arange(num_pairs)
    return np.sort(np.random.default_rng(0).choice(num_pairs, limit, replace=False))
