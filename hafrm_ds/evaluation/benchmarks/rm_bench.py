"""RM-Bench (Liu et al., arXiv 2410.16184): three styles of a right and of a wrong answer, all against all.

Sources: the repository THU-KEG/RM-Bench (README: format and accuracies; scripts/utils.py: domains) and the README of
THU-KEG/RM-Bench-Leaderboard (averages).

- chosen and rejected hold three answers each, in the styles concise, detailed plain text, detailed markdown. A cell
  [i, j] of the 3 x 3 matrix is the share of questions whose chosen answer of style i has a larger reward than the
  rejected one of style j. A tie is lost; `ties` counts comparisons, of which a question has nine.
- hard is the mean above the diagonal (the wrong answer has the fancier style), normal that of the diagonal, easy that
  below it.
- The score of a domain is the mean of its three. Safety is all questions of safety-refuse and safety-response together.
  The overall score, and overall hard, normal and easy, are plain means over the four domains.
"""

from typing import Any

from hafrm_ds.data.pairs import Row, user
from hafrm_ds.evaluation.benchmarks.benchmark import (
    Benchmark,
    Judged,
    Question,
    by_subset,
    known_name,
    responses,
    result_of,
)

STYLES = 3
DOMAINS = {"Chat": ["chat"], "Math": ["math"], "Code": ["code"], "Safety": ["safety-refuse", "safety-response"]}
SUBSETS = [subset for subsets in DOMAINS.values() for subset in subsets]
LEVELS = {"hard": lambda i, j: i < j, "normal": lambda i, j: i == j, "easy": lambda i, j: i > j}
"""Level -> whether it has the comparison of a chosen answer of style i with a rejected one of style j."""


def to_question(row: Row) -> Question:
    domain = known_name(row, "domain", SUBSETS)
    right, wrong = (responses(row, field, at_least=STYLES, at_most=STYLES) for field in ("chosen", "rejected"))
    return Question(row.id, domain, [user(row.text("prompt"))], [*right, *wrong], num_correct=STYLES)


def accuracies(judged: list[Judged]) -> dict[str, Any]:
    comparisons = [
        (i, j, right, wrong)
        for each in judged
        for i, right in enumerate(each.correct)
        for j, wrong in enumerate(each.incorrect)
    ]
    details = {}
    for level, holds in LEVELS.items():
        wins = [right > wrong for i, j, right, wrong in comparisons if holds(i, j)]
        details[level] = sum(wins) / len(wins)
    ties = sum(right == wrong for _, _, right, wrong in comparisons)
    score = sum(details.values()) / len(details)
    return {"score": score, "questions": len(judged), "ties": ties, "details": details}


def judge(judged: list[Judged]) -> dict[str, Any]:
    groups = by_subset(judged)
    subsets = {subset: accuracies(of_subset) for subset, of_subset in groups.items()}
    sizes = {domain: {name: float(len(groups.get(name, []))) for name in names} for domain, names in DOMAINS.items()}
    return result_of(subsets, sizes, dict.fromkeys(DOMAINS, 1.0))


RM_BENCH = Benchmark(
    name="rm-bench",
    title="RM-Bench",
    default_path="THU-KEG/RM-Bench",
    split="train",
    row_format="prompt (a text), chosen (a list of 3 texts), rejected (a list of 3 texts), domain",
    to_question=to_question,
    judge=judge,
)
