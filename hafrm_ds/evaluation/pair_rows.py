"""Preferences as rows of messages that any reward can score, where an evaluation of one model has token ids."""

from pathlib import Path
from typing import Any

import numpy as np

from hafrm_ds.data.pairs import Message
from hafrm_ds.data.reading import read_groups
from hafrm_ds.data.sources import Source
from hafrm_ds.data.tool_calls import read_back
from hafrm_ds.evaluation.pair_scores import Grouping, fixed_choice

COMPARED = ("better", "worse", "target", "weight")


def rows_of_pairs(sources: list[Source], cache_dir: Path | None, limit: int | None) -> list[dict[str, Any]]:
    """The usable groups of sources as rows that `scoring.files` takes, with `comparisons`: which of the `responses` are
    better than which, [better, worse, target, weight] each, as `Comparison` has them.

    Comparisons of equal answers are left out, as they are where groups are tokenised.

    Args:
        limit: use at most this many groups: a fixed random choice.

    Raises:
        DataError: the sources cannot be read, or leave no group.
    """
    read = read_groups(sources, role="eval", seed=0, cache_dir=cache_dir)
    used = [place for place, reasons in enumerate(zip(read["dropped"][:], read["deselected"][:])) if not any(reasons)]
    rows: list[dict[str, Any]] = []
    for place in fixed_choice(len(used), limit):
        row = read[used[int(place)]]
        prompt, answers = read_back(row["prompt"], row["answers"])
        comparisons = [[each[name] for name in COMPARED] for each in row["comparisons"]]
        comparisons = [each for each in comparisons if answers[each[0]] != answers[each[1]]]
        if comparisons:
            kept = {"id": row["id"], "source": row["source"], "prompt": prompt, "responses": answers}
            rows.append(kept | {"comparisons": comparisons})
    return rows


def compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Scored rows -> a row for each comparison, whose `responses` and `scores` are (better, worse), with its
    `comparison` and the place of its group in `group`."""
    return [
        row
        | {"responses": [row["responses"][place] for place in each[:2]], "scores": scores_at(row["scores"], each[:2])}
        | {"comparison": each, "group": group}
        for group, row in enumerate(rows)
        for each in row["comparisons"]
    ]


def grouping_of(rows: list[dict[str, Any]]) -> Grouping | None:
    """Which of the rows that `compared` gives are of the same group; None of pairs."""
    number = np.array([row["group"] for row in rows])
    better, worse, target, weight = np.array([row["comparison"] for row in rows], dtype=np.float32).T
    answers = np.stack([better, worse], axis=1).astype(np.int32)
    if answers.max() < 2 and (np.diff(number) > 0).all():
        return None
    return Grouping(number, answers, target, weight)


def scores_at(scores: list[float] | None, places: list[int]) -> list[float] | None:
    return None if scores is None else [scores[place] for place in places]


def text_of(messages: list[Message]) -> str:
    """The text of messages, one below the other."""
    return "\n\n".join(message["content"] or "" for message in messages)
