"""The pairs of a round: ranked answers -> rows for training."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hafrm_ds.data.files import file_table
from hafrm_ds.data.pairs import Message, Row, in_words
from hafrm_ds.data.sources import Source
from hafrm_ds.errors import DataError
from hafrm_ds.evaluation.pair_rows import rows_of_pairs
from hafrm_ds.scoring.rows import prompt_of
from hafrm_ds.training.rounds.options import RoundsSection

ALIKE, CLOSE = "all answers score alike", "best and worst closer than min_gap"


def read_prompts(option: str, file: Path) -> dict[str, str]:
    """Key of each prompt of a file -> its row. Raises DataError naming a row that has none, or for an empty file."""
    found: dict[str, str] = {}
    for number, fields in file_table(file, str(file)).rows():
        row = Row(fields, f"{file}:{number}", "")
        if not isinstance(fields, dict):
            raise DataError(f"{row.id}: is {in_words(fields)}, expected an object with a prompt")
        found.setdefault(key_of(prompt_of(row)), row.id)
    if not found:
        raise DataError(f"--{option} {file} is empty")
    return found


def key_of(prompt: list[Message]) -> str:
    """Equal for equal prompts alone."""
    return json.dumps(prompt)


def refuse_held_out(section: RoundsSection, held_out: Mapping[str, list[Source]], cache_dir: Path | None) -> None:
    """Raises DataError if a prompt of the rounds is one that they are held against."""
    prompts = read_prompts("rounds.prompts", section.prompts)
    others = read_prompts("rounds.evaluation_prompts", section.evaluation_prompts)
    places = {key: f"rounds.evaluation_prompts ({row})" for key, row in others.items()}
    for name, sources in held_out.items():
        for row in rows_of_pairs(sources, cache_dir, None):
            places.setdefault(key_of(row["prompt"]), f"data.eval {name} ({row['id']})")
    if shared := [key for key in prompts if key in places]:
        raise DataError(
            f"{len(shared):,} of {len(prompts):,} prompts of rounds.prompts stand in what the rounds are held against: "
            f"{prompts[shared[0]]} in {places[shared[0]]}. Take them out of one of the two"
        )


def pairs_of(ranked: Iterable[Mapping[str, Any]], section: RoundsSection) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The answers to each prompt as a row for training, and why prompts give none -> how many.

    Args:
        ranked: lines of ranked.jsonl: prompt, and candidates with response and score.
    """
    rows, left_out = [], Counter[str]()
    for line in ranked:
        scored = [
            (each["score"] - section.length_penalty * len(each["response"].split()), each["response"])
            for each in line["candidates"]
        ]
        scored.sort(key=lambda each: -each[0])  # equal ones keep the order of the ranking
        (high, best), (low, worst) = scored[0], scored[-1]
        if high == low:
            left_out[ALIKE] += 1
        elif high - low <= section.min_gap:
            left_out[CLOSE] += 1
        elif section.pairs == "groups":
            texts, scores = [text for _, text in scored], [score for score, _ in scored]
            rows.append({"prompt": line["prompt"], "responses": texts, "scores": scores})
        else:
            rows.append({"prompt": line["prompt"], "chosen": best, "rejected": worst, "margin": high - low})
    return rows, left_out


def mixed(generated: Path, human: list[Source], section: RoundsSection) -> list[Source]:
    """The sources of a round's training: the ranked answers beside a share of the human pairs."""
    own = Source(path=str(generated), name="ranked answers", reward_loss=section.trains_head)
    if not section.replay:
        return [own]
    weights = [1.0 if source.weight is None else source.weight for source in human]
    replayed = [
        source.model_copy(update={"weight": section.replay * weight / sum(weights)})
        for source, weight in zip(human, weights)
    ]
    return [own.model_copy(update={"weight": 1 - section.replay}), *replayed]
