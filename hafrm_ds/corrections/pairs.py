"""Dialogues become pairs, as training reads them, and figures.

A correction of the seat that is to be trained is a pair: the prompt is what the seat was sent, the corrected message is
chosen, the draft rejected.
"""

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hafrm_ds.corrections.dialogue import CORRECTED, NO_PROBLEM, OUTCOMES, UNSUPERVISED
from hafrm_ds.corrections.scenario import SPEAKERS, Scenario, Seats

Record = dict[str, Any]
"""A dialogue, as `Dialogue.play` gives it."""


def rows_of(record: Record, scenario: Scenario) -> list[dict[str, Any]]:
    """The pairs of a dialogue. Names of columns are chosen so that none speaks of the conversation and is not read."""
    speaker = scenario.train
    sits = {name: scenario.seat(name) for name in (speaker, "supervisor")}
    of_all = {
        "source": scenario.name,
        "scenario": scenario.name,
        "seat": speaker,
        "models": {name: seat.model if seat.endpoint is None else seat.endpoint.model for name, seat in sits.items()},
        "temperatures": {name: seat.temperature for name, seat in sits.items()},
    }
    return [
        {
            "id": f"{scenario.name}:{record['dialogue']}:{place}",
            "prompt": turn["prompt"],
            "chosen": turn["rewrite"],
            "rejected": turn["draft"],
            "advice": turn["advice"],
            **of_all,
            "seeds": turn["seeds"],
            "prompt_hashes": turn["hashes"],
        }
        for place, turn in enumerate(record["turns"], start=1)
        if turn["seat"] == speaker and turn["outcome"] == CORRECTED
    ]


def figures_of(records: Sequence[Record], pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How often drafts were corrected, by seat, and whether corrections are longer than drafts."""
    seats = {}
    for speaker in SPEAKERS:
        counts = Counter(turn["outcome"] for record in records for turn in record["turns"] if turn["seat"] == speaker)
        supervised = counts.total() - counts[UNSUPERVISED]
        seats[speaker] = {
            "messages": counts.total(),
            "outcomes": {outcome: counts[outcome] for outcome in OUTCOMES if counts[outcome]},
            "share_advised": share(supervised - counts[NO_PROBLEM], supervised),
            "share_corrected": share(counts[CORRECTED], supervised),
        }
    tokens = {}
    for name in Seats.model_fields:
        asked = [turn.get("tokens", {}).get(name, (0, 0)) for record in records for turn in record["turns"]]
        tokens[name] = {"read": sum(read for read, _ in asked), "written": sum(written for _, written in asked)}
    lengths = [[len(pair[side].split()) for side in ("chosen", "rejected")] for pair in pairs]
    chosen, rejected = (statistics.fmean(side) if side else None for side in (zip(*lengths) if lengths else ((), ())))
    return {
        "ends": Counter(record["end"] for record in records),
        "seats": seats,
        "tokens": tokens,
        "pairs": len(pairs),
        "different_pairs": len(
            {json.dumps([pair[side] for side in ("prompt", "chosen", "rejected")]) for pair in pairs}
        ),
        "words": {
            "chosen": chosen,
            "rejected": rejected,
            "difference": None if chosen is None or rejected is None else chosen - rejected,
            "share_chosen_longer": share(sum(better > worse for better, worse in lengths), len(lengths)),
        },
    }


def share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
