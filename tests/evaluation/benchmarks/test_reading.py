"""From files and the hub to questions, and what is said of files in another format."""

import datasets
import pytest

from hafrm_ds.errors import ModelError
from hafrm_ds.evaluation.benchmarks.benchmark import Question
from hafrm_ds.evaluation.benchmarks.catalogue import BENCHMARKS
from tests.data.row_files import error_of, write_lines, write_rows
from tests.evaluation.benchmarks.rows import judgebench_row, rewardbench2_row, rewardbench_row, rm_bench_row

REWARDBENCH, REWARDBENCH_2, RM_BENCH, JUDGEBENCH = BENCHMARKS.values()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(role, *texts):
    return [{"role": role, "content": text} for text in texts]


@pytest.mark.parametrize("file", ["x.jsonl", "x.json", "x.json.gz", "x.parquet", "saved"])
def test_every_benchmark_reads_its_own_format(file):
    write_rows(file, [rewardbench_row("hep-go")])
    (question,) = REWARDBENCH.read(file, None)
    row = 2 if file == "x.jsonl" else 1  # the file begins with an empty line
    assert question == Question(
        f"{file}:{row}", "hep-go", said("user", "Why?"), [said("assistant", "Because."), said("assistant", "No.")], 1
    )


def test_responses_stand_in_their_order_the_right_ones_first():
    write_lines("2.jsonl", [rewardbench2_row("Math"), rewardbench2_row("Ties", 2, 1, id="tied:3")])
    best, ties = REWARDBENCH_2.read("2.jsonl", None)
    assert best.responses == [said("assistant", text) for text in ("right 0", "wrong 0", "wrong 1", "wrong 2")]
    assert ties.responses == [said("assistant", text) for text in ("right 0", "right 1", "wrong 0")]
    assert (ties.num_correct, ties.key, ties.subset) == (2, "tied:3", "Ties")

    write_lines("rm.jsonl", [rm_bench_row("safety-refuse")])
    (matrix,) = RM_BENCH.read("rm.jsonl", None)
    assert matrix.num_correct == 3
    assert [response[0]["content"] for response in matrix.responses[2:4]] == ["chosen 2", "rejected 0"]

    write_lines("judge.jsonl", [judgebench_row("mmlu-pro-law"), judgebench_row("livebench-math", "B>A")])
    a, b = JUDGEBENCH.read("judge.jsonl", None)
    assert [response[0]["content"] for response in a.responses + b.responses] == ["this", "that", "that", "this"]


def test_prior_sets_have_conversations_as_prompts():
    write_lines("x.jsonl", [rewardbench_row("anthropic_helpful", prompt=said("user", "Hi") + said("assistant", "Ho"))])
    assert REWARDBENCH.read("x.jsonl", None)[0].prompt == said("user", "Hi") + said("assistant", "Ho")


@pytest.mark.parametrize(
    ("benchmark", "split", "row"),
    [
        (REWARDBENCH, "filtered", rewardbench_row("math-prm")),
        (REWARDBENCH_2, "test", rewardbench2_row("Focus")),
        (RM_BENCH, "train", rm_bench_row("chat")),
        (JUDGEBENCH, "gpt", judgebench_row("livecodebench")),
    ],
)
def test_the_hub_is_asked_for_the_split_of_the_benchmark(benchmark, split, row, monkeypatch):
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options["split"]))
        return datasets.Dataset.from_list([row])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (question,) = benchmark.read(benchmark.default_path, None)
    benchmark.read(f"{benchmark.default_path}?split=other", None)
    assert asked == [(benchmark.default_path, split), (benchmark.default_path, "other")]
    assert question.id == f"{benchmark.default_path}[{split}]:1"


def test_of_a_downloaded_data_set_only_the_benchmark_is_read(folder):
    (folder / "copy/data").mkdir(parents=True)
    write_rows("copy/data/raw-00000-of-00001.parquet", [rewardbench_row("math-prm")] * 3)
    write_rows("copy/data/filtered-00000-of-00001.parquet", [rewardbench_row("hep-go")] * 2)
    assert [question.subset for question in REWARDBENCH.read("copy", None)] == ["hep-go"] * 2
    datasets.DatasetDict(
        {
            "raw": datasets.Dataset.from_list([rewardbench_row("math-prm")]),
            "filtered": datasets.Dataset.from_list([rewardbench_row("hep-js")]),
        }
    ).save_to_disk("saved")
    assert [question.subset for question in REWARDBENCH.read("saved", None)] == ["hep-js"]


