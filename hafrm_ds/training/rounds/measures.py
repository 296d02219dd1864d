"""What a policy has become after a round, by its answers to prompts that no round trains on.

One answer to each prompt is drawn from the policy as it is (temperature 1), so that the mean of log pi - log pi_start
over them is an estimate of the divergence KL(pi || pi_start) of whole answers, in nats.

Legend: P prompts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hafrm_ds.data.files import file_table
from hafrm_ds.data.pairs import Message, Row, assistant
from hafrm_ds.data.tokenization import tokenize_conversation
from hafrm_ds.durability import write_whole
from hafrm_ds.errors import DataError
from hafrm_ds.evaluation.best_of_n.ranking import read_lines, score
from hafrm_ds.evaluation.bootstrap import estimate
from hafrm_ds.evaluation.scoring import score_parts
from hafrm_ds.generation.parts import texts_of
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.saved.folder import SavedModel
from hafrm_ds.saved.opening import open_model
from hafrm_ds.saved.policy import SavedPolicy
from hafrm_ds.scoring.files import ScoringOptions
from hafrm_ds.scoring.rows import json_line, prompt_of

ANSWERS_FILE, GOLD_FILE = "answers.jsonl", "gold.jsonl"


def open_policy(name: str, **loading: Any) -> SavedModel | SavedPolicy:
    """A model that answers. Raises ModelError if it has no LM head."""
    saved = open_model(name, **loading)
    if not isinstance(saved, SavedModel | SavedPolicy):
        raise DataError(f"{name} has no LM head: it cannot answer")
    return saved


def measure_policy(
    folder: Path,
    model: str,
    start: str,
    prompts: Path,
    gold: ScoringOptions | None,
    processes: Processes,
    log: Console,
    *,
    max_new_tokens: int,
    max_tokens: int,
    seed: int,
    **loading: Any,
) -> dict[str, Any] | None:
    """Draw answers and measure them; all processes call this together, and the first gets the results.

    Args:
        folder: keeps the answers and what is found of them.
        model: the policy. start: what KL is measured to.
        gold: how answers.jsonl in `folder` is scored; None without a gold reward.
        max_tokens: of one forward pass.

    Returns:
        gold (None without one), kl, words and ended estimates over the prompts; distinct: share of the answers that are
        different from one another.

    Raises:
        DataError: a prompt cannot be asked, or an answer cannot be scored.
    """
    rows = [Row(fields, f"{prompts}:{number}", "") for number, fields in file_table(prompts, str(prompts)).rows()]
    asked = [prompt_of(row) for row in rows]
    policy, first = open_policy(model, **loading), open_policy(start, **loading)
    formatter = policy.formatter()
    folder.mkdir(parents=True, exist_ok=True)
    texts = texts_of(
        "evaluation-answers",
        policy,
        formatter,
        [formatter.encode_prompt(each) for each in asked],
        folder,
        processes,
        log,
        max_new_tokens=max_new_tokens,
        temperature=1.0,
        seed=seed,
    )
    groups = [[tokenize_conversation(formatter, [*p, assistant(text)])] for p, text in zip(asked, texts, strict=True)]
    logprobs = {
        name: score_parts(name, saved, ("logprob",), {"answers": groups}, folder, processes, log,
                          deepspeed=None, max_tokens=max_tokens)
        for name, saved in (("policy", policy), ("start", first))
    }  # fmt: skip
    processes.from_first("answers", lambda: write_answers(folder / ANSWERS_FILE, rows, asked, texts))
    if gold is not None:
        score(str(gold.model), gold, processes, log)
    if not processes.is_first:
        return None
    difference = np.array(logprobs["policy"]["answers"]).ravel() - np.array(logprobs["start"]["answers"]).ravel()
    names = [str(place) for place in range(len(texts))]
    return {
        "prompts": len(texts),
        "gold": None if gold is None else estimate(scores_of(gold.output), names),
        "kl": estimate(difference.astype(np.float64), names),
        "words": estimate(np.array([len(text.split()) for text in texts], dtype=np.float64), names),
        "distinct": len(set(texts)) / len(texts),
    }


def write_answers(file: Path, rows: Sequence[Row], asked: Sequence[list[Message]], texts: Sequence[str]) -> None:
    lines = [{"id": row.id, "prompt": prompt, "response": text} for row, prompt, text in zip(rows, asked, texts)]
    write_whole(file, b"".join(map(json_line, lines)))


def scores_of(file: Path) -> np.ndarray:
    """The scores in a scored file, [P]. Raises DataError for a row without one."""
    rows = read_lines(file)
    if faults := [row["score_error"] for row in rows if row["score"] is None]:
        raise DataError(f"the gold reward cannot score {len(faults):,} of {len(rows):,} answers: {faults[0]}")
    return np.array([row["score"] for row in rows], dtype=np.float64)
