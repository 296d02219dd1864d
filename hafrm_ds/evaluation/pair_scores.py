"""The scores of every pair of a set: what an evaluation leaves behind, and all that analyses and reports read.

Legend: P pairs; the second axis of [P, 2] is (chosen, rejected).
"""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from hafrm_ds.data.prepared import PreparedPairs
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


@dataclass
class PairScores:
    """Scores of the pairs of one evaluation set.

    set: its name. step: optimizer steps that the model had been trained; None where that is not known.
    beta: scale of the implicit reward. ids, sources: [P]. prompts: [P] a name of each
    prompt, by its tokens before any truncation.
    num_tokens: [P, 2] int64 tokens of the responses.
    reward, logprob, reference: [P, 2] fp32, None where not computed: score of the reward head, summed log-prob of the
    policy, summed log-prob of the reference.
    combined, fit: [P, 2] fp32 what both heads say as one judge, and the fit that this comes from; None without one.
    texts: position -> the pair as text, for the most confident mistakes alone.
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

    @classmethod
    def of(
        cls,
        name: str,
        pairs: PreparedPairs,
        index: np.ndarray,
        scores: dict[str, np.ndarray],
        reference: np.ndarray | None,
        *,
        beta: float,
        step: int | None = None,
    ) -> "PairScores":
        """Scores of the pairs at `index` [P] of a prepared set.

        Args:
            scores: "reward" and "logprob" where known, each [P, 2] fp32.
            reference: [P, 2] fp32 or None.
        """
        columns = pairs.pairs.select(index).select_columns(["id", "source"])[:]
        lengths = np.stack([pairs.lengths[side] for side in SIDES], axis=1)[index]
        prompts = [key.tobytes().hex() for key in pairs.prompt_keys[index]]
        return cls(
            name,
            step,
            beta,
            columns["id"],
            columns["source"],
            prompts,
            lengths,
            reward=scores.get("reward"),
            logprob=scores.get("logprob"),
            reference=reference,
        )

    def __len__(self) -> int:
        return len(self.ids)

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

    def keep_texts(self, pairs: PreparedPairs, index: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> None:
        """Keep the texts of the most confident mistakes."""
        self.texts = {place: Example.of(pairs[index[place]], tokenizer) for place in self.mistakes()}

    # ---- on disk ----

    def save(self, folder: Path) -> None:
        """Write FOLDER/SET.parquet. Raises DataError if it cannot be written."""
        columns: dict[str, list | np.ndarray] = {"id": self.ids, "source": self.sources, "prompt_key": self.prompts}
        for k, side in enumerate(SIDES):
            columns[f"tokens_{side}"] = self.num_tokens[:, k]
            for name in VALUES:
                if (values := getattr(self, name)) is not None:
                    columns[f"{name}_{side}"] = values[:, k]
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
        fit = metadata.get("judge")
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
