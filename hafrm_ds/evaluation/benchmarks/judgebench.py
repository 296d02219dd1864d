"""JudgeBench (Tan et al., arXiv 2410.12784): pairs of answers, one of them right, to hard questions in four categories.

Sources: the repository ScalerLab/JudgeBench (README: format; run_judge.py: categories by the beginning of `source`;
utils/judges.py: how reward models judge; utils/metrics.py: accuracies) and section 4 of the paper.

- A pair is won if the right answer has the larger reward. A tie is lost, by the paper's rule for a judge that is asked
  in both orders, which is the script's default. (Its --single_game takes a tie of a reward model as B>A.)
- Scores of a category and overall are shares of all their pairs.
- The data set has two splits, by the model that wrote the answers: `gpt` (350 pairs, the paper's main result) and
  `claude` (270). The published figures are of one of them: a folder that holds both files is their pool.
"""

from typing import Any

from hafrm_ds.data.pairs import Row, assistant, user
from hafrm_ds.data.sources import suggestion
from hafrm_ds.errors import DataError
from hafrm_ds.evaluation.benchmarks.benchmark import (
    Benchmark,
    Judged,
    Question,
    by_subset,
    pair_accuracy,
    result_of,
)

CATEGORIES = {
    "Knowledge": "mmlu-pro",
    "Reasoning": "livebench-reasoning",
    "Math": "livebench-math",
    "Coding": "livecodebench",
}
"""Category -> what the source of its pairs begins with."""
LABELS = ("A>B", "B>A")


def to_question(row: Row) -> Question:
    source = row.text("source")
    if not source.startswith(tuple(CATEGORIES.values())):
        near = suggestion(source, CATEGORIES.values())
        known = ", ".join(CATEGORIES.values())
        raise DataError(f"{row.id}: field 'source' is {source!r}, which begins with none of {known}{near}")
    label = row.text("label")
    if label not in LABELS:
        raise row.fault("field 'label'", label, " or ".join(LABELS))
    a, b = ([assistant(row.text(field))] for field in ("response_A", "response_B"))
    return Question(row.id, source, [user(row.text("question"))], [a, b] if label == "A>B" else [b, a], num_correct=1)


def judge(judged: list[Judged]) -> dict[str, Any]:
    subsets = {source: pair_accuracy(pairs) for source, pairs in by_subset(judged).items()}
    sizes = {
        name: {source: part["questions"] for source, part in subsets.items() if source.startswith(beginning)}
        for name, beginning in CATEGORIES.items()
    }
    return result_of(subsets, sizes)


JUDGEBENCH = Benchmark(
    name="judgebench",
    title="JudgeBench",
    default_path="ScalerLab/JudgeBench",
    split="gpt",
    row_format="source, question, response_A, response_B (texts) and label (A>B or B>A)",
    to_question=to_question,
    judge=judge,
)
