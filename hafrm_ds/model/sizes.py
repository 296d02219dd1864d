"""What a model has room for, known from its config alone: rows of its embedding, and positions."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow.compute as pc
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from hafrm_ds.data.prepared import PreparedGroups
from hafrm_ds.errors import DataError, ModelError

SCANNED_ROWS = 10_000


@dataclass(frozen=True)
class ModelSizes:
    """Token ids below `rows`, and conversations of at most `positions` tokens. Infinity where a config does not say."""

    name: str
    rows: float
    positions: float

    @classmethod
    def of(cls, name: str, config: PretrainedConfig) -> "ModelSizes":
        return cls(name, getattr(config.get_text_config(), "vocab_size", None) or math.inf, known_positions(config))

    def check(self, sets: Mapping[str, PreparedGroups], tokenizer: PreTrainedTokenizerBase) -> None:
        """See that a model can read prepared groups, before its weights are loaded.

        Raises:
            ModelError, DataError: with the numbers, for the first set that does not fit.
        """
        for fault in self.faults(sets, tokenizer):
            raise fault

    def faults(
        self, sets: Mapping[str, PreparedGroups], tokenizer: PreTrainedTokenizerBase
    ) -> Iterator[ModelError | DataError]:
        """What does not fit, by name of the set."""
        can_exceed = max(tokenizer.get_vocab().values(), default=0) >= self.rows
        for name, groups in sets.items():
            if can_exceed and (largest := largest_id(groups)) >= self.rows:
                yield ModelError(f"{name}: {self.id_fault(largest, tokenizer)}")
            longest = int(groups.lengths.longest_conversation.max(initial=0))
            if longest > self.positions:
                what = "pair" if groups.are_pairs else "conversation"
                yield DataError(
                    f"{name}: the longest {what} has {longest:,} tokens, but the model {self.name} knows "
                    f"{self.positions:,} positions; set data.max_length to {self.positions} at most"
                )

    def check_ids(self, sequences: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises DataError if an id of any sequence has no row in the embedding."""
        largest = max((max(sequence, default=0) for sequence in sequences), default=0)
        if largest >= self.rows:
            raise DataError(self.id_fault(largest, tokenizer))

    def id_fault(self, largest: int, tokenizer: PreTrainedTokenizerBase) -> str:
        return (
            f"token id {largest:,} ({tokenizer.convert_ids_to_tokens(largest)!r}) is beyond the embedding of "
            f"{self.name}, which has {self.rows:,} rows (the tokenizer has {len(tokenizer):,} tokens): use the "
            "tokenizer that belongs to these weights, or give the model more rows (resize_token_embeddings) and save it"
        )


def known_positions(config: PretrainedConfig) -> float:
    """Tokens of the longest sequence that a model knows; infinity where it does not say. The rule is one for training,
    evaluation and scoring, of learned positions and of rotary ones."""
    config = config.get_text_config()
    known = getattr(config, "max_position_embeddings", None) or math.inf
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type")) == "yarn":  # not counted in config
        known = max(known, scaling.get("factor", 1) * (scaling.get("original_max_position_embeddings") or 0))
    return known if known == math.inf else int(known)


def largest_id(groups: PreparedGroups) -> int:
    """The largest token id of all groups, read a block at a time."""
    largest = 0
    for block in groups.arrow_rows.iter(batch_size=SCANNED_ROWS):
        for ids in (pc.list_flatten(block["prompt_ids"]), pc.list_flatten(pc.list_flatten(block["response_ids"]))):
            largest = max(largest, pc.max(ids).as_py() or 0)
    return largest
