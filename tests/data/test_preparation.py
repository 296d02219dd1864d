import io
import json

import datasets
import numpy as np
import pytest
from rich.console import Console

from hafrm_ds.config import DataConfig
from hafrm_ds.data import preparation
from hafrm_ds.data.content_keys import KEY_DTYPE
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.pairs import OF_A_PAIR, Comparison
from hafrm_ds.data.preparation import num_processes, prepare_groups, tokenization_cache_key
from hafrm_ds.data.reading import FEATURES
from hafrm_ds.data.report import DataReport, count_repeats, percentiles, render_tokens
from hafrm_ds.data.sources import Source
from hafrm_ds.data.tokenization import TokenizedGroup
from hafrm_ds.errors import DataError


def row(question, chosen, rejected, *, source="one", dropped="", deselected="", margin=None):
    return {
        "prompt": [{"role": "user", "content": question}],
        "answers": [[{"role": "assistant", "content": answer}] for answer in (chosen, rejected)],
        "comparisons": [Comparison(0, 1, margin)._asdict()],
        "attributes": [],
        "trains_reward": True,
        "source": source,
        "format": "explicit_prompt",
        "dropped": dropped,
        "deselected": deselected,
        "remarks": "",
    }


GOOD_ROWS = [row(f"question {index}", "good" * (index + 1), "bad") for index in range(20)]


@pytest.fixture
def formatter(make_tokenizer):
    return ChatFormatter.create(make_tokenizer(), None, "2024-07-26")


@pytest.fixture
def prepare(monkeypatch, tmp_path, formatter):
    """prepare(rows, formatter=..., seed=..., **data options): prepare_groups on rows given by hand."""

    def prepare(rows, *, formatter=formatter, seed=0, **options):
        numbered = [item | {"id": f"pairs.jsonl:{number}"} for number, item in enumerate(rows, start=1)]
        columns = {name: [item[name] for item in numbered] for name in FEATURES}
        dataset = datasets.Dataset.from_dict(columns, features=FEATURES)
        monkeypatch.setattr(preparation, "read_groups", lambda sources, **_: dataset)
        monkeypatch.setattr(preparation, "selection_key", lambda sources, **_: dataset._fingerprint)
        data = DataConfig(train="pairs.jsonl", cache_dir=tmp_path / "cache", **options)
        return prepare_groups(
            [Source(path="pairs.jsonl")], formatter=formatter, options=data.preparation, role="train", seed=seed
        )

    return prepare


def test_pairs_lengths_and_items_agree(prepare, formatter):
    prepared = prepare([row("Q", "good", "bad", margin=0.5), row("Q", "", "bad"), *GOOD_ROWS])
    assert len(prepared) == len(prepared.rows) == 21
    assert prepared.rows.column_names == ["prompt_ids", "response_ids", "source", "id"]
    assert prepared.rows.features["prompt_ids"].feature.dtype == "int32"
    first, second = prepared[0], prepared[np.int64(1)]
    assert isinstance(first, TokenizedGroup) and prepared.are_pairs and prepared.unit == "pairs"
    assert formatter.tokenizer.decode([*first.prompt_ids, *first.responses[0]]) == "user:Q</s>assistant:good</s>"
    assert (first.comparisons, first.source, first.id) == ((Comparison(0, 1, 0.5),), "one", "pairs.jsonl:1")
    assert (second.comparisons, second.id) == (OF_A_PAIR, "pairs.jsonl:3")
    lengths = prepared.lengths
    assert lengths.prompt.dtype == lengths.response.dtype == np.int64
    assert lengths.prompt.tolist() == [len(ids) for ids in prepared.rows["prompt_ids"]]
    assert lengths.response.tolist() == [len(ids) for both in prepared.rows["response_ids"] for ids in both]
    assert lengths.first.tolist() == list(range(0, 43, 2))


