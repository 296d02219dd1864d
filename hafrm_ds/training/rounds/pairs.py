"""The pairs of a round: ranked answers -> rows for training."""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hafrm_ds.config import DataConfig
from hafrm_ds.data.presets import Role
from hafrm_ds.data.reading import read_groups
from hafrm_ds.data.sources import Source
from hafrm_ds.data.tool_calls import read_back
from hafrm_ds.errors import DataError
from hafrm_ds.scoring.prompts import key_of, read_prompts
from hafrm_ds.training.rounds.options import RoundsSection

RANKED_ANSWERS = "ranked answers"
"""What the source of a round's own pairs is called."""
# Why a prompt gives no pair.
ALIKE, CLOSE = "all answers score alike", "best and worst closer than min_gap"
TRUNCATED = "fewer than two answers that max_new_tokens has not truncated"


def refuse_held_out(section: RoundsSection, data: DataConfig) -> None:
    """Raises DataError if a prompt of the rounds is one that they are held against, or one that they are held against
    is trained on."""
    trained = rows_by_key("rounds.prompts", section.prompts)
    measured = rows_by_key("rounds.evaluation_prompts", section.evaluation_prompts)
    refuse_shared(trained, measured)
    for name, sources in data.eval.items():
        refuse_shared(trained, rows_of_sources(f"data.eval {name}", sources, "eval", data.cache_dir))
    if section.replay:
        refuse_shared(measured, rows_of_sources("data.train", data.train, "train", data.cache_dir))


def rows_by_key(option: str, file: Path) -> dict[str, str]:
    """Key of each prompt of a file -> its option and row."""
    return {each.key: f"{option} ({each.row.id})" for each in read_prompts(option, file)}


def rows_of_sources(option: str, sources: list[Source], role: Role, cache_dir: Path | None) -> dict[str, str]:
    """Key of each prompt of pairs -> their option and row. Of whole sources: each round takes others of their pairs for
    max_pairs and its mix."""
    whole = [each.model_copy(update={"max_pairs": None, "weight": None}) for each in sources]
    read = read_groups(whole, role=role, seed=0, cache_dir=cache_dir)
    return {
        key_of(read_back(row["prompt"], [])[0]): f"{option} ({row['id']})"
        for row in read.select_columns(["id", "prompt", "dropped", "deselected"])
        if not row["dropped"] and not row["deselected"]
    }


def refuse_shared(prompts: Mapping[str, str], others: Mapping[str, str]) -> None:
    """Raises DataError if a prompt stands in both."""
    if shared := [key for key in prompts if key in others]:
        raise DataError(
            f"{len(shared):,} of {len(prompts):,} prompts are trained on and measured: {prompts[shared[0]]} is also "
            f"{others[shared[0]]}. Take them out of one of the two"
        )


def pairs_of(ranked: Iterable[Mapping[str, Any]], section: RoundsSection) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The answers to each prompt as a row for training, and why prompts give none -> how many.

    Answers that max_new_tokens ended are left out: training would teach to stop there.

    Args:
        ranked: lines of ranked.jsonl: prompt, and candidates with response, score and ended.
    """
    rows, left_out = [], Counter[str]()
    for line in ranked:
        scored = [
            (each["score"] - section.length_penalty * len(each["response"].split()), each["response"])
            for each in line["candidates"]
            if each["ended"]
        ]
        if len(scored) < 2:
            left_out[TRUNCATED] += 1
            continue
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
    own = Source(path=str(generated), name=RANKED_ANSWERS, reward_loss=section.trains_head)
    if not section.replay:
        return [own]
    weights = [1.0 if source.weight is None else source.weight for source in human]
    replayed = [
        source.model_copy(update={"weight": section.replay * weight / sum(weights)})
        for source, weight in zip(human, weights)
    ]
    return [own.model_copy(update={"weight": 1 - section.replay}), *replayed]
