"""Preference pairs as rows of messages that any reward can score, where an evaluation of one model has token ids."""

from pathlib import Path
from typing import Any

from hafrm_ds.data.pairs import Message
from hafrm_ds.data.reading import read_pairs
from hafrm_ds.data.sources import Source
from hafrm_ds.data.tool_calls import read_back
from hafrm_ds.evaluation.pair_scores import fixed_choice


def rows_of_pairs(sources: list[Source], cache_dir: Path | None, limit: int | None) -> list[dict[str, Any]]:
    """The usable pairs of sources as rows that `scoring.files` takes: `responses` are (chosen, rejected).

    Args:
        limit: use at most this many: a fixed random choice.

    Raises:
        DataError: the sources cannot be read, or leave no pair.
    """
    read = read_pairs(sources, role="eval", seed=0, cache_dir=cache_dir)
    used = [place for place, reasons in enumerate(zip(read["dropped"][:], read["deselected"][:])) if not any(reasons)]
    rows = []
    for place in fixed_choice(len(used), limit):
        row = read[used[int(place)]]
        prompt, chosen, rejected = read_back((row["prompt"], row["chosen"], row["rejected"]))
        rows.append({"id": row["id"], "source": row["source"], "prompt": prompt, "responses": [chosen, rejected]})
    return rows


def text_of(messages: list[Message]) -> str:
    """The text of messages, one below the other."""
    return "\n\n".join(message["content"] or "" for message in messages)