def test_report_counts_every_row(prepare):
    rows = [
        *GOOD_ROWS,
        row("Q", "a", "a", source="two"),
        row("Q", "a", " ", source="two"),
        row("Q", "b", "b"),
        row("Q", "a", "b", source="two", deselected="tie"),
        row("Q", "a", "b", deselected="row filter split=train"),
        row("Q", "a", "b", deselected="tie"),
    ]
    report = prepare(rows, max_dropped_share=0.2).report
    assert report.total.read == 26
    assert report.total.deselected == {"tie": 2, "row filter split=train": 1}
    assert report.total.dropped == {"identical answers": 2, "empty answer": 1}
    assert (report.total.selected, report.total.kept, report.total.cut) == (23, 20, 0)
    assert report.total.dropped_share == 3 / 23
    assert report.first_dropped == {"identical answers": "pairs.jsonl:21", "empty answer": "pairs.jsonl:22"}
    assert list(report.by_source) == ["one", "two"]
    assert (report.by_source["two"].read, report.by_source["two"].kept) == (3, 0)
    assert report.by_source["one"].dropped == {"identical answers": 1}
    # "question 19", 20 times "good", and the marks of the template: the longest pair.
    longest = len("user:question 19") + 1 + len("assistant:") + 4 * 20 + 1
    assert report.tokens["conversation"]["max"] == longest
    assert report.tokens["rejected"] == {"p50": 4, "p90": 4, "p99": 4, "max": 4}


def test_faults_found_while_reading_count_as_dropped(prepare):
    faulty = row("Q", "a", "b", dropped="no common prompt")
    with pytest.raises(DataError) as caught:
        prepare([*GOOD_ROWS, faulty, faulty])
    assert str(caught.value).splitlines()[:2] == [
        "train data: 2 of 22 selected pairs (9.1%) would be dropped, 20 are left; data.max_dropped_share is 0.05:",
        "         2  no common prompt (first: pairs.jsonl:21)",
    ]
    # A faulty row that a portion or cap leaves out counts with those.
    report = prepare([*GOOD_ROWS, faulty, faulty | {"deselected": "over max_pairs"}]).report
    assert (report.total.dropped, report.total.deselected) == ({"no common prompt": 1}, {"over max_pairs": 1})


def test_margins_are_counted_and_said_if_some_pairs_have_none(prepare):
    some = prepare([row("Q", "good", "bad", margin=0.5), row("R", "", "bad", margin=1.0), *GOOD_ROWS]).report
    assert (some.with_margin, some.total.kept) == (1, 1 + len(GOOD_ROWS))
    assert f"1 of {1 + len(GOOD_ROWS)} pairs ({1 / (1 + len(GOOD_ROWS)):.1%}) have a margin" in shown(some)
    for report in (prepare(GOOD_ROWS).report, prepare([row("Q", "good", "bad", margin=0.0)]).report):
        assert report.with_margin in (0, report.total.kept)
        assert "margin" not in shown(report)


def test_columns_not_read_and_roles_read_as_others_are_said(prepare):
    remarks = "not read: votes\nrole: human -> user"
    fault = "margin: pairs.jsonl:2: field 'margin' is the text 'big', expected a finite number"
    rows = [row("Q", "a", "b") | {"remarks": text} for text in (remarks, f"{remarks}\nnot read: note\n{fault}")]
    report = prepare([*rows, *GOOD_ROWS]).report
    assert report.not_read == ["votes", "note"] and report.mapped_roles == {"human -> user": 2}
    assert (report.margin_faults, f"margin: {report.first_margin_fault}") == (1, fault)
    text = shown(report)
    assert "not read: votes, note" in text and "roles read as others: human -> user (2 rows)" in text
    assert "1 margins could not be read (first: pairs.jsonl:2: field 'margin'" in text
    assert DataReport.from_json(json.loads(json.dumps(report.to_json()))).mapped_roles == {"human -> user": 2}
    assert "not read" not in shown(prepare(GOOD_ROWS).report)


def shown(report: DataReport) -> str:
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(report.render(with_examples=False))
    return console.export_text()


def test_report_names_the_formats_of_each_source(prepare):
    unread = row("Q", "a", "b", deselected="row filter split=train") | {"format": ""}
    other = row("Q", "a", "b", source="two") | {"format": "transcripts"}
    report = prepare([*GOOD_ROWS, unread, other]).report
    assert report.by_source["one"].formats == {"explicit_prompt": 20}
    assert report.by_source["two"].formats == {"transcripts": 1}
    assert report.to_json()["total"]["formats"] == {"explicit_prompt": 20, "transcripts": 1}
    console = Console(file=io.StringIO(), width=120)
    console.print(report.render(with_examples=False))
    shown = [" ".join(line.replace("│", " ").split()) for line in console.file.getvalue().splitlines()]
    assert {"one 21 1 0 20 0 explicit_prompt", "two 1 0 0 1 0 transcripts", "total 22 1 0 21 0"} <= set(shown)