def test_a_row_filter_leaves_the_rows_that_were_asked_for():
    write_lines("x.jsonl", [rewardbench_row("math-prm"), rewardbench_row("hep-go")])
    assert [question.id for question in REWARDBENCH.read("x.jsonl?subset=hep-go", None)] == ["x.jsonl:2"]
    assert "row filter subset=hep leaves none of 2 rows" in error_of(REWARDBENCH.read, "x.jsonl?subset=hep", None)


@pytest.mark.parametrize(
    ("benchmark", "row", "message"),
    [
        (REWARDBENCH, {"prompt": "a", "chosen": "b"}, "field 'rejected' is missing (fields: prompt, chosen)"),
        (REWARDBENCH, rewardbench2_row("Math"), "field 'chosen' is a list of 1, expected a text"),
        (REWARDBENCH, rewardbench_row("hep-pyton"), "'hep-pyton', which is not known; did you mean 'hep-python'?"),
        (REWARDBENCH, ["no object"], "is a list of 1, expected an object with fields"),
        (REWARDBENCH_2, rewardbench_row("Math"), "field 'chosen' is the text 'Because.', expected a list of 1 texts"),
        (REWARDBENCH_2, rewardbench2_row("Math", 1, 2), "field 'rejected' is a list of 2, expected a list of 3 texts"),
        (REWARDBENCH_2, rewardbench2_row("Math", rejected=["a", None, "b"]), "item 2 of field 'rejected' is null"),
        (REWARDBENCH_2, rewardbench2_row("Tie"), "field 'subset' is 'Tie', which is not known; did you mean 'Ties'?"),
        (REWARDBENCH_2, rewardbench2_row("Ties", id="3"), "field 'id' of a Ties row is the text '3', expected ref:"),
        (REWARDBENCH_2, rewardbench2_row("Ties", id="tied:3"), "is a list of 1, expected a list of at least 2 texts"),
        (REWARDBENCH_2, rewardbench2_row("Ties", id="ref:3", num_correct=2), "'num_correct' is 2, but chosen holds 1"),
        (RM_BENCH, rm_bench_row("chat", chosen=["a", "b"]), "'chosen' is a list of 2, expected a list of 3 texts"),
        (RM_BENCH, rm_bench_row("safety"), "'domain' is 'safety', which is not known; did you mean 'safety-"),
        (JUDGEBENCH, judgebench_row("mmlu-pro-law", "A=B"), "'label' is the text 'A=B', expected A>B or B>A"),
        (JUDGEBENCH, judgebench_row("livebench-coding"), "'livebench-coding', which begins with none of mmlu-pro, "),
    ],
)
def test_a_row_in_another_format_is_named_with_field_and_benchmark(benchmark, row, message):
    good = {
        REWARDBENCH.name: rewardbench_row("hep-go"),
        REWARDBENCH_2.name: rewardbench2_row("Math"),
        RM_BENCH.name: rm_bench_row("chat"),
        JUDGEBENCH.name: judgebench_row("livecodebench"),
    }[benchmark.name]
    write_lines("x.jsonl", [good, row])
    error = error_of(benchmark.read, "x.jsonl", None)
    assert error.startswith("x.jsonl:2: ")
    assert message in error
    assert error.endswith(f"It was read as {benchmark.title}, with rows of {benchmark.row_format}")


def test_what_is_no_data_is_refused():
    assert error_of(REWARDBENCH.read, "preset:hh_helpful", None).startswith(
        "RewardBench: 'preset:hh_helpful' is neither"
    )
    assert "no such file or folder" in error_of(REWARDBENCH.read, "nothing.jsonl", None)
    write_lines("empty.jsonl", [])
    assert error_of(REWARDBENCH.read, "empty.jsonl", None) == "empty.jsonl: holds no rows"


def test_rewards_that_are_not_those_of_the_questions_are_refused():
    write_lines("x.jsonl", [rewardbench_row("hep-go")])
    questions = REWARDBENCH.read("x.jsonl", None)
    for rewards in ([], [[1.0, 2.0, 3.0]]):
        with pytest.raises(ValueError):
            REWARDBENCH.summarize(questions, rewards)
    with pytest.raises(ModelError, match=r"x\.jsonl:1: the model gave a reward that is not finite"):
        REWARDBENCH.summarize(questions, [[1.0, float("nan")]])