def test_duplicates_and_both_orders_are_allowed_and_counted(prepare):
    twice, other_way = row("Q", "a", "b"), row("Q", "b", "a")
    report = prepare([twice, twice, other_way, row("other Q", "a", "b")]).report
    assert (report.total.kept, report.duplicates, report.both_orders) == (4, 1, 1)


def test_count_repeats():
    pairs = np.array([(1, 2), (1, 2), (2, 1), (2, 1), (3, 4)], dtype=np.uint64)
    keys = np.zeros(pairs.shape, dtype=KEY_DTYPE)
    keys["low"] = pairs
    assert count_repeats(keys) == (2, 1)
    assert count_repeats(keys[:0]) == (0, 0)


def test_cut_pairs_are_counted_and_their_full_length_is_reported(prepare):
    longest = prepare(GOOD_ROWS).report.tokens["conversation"]["max"]
    cut = prepare(GOOD_ROWS, max_length=longest - 4, truncation="keep_prompt_end")
    assert cut.report.total.cut == 1
    assert cut.report.tokens["conversation"]["max"] == longest - 4
    assert cut.report.tokens["conversation_before_cut"]["max"] == longest
    assert (cut.lengths.prompt + cut.lengths.response[::2]).max() == longest - 4


def test_identical_after_the_cut_is_dropped_and_counted(prepare):
    rows = [*GOOD_ROWS[:3], row("Q" * 9, "the same long start, then good", "the same long start, then bad")]
    report = prepare(rows, max_length=45, truncation="cut_response", max_dropped_share=0.5).report
    assert report.total.dropped == {"identical after the cut": 1}
    assert report.total.kept == 3


def test_dropped_share_is_an_error_that_says_what_to_do(prepare):
    rows = [*GOOD_ROWS, row("Q", "a", ""), row("Q" * 500, "a", "b"), row("Q" * 600, "a", "b")]
    with pytest.raises(DataError) as caught:
        prepare(rows, max_length=120, truncation="drop")
    message = str(caught.value)
    assert message.splitlines()[:3] == [
        "train data: 3 of 23 selected pairs (13.1%) would be dropped, 20 are left; data.max_dropped_share is 0.05:",
        "         2  longer than max_length (first: pairs.jsonl:22)",
        "         1  empty answer (first: pairs.jsonl:21)",
    ]
    assert "618 at most. data.max_length is 120, data.truncation drop." in message
    for option in ("data.max_length", "data.truncation", "data.max_dropped_share 0.131"):
        assert option in message
    assert len(prepare(rows, max_length=120, truncation="drop", max_dropped_share=0.131)) == 20


def test_nothing_left(prepare):
    with pytest.raises(DataError, match=r"(?s)1 of 1 selected pairs \(100.0%\).*0 are left.*empty answer"):
        prepare([row("Q", "a", "")], max_dropped_share=1.0)


def test_second_run_reads_the_cache(prepare, monkeypatch, tmp_path, make_tokenizer):
    first = prepare(GOOD_ROWS)
    files = sorted((tmp_path / "cache").iterdir())
    assert [file.name.split("-")[0] for file in files if file.suffix != ".lock"] == ["prepared", "tokenized"]
    calls = []
    original = preparation.tokenize_groups

    def tokenize_groups(formatter, pairs, *limits):
        calls.extend(pairs := list(pairs))
        return original(formatter, pairs, *limits)

    monkeypatch.setattr(preparation, "tokenize_groups", tokenize_groups)

    again = prepare(GOOD_ROWS)
    assert calls == [] and sorted((tmp_path / "cache").iterdir()) == files
    assert again.rows.to_list() == first.rows.to_list()
    assert again.report == first.report

    prepare(GOOD_ROWS, max_length=500)
    assert len(calls) == len(GOOD_ROWS), "another max_length is another cache"
    other = ChatFormatter.create(make_tokenizer(), "chatml", "2024-07-26")
    prepare(GOOD_ROWS, formatter=other)
    assert len(calls) == 2 * len(GOOD_ROWS), "another template is another cache"
    assert len(list((tmp_path / "cache").iterdir())) == 3 * len(files)


def test_cache_key_depends_on_each_part(monkeypatch):
    parts = ("rows", "formatter", 512, "drop")
    changed = [
        ("other", *parts[1:]),
        ("rows", "other", 512, "drop"),
        (*parts[:2], 513, "drop"),
        (*parts[:3], "cut_response"),
    ]
    keys = {tokenization_cache_key(*arguments) for arguments in [parts, *changed]}
    monkeypatch.setattr(preparation, "TOKENIZATION_VERSION", -1)
    keys.add(tokenization_cache_key(*parts))
    assert len(keys) == 6


def test_worker_processes_give_the_same_pairs(prepare):
    alone = prepare(GOOD_ROWS)
    together = prepare(GOOD_ROWS, num_proc=2, max_length=1025)
    assert together.rows.to_list() == alone.rows.to_list()


def test_small_sets_are_tokenised_by_one_process():
    assert num_processes(1999, None) is None
    assert num_processes(10, 1) is None
    assert num_processes(10, 4) == 4
    assert num_processes(2, 4) == 2


def test_an_evaluation_set_with_a_cap_is_the_same_under_every_seed(formatter, tmp_path):
    file = tmp_path / "capped.jsonl"
    rows = [{"prompt": f"q{number}", "chosen": "a", "rejected": "b"} for number in range(50)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(train={"path": str(file), "max_pairs": 5}, cache_dir=tmp_path / "cache")

    def ids(role: str, seed: int) -> list[str]:
        pairs = prepare_groups(data.train, formatter=formatter, options=data.preparation, role=role, seed=seed)
        return pairs.rows["id"][:]

    assert ids("eval", 0) == ids("eval", 1)
    assert ids("train", 0) != ids("train", 1)


def test_examples_are_a_seeded_choice_and_data_is_no_markup(prepare):
    rows = [row(f"[bold]{index}[/nothing] \x1b[31m", "good", "bad") for index in range(50)]
    report, again, other = (prepare(rows, seed=seed).report for seed in (1, 1, 2))
    assert len(report.examples) == 3
    assert report.examples == again.examples != other.examples
    assert report.examples[0].prompt.endswith("</s>assistant:") and report.examples[0].chosen == "good</s>"

    console = Console(file=io.StringIO(), width=200)
    console.print(report.render())
    shown = console.file.getvalue()
    assert "[/nothing] \\x1b[31m" in shown and "\x1b[31m" not in shown
    assert report.examples[0].id in shown


def test_report_is_json_and_names_the_template(prepare, make_tokenizer):
    template = "{{ strftime_now('%Y') }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    formatter = ChatFormatter.create(make_tokenizer(template, adds_bos=True), None, "2023-02-01")
    report = prepare(GOOD_ROWS, formatter=formatter).report
    written = json.loads(json.dumps(report.to_json()))
    assert written["total"]["kept"] == 20
    assert written["template"]["bos"] == "added" and written["template"]["frozen_dates"] == ["2023"]
    assert written["template"]["text"] == formatter.template
    assert DataReport.from_json(written) == report
    assert "date frozen to 2023" in report.template.in_words and "put in front" in report.template.in_words


def test_percentiles_are_lengths_that_occur():
    assert percentiles(np.arange(1, 101)) == {"p50": 51, "p90": 91, "p99": 100, "max": 100}
    assert percentiles(np.array([], dtype=np.int64)) == {}


def test_render_tokens_marks_the_read_out(formatter):
    encode = formatter.tokenizer.encode
    pair = TokenizedGroup(encode("Q:"), (encode("ab</s>"), encode("c</s>")), OF_A_PAIR, "one", "pairs.jsonl:1")
    console = Console(file=io.StringIO(), width=120)
    console.print(render_tokens(pair, formatter.tokenizer))
    shown = console.file.getvalue()
    assert "prompt, 2 tokens: 'Q' ':'" in shown
    assert "chosen, 3 tokens, read-out at index 4: 'a' 'b' >>'</s>'<<" in shown
    assert "rejected, 2 tokens, read-out at index 3: 'c' >>'</s>'<<" in shown


# ---- groups of more than two answers -------------------------------------------------------------------------------


def group(question, answers, comparisons, **fields):
    return row(question, "", "", **fields) | {
        "answers": [[{"role": "assistant", "content": answer}] for answer in answers],
        "comparisons": [Comparison(*each)._asdict() for each in comparisons],
    }


def test_a_group_keeps_what_is_known_of_its_answers(prepare, formatter):
    comparisons = [(0, 2, 1.5), (2, 1, None, 0.75), (0, 1, 2.0, 1.0, 3.0)]
    prepared = prepare([group("Q", ["best", "worst", "fair"], comparisons), *GOOD_ROWS])
    assert not prepared.are_pairs and prepared.unit == prepared.report.unit == "groups"
    first, pair = prepared[0], prepared[1]
    decoded = [formatter.tokenizer.decode(ids) for ids in first.responses]
    assert decoded == ["best</s>", "worst</s>", "fair</s>"]
    assert first.comparisons == tuple(Comparison(*each) for each in comparisons) and pair.comparisons == OF_A_PAIR
    assert prepared.compared[:4].tolist() == [[0, 2], [2, 1], [0, 1], [3, 4]]
    facts = prepared.report.groups
    assert (facts.answers, facts.comparisons, facts.soft, facts.contradictory) == (43, 23, 1, 0)
    assert facts.sizes == {"2": 20, "3": 1} and prepared.report.with_margin == 1
    text = shown(prepared.report)
    assert "43 answers (groups of so many: 20 of 2, 1 of 3), 23 comparisons, 1 with a probability below 1" in text
    assert DataReport.from_json(json.loads(json.dumps(prepared.report.to_json()))).groups == facts


def test_contradictions_are_counted_and_trained(prepare):
    circle = group("Q", ["a", "b", "c"], [(0, 1), (1, 2), (2, 0)])
    orders = [[(0, 1), (0, 2)], [(0, 1), (0, 2), (1, 2)], [(0, 1), (1, 2)], [(0, 1), (0, 1)]]
    report = prepare([circle, *(group("R", ["a", "b", "c"], order) for order in orders)]).report
    assert (report.groups.contradictory, report.groups.partial, report.total.kept) == (1, 2, 5)
    assert "in 1 groups they contradict one another" in shown(report)


def test_an_answer_that_cannot_be_used_takes_its_comparisons_with_it(prepare):
    every = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    rows = [
        group("one is empty", ["a", " ", "c", "d"], every),
        group("one is too long", ["a", "b" * 200, "c", "d"], every),
        group("two are the same", ["a", "b", "b", "d"], every),
        group("one is left", ["a", "", "", ""], every),
        group("all are compared with one that is empty", ["", "b", "c", "d"], every[:2]),
    ]
    prepared = prepare(rows, max_length=60, truncation="drop", max_dropped_share=0.5)
    assert [len(each.responses) for each in (prepared[0], prepared[1], prepared[2])] == [3, 3, 4]
    assert [len(each.comparisons) for each in (prepared[0], prepared[1], prepared[2])] == [3, 3, 5]
    assert prepared[0].comparisons == (Comparison(0, 1), Comparison(0, 2), Comparison(1, 2))
    report = prepared.report
    assert report.total.dropped == {"empty answer": 2}
    assert report.groups.lost == {"empty answer": 1, "longer than max_length": 1, "identical answers": 1}
    assert "answers or comparisons left out in 1 groups: longer than max_length" in shown(report)


def test_the_fingerprint_of_pairs_is_that_of_their_keys_and_margins(prepare):
    import hashlib

    prepared = prepare([row("Q", "good", "bad", margin=0.5), *GOOD_ROWS])
    digest = hashlib.sha256(np.ascontiguousarray(prepared.keys.reshape(-1, 2)).view(np.uint8).data)
    digest.update(np.array([0.5] + [np.nan] * 20, dtype=np.float32).data)
    assert prepared.fingerprint == digest.hexdigest()
    answers, orders = ["a", "b", "c"], ([(0, 1), (0, 2)], [(0, 1), (1, 2)], [(0, 1), (0, 2, None, 0.9)])
    assert len({prepare([group("Q", answers, order)]).fingerprint for order in orders}) == 3
