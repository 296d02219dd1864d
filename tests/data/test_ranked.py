"""Groups of answers: from scores, ranks and comparisons of rows to the comparisons of a group."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hafrm_ds.data.comparisons import is_order
from hafrm_ds.data.formats import read_groups_of
from hafrm_ds.data.pairs import OF_A_PAIR, Comparison, Deselected, Dropped, PreferenceGroup, Row, assistant, user
from hafrm_ds.data.sources import Source
from hafrm_ds.evaluation.best_of_n.ranking import RankedPrompt
from tests.data.format_rows import EXAMPLES
from tests.data.row_files import error_of as reading_error
from tests.data.row_files import outcomes, rows_of, write_lines
from tests.data.test_pairs import convert, error_of
from tests.data.test_tool_calls import CALL, SCHEMA

PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}


def group_of(responses="abcd", options=None, **judgements):
    fields = {"prompt": "p", "responses": list(responses)} | judgements
    return convert(fields, Source(path="x", **(options or {})))


def said(group):
    """(better, worse, margin) of a group's comparisons, by the texts of the answers."""
    assert isinstance(group, PreferenceGroup), group
    texts = [answer[0]["content"] for answer in group.answers]
    return [(texts[each.better], texts[each.worse], each.margin) for each in group.comparisons]


# ---- scores and ranks ----------------------------------------------------------------------------------------------


def naive(rated, ranking, gap):
    """(better, worse, difference) of the texts of {(value, text)}, higher better."""
    values = [value for value, _ in rated]
    return Counter(
        (text, other_text, value - other)
        for value, text in rated
        for other, other_text in rated
        if value > other
        and value - other >= gap
        and text != other_text
        and (ranking != "best" or value == max(values))
        and (ranking != "adjacent" or not any(other < between < value for between in values))
    )


RANKINGS = st.sampled_from(["all", "best", "adjacent"])
VALUES = st.one_of(st.none(), st.integers(-2, 3), st.sampled_from([0.5, 1.25, math.nan]))


@given(st.lists(st.tuples(VALUES, st.sampled_from("abcdefgh")), max_size=9), RANKINGS, st.sampled_from([None, 0.5, 2]))
def test_scores_give_the_comparisons_of_a_naive_version(rated, ranking, gap):
    """With ties, scores that are not given, and answers that stand in the row twice."""
    options = {"ranking": ranking} | ({"min_score_gap": gap} if gap else {})
    group = group_of([text for _, text in rated], options, scores=[value for value, _ in rated])
    used = {(float(value), text) for value, text in rated if value is not None and value == value}
    expected = naive(used, ranking, gap or 0)
    if expected:
        texts = [answer[0]["content"] for answer in group.answers]
        if len(used) > 2:  # of a pair, tokenising sees whether its answers are identical
            assert len(set(texts)) == len(texts)
        assert {text for each in expected for text in each[:2]} == set(texts)
        assert Counter(said(group)) == expected
        assert all((each.target, each.weight) == (1, 1) for each in group.comparisons)
    elif isinstance(group, PreferenceGroup):
        assert len(group.answers) == 2 and group.answers[0] == group.answers[1]
    else:
        assert group.reason in {
            *("no preference is given", "fewer than two answers", "tie", "identical answers"),
            "no difference of scores as large as min_score_gap",
        }


@given(st.lists(st.one_of(st.none(), st.integers(-1, 9)), min_size=2, max_size=7), RANKINGS)
def test_ranks_are_scores_turned_round_without_margins(ranks, ranking):
    group = group_of("abcdefg"[: len(ranks)], {"ranking": ranking}, ranks=ranks)
    expected = naive([(-rank, text) for rank, text in zip(ranks, "abcdefg") if rank is not None], ranking, 0)
    if expected:
        assert Counter(said(group)) == Counter((better, worse, None) for better, worse, _ in expected)
    else:
        assert isinstance(group, Deselected)


def test_a_group_lists_its_answers_best_first():
    group = group_of("cabd", scores=[1, 5, 3, 3])
    assert group.prompt == [user("p")] and group.answers == tuple([assistant(text)] for text in "abdc")
    assert group.comparisons == tuple(
        Comparison(*each) for each in [(0, 1, 2), (0, 2, 2), (0, 3, 4), (1, 3, 2), (2, 3, 2)]
    )
    assert said(group_of("cabd", {"ranking": "adjacent"}, scores=[1, 5, 3, 3])) == [
        *(("a", "b", 2), ("a", "d", 2)),
        *(("b", "c", 2), ("d", "c", 2)),
    ]
    assert said(group_of("cabd", {"ranking": "best"}, scores=[5, 5, 3, 1])) == [
        *(("c", "b", 2), ("c", "d", 4)),
        *(("a", "b", 2), ("a", "d", 4)),
    ]


def test_published_rankings_are_groups():
    answers = [{"answer": text, "rank": rank} for text, rank in (("c", 2), ("a", 0), ("b", 1), ("d", 0))]
    nectar = {"prompt": "\n\nHuman: p\n\nAssistant: ", "answers": answers}
    pairs = [*(("a", "b", None), ("a", "c", None)), *(("d", "b", None), ("d", "c", None)), ("b", "c", None)]
    assert said(convert(nectar)) == pairs
    votes = [{"text": text, "pm_score": score} for text, score in (("a", 3), ("b", 2), ("c", 0))]
    assert said(convert({"question": "p", "answers": votes})) == [("a", "b", None), ("a", "c", None), ("b", "c", None)]
    gap = Source(path="x", min_score_gap=2)
    assert said(convert({"question": "p", "answers": votes}, gap)) == [("a", "c", None), ("b", "c", None)]
    rated = [{"response": text, "overall_score": score} for text, score in (("a", 9.5), ("b", None), ("c", 9))]
    assert said(convert({"instruction": "p", "completions": rated})) == [("a", "c", 0.5)]
    assert convert(nectar, gap) == Deselected("no difference of scores as large as min_score_gap")


def test_a_row_of_groups_may_have_earlier_turns_and_answers_as_messages():
    long = [assistant("b"), user("q"), assistant("c")]
    group = group_of(["a", assistant("d"), long], scores=[1, 2, 3], system="s", history=[["x", "y"]])
    assert group.prompt == [{"role": "system", "content": "s"}, user("x"), assistant("y"), user("p")]
    assert group.answers == (long, [assistant("d")], [assistant("a")])
    assert group_of(["a", long], {"single_turn": True}, scores=[1, 2]) == Deselected("more than one turn")
    assert group_of(["a", long[:2]], scores=[1, 2]) == Dropped("does not end with an answer")


def test_answers_of_groups_may_call_tools(read):
    fields = {"prompt": "p", "responses": ["a", [CALL], "c"], "scores": [1, 2, 3], "tools": [SCHEMA]}
    group = convert(fields)
    assert group.prompt == [user("p") | {"tools": [SCHEMA]}]
    assert group.answers == ([assistant("c")], [CALL], [assistant("a")])
    write_lines("x.jsonl", [fields])
    (row,) = read("x.jsonl")
    assert [json.loads(answer[0]["content"]) for answer in row["answers"]] == list(group.answers)


def test_what_best_of_n_writes_is_read_as_it_is(read):
    fields = {"id": 3, "prompt": [user("p")], "responses": ["a", [assistant("b")], "c"]}
    ranked = RankedPrompt(fields, {"m": np.array([1, 2, 3])}, np.array([0.5, 2, 0.5]))
    with open("ranked.jsonl", "wb") as file:
        file.writelines(ranked.lines())
    (row,) = read("ranked.jsonl")
    assert (row["format"], row["prompt"], row["remarks"]) == ("best_of_n", [user("p")], "not read: id\nnot read: model")
    assert [answer[0]["content"] for answer in row["answers"]] == ["b", "c", "a"]
    assert [(each["better"], each["worse"], each["margin"]) for each in row["comparisons"]] == [
        (0, 1, 1.5),
        (0, 2, 1.5),
    ]
    with open("without.jsonl", "wb") as file:
        file.writelines(RankedPrompt(fields, ranked.scores, None).lines())
    assert (
        "without.jsonl:1: field 'candidates[0]' is an object with the keys response, score, rank, expected a "
        in (message := reading_error(read, "without.jsonl"))
        and "best_of_n.py --gold" in message
    )


# ---- comparisons ---------------------------------------------------------------------------------------------------


def test_comparisons_name_positions_of_the_responses():
    group = group_of("abcd", comparisons=[[2, 0], [2, 1], [0, 1]])
    assert group.answers == ([assistant("c")], [assistant("a")], [assistant("b")])  # d is not compared
    assert group.comparisons == (Comparison(0, 1), Comparison(0, 2), Comparison(1, 2))


def test_a_comparison_may_have_a_probability_a_margin_and_a_weight():
    given = [
        {"better": 0, "worse": 1, "probability": 0.75, "margin": 2, "weight": 3},
        {"better": 0, "worse": 2, "probability": 0.25, "margin": 2.5, "weight": None},
        {"better": 1.0, "worse": 2, "probability": 0.5},
    ]
    group = group_of("abc", comparisons=given)
    assert [answer[0]["content"] for answer in group.answers] == ["c", "a", "b"]
    assert group.comparisons == (Comparison(1, 2, 2, 0.75, 3), Comparison(0, 1, -2.5, 0.75, 1))
    assert group_of("ab", comparisons=given[2:] and [given[2] | {"better": 0, "worse": 1}]) == Deselected("tie")
    gap = {"min_score_gap": 2}
    assert said(group_of("abc", gap, comparisons=given)) == [("a", "b", 2)]
    assert group_of("ab", gap, comparisons=[[0, 1]]).reason == "no difference of scores as large as min_score_gap"


def test_comparisons_of_two_answers_are_a_pair():
    group = group_of("ab", comparisons=[[1, 0]])
    assert group == convert(PAIR | {"chosen": "b", "rejected": "a"})
    assert group_of("ab", comparisons=[[1, 0]], margin=2).comparisons == (Comparison(0, 1, 2),)


def test_contradictions_are_kept_and_can_be_told():
    for comparisons in ([[0, 1], [1, 0]], [[0, 1], [1, 2], [2, 0]]):
        group = group_of("abc", comparisons=comparisons)
        assert len(group.comparisons) == len(comparisons)
        assert not is_order(len(group.answers), group.comparisons)


def test_an_answer_that_repeats_another_is_one_with_it():
    assert said(group_of("aab", scores=[2, 2, 1])) == [("a", "b", 1)]
    group = group_of("aab", scores=[3, 1, 2])  # a is better and worse than b
    assert said(group) == [("a", "b", 1), ("b", "a", 1)] and not is_order(2, group.comparisons)
    assert said(group_of("aabc", comparisons=[[0, 1], [0, 2], [1, 3]])) == [("a", "b", None), ("a", "c", None)]
    assert group_of("aaa", scores=[3, 1, 2]) == Dropped("identical answers")
    assert group_of("aa", scores=[3, 1]).answers == ([assistant("a")], [assistant("a")])  # as of a pair


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"responses": ["a"], "scores": [1]}, "fewer than two answers"),
        ({"responses": ["a"], "comparisons": [[0, 0]]}, "fewer than two answers"),
        ({"scores": [1, None, math.nan, None]}, "fewer than two answers"),
        ({"scores": [2, 2.0, 2, None]}, "tie"),
        ({"ranks": [1, 1, 1, 1]}, "tie"),
        ({"comparisons": [{"better": 0, "worse": 1, "probability": 0.5}]}, "tie"),
        ({"scores": None, "ranks": [], "comparisons": ""}, "no preference is given"),
    ],
)
def test_groups_without_a_preference_are_left_out(fields, reason):
    assert group_of(**fields) == Deselected(reason)


def object_of(**fields):
    return {"comparisons": [[1, 0], {"better": 0, "worse": 1} | fields]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scores": [1, 2, 3]}, "field 'scores' is a list of 3, expected 4 numbers, one for each of 'responses'"),
        ({"ranks": [1, 2]}, "field 'ranks' is a list of 2, expected 4 numbers, one for each of 'responses'"),
        ({"scores": 3}, "field 'scores' is the int 3, expected a list"),
        ({"responses": "a", "scores": [1]}, "field 'responses' is the text 'a', expected a list"),
        ({"scores": [1, 2, math.inf, 3]}, "field 'scores[2]' is the float inf, expected a finite number"),
        ({"scores": [1, 2, "3", 3]}, "field 'scores[2]' is the text '3', expected a finite number"),
        ({"ranks": [1, 2.5, 3, 4]}, "a rank in field 'ranks' is the float 2.5, expected a whole number"),
        ({"responses": ["a", None, "c", 4], "scores": [1, 2, 3, 4]}, "field 'responses[1]' is null, expected a text"),
        (
            {"responses": ["a", [user("p"), assistant("b")]], "scores": [1, 2]},
            "field 'responses[1]' is a list of 2, expected the answer alone, without the prompt",
        ),
        ({"scores": [1, 2, 3, 4], "ranks": [4, 3, 2, 1]}, "scores, ranks are given, of which one is read"),
        ({"comparisons": [[0, 0]]}, "comparisons[0] compares answer 0 with itself"),
        ({"comparisons": [[0, 4]]}, "comparisons[0]: field 'worse' is the int 4, expected a position from 0 to 3"),
        ({"comparisons": [[-1, 0]]}, "comparisons[0]: field 'better' is the int -1, expected a position from 0 to 3"),
        ({"comparisons": [[0.5, 0]]}, "comparisons[0]: field 'better' is the float 0.5, expected a position"),
        ({"comparisons": [[True, 0]]}, "comparisons[0]: field 'better' is true, expected a finite number"),
        ({"comparisons": [[0, 1, 2]]}, "field 'comparisons[0]' is a list of 3, expected [better, worse] or an object"),
        (
            {"comparisons": [{"better": 0}]},
            "field 'comparisons[0]' is an object with the keys better, expected [better",
        ),
        ({"comparisons": {"better": 0}}, "field 'comparisons' is an object with the keys better, expected a list"),
        (
            object_of(probability=1.2),
            "comparisons[1]: field 'probability' is the float 1.2, expected a probability from",
        ),
        (object_of(probability=-0.1), "comparisons[1]: field 'probability' is the float -0.1, expected a probability"),
        (object_of(weight=0), "comparisons[1]: field 'weight' is the int 0, expected a number above 0"),
        (object_of(weight=-1), "comparisons[1]: field 'weight' is the int -1, expected a number above 0"),
        (object_of(weight=1e-60), "comparisons[1]: field 'weight' is the float 1e-60, expected a number above 0"),
        (object_of(margin="x"), "comparisons[1]: field 'margin' is the text 'x', expected a finite number"),
        (
            object_of(prob=0.7),
            "field 'comparisons[1]' has prob, expected better, worse, probability, margin and weight",
        ),
        (
            {"scores": [1, 2, 3, 4], "probability": 0.7},
            "field 'probability' is that of a pair, and the row has 4 answers",
        ),
        ({}, "these are rows of answers that nobody judged (prompt, responses)"),
    ],
)
def test_what_cannot_be_read_of_groups_is_named(fields, message):
    text = error_of({"prompt": "p", "responses": list("abcd")} | fields)
    assert text.startswith("pairs.jsonl:7: ") and message in text and len(text) < 300 and "\n" not in text


def test_of_two_judgements_one_may_be_ignored():
    both = {"scores": [1, 2], "ranks": [1, 2]}
    assert said(group_of("ab", {"ignore_columns": ["ranks"]}, **both)) == [("b", "a", 1)]
    assert said(group_of("ab", {"ignore_columns": ["scores"]}, **both)) == [("a", "b", None)]


# ---- a pair with a probability -------------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [0, 0.25, 0.499, 0.75, 1, None, math.nan])
def test_a_pair_may_have_the_probability_that_chosen_is_preferred(probability):
    pair = convert(PAIR | {"probability": probability, "score_chosen": 3, "score_rejected": 1})
    given = 1.0 if probability is None or math.isnan(probability) else probability
    is_swapped = given < 0.5
    assert pair.answers == tuple([assistant(text)] for text in ("ba" if is_swapped else "ab"))
    assert pair.comparisons == (Comparison(0, 1, -2 if is_swapped else 2, max(given, 1 - given)),)


@pytest.mark.parametrize("name", ["transcripts", "safe_rlhf", "webgpt", "implicit_text", "ms_swift"])
def test_a_probability_is_read_of_every_format_of_pairs(name):
    plain = convert(EXAMPLES[name])
    pair = convert(EXAMPLES[name] | {"probability": 0.25})
    assert pair.answers == plain.answers[::-1] and pair.comparisons[0].target == 0.75
    assert convert(EXAMPLES[name] | {"probability": 0.5}) == Deselected("tie")


@pytest.mark.parametrize("value", [-0.1, 1.5, "high", [0.5], True])
def test_a_probability_that_is_none_is_an_error_that_names_the_way_out(value):
    message = error_of(PAIR | {"probability": value})
    assert message.startswith("pairs.jsonl:7: field 'probability' is ")
    assert message.endswith("expected a probability from 0 to 1 (else name it in ignore_columns of the source)")
    assert convert(PAIR | {"probability": value}, Source(path="x", ignore_columns=["probability"])) == convert(PAIR)


@pytest.mark.parametrize(
    ("preference", "chosen", "target"),
    [(1, "a", 1), (2, "b", 1), (2.0, "b", 1), (1.25, "a", 0.75), (1.75, "b", 0.75), (1.5 + 1e-9, None, None)],
)
def test_a_preference_of_alpaca_eval_between_1_and_2_is_a_probability(preference, chosen, target):
    made = convert(EXAMPLES["alpaca_farm"] | {"preference": preference})
    if chosen is None:
        assert made == Deselected("tie")
    else:
        assert made.answers[0] == [assistant(chosen)] and made.comparisons == (Comparison(0, 1, None, target),)


# ---- options of a source -------------------------------------------------------------------------------------------


def test_a_gap_is_not_missed_by_rounding():
    assert said(group_of("abc", {"min_score_gap": 0.2}, scores=[4.3, 4.1, 4.0]))[0] == ("a", "b", pytest.approx(0.2))


@pytest.mark.parametrize(
    ("fields", "is_used"),
    [
        ({"margin": 2}, True),
        ({"margin": 1.5}, False),
        ({"margin": -3}, False),
        ({"margin": -3, "probability": 0.1}, True),
        ({}, False),
        ({"margin": "big"}, False),
        ({"score_chosen": 7, "score_rejected": 5}, True),
    ],
)
def test_a_gap_holds_for_the_margins_of_pairs(fields, is_used):
    pair = convert(PAIR | fields, Source(path="x", min_score_gap=2))
    assert isinstance(pair, PreferenceGroup) == is_used
    assert is_used or pair == Deselected("no difference of scores as large as min_score_gap")


@given(st.lists(st.integers(0, 9), min_size=2, max_size=8), st.integers(2, 5), RANKINGS)
def test_at_most_so_many_answers_the_best_and_the_worst_among_them(scores, number, ranking):
    texts = "abcdefgh"[: len(scores)]
    options = {"max_answers": number, "ranking": ranking}
    group = group_of(texts, options, scores=scores)
    if len(set(scores)) == 1:
        assert group == Deselected("tie")
        return
    kept = {(scores[texts.index(answer[0]["content"])], answer[0]["content"]) for answer in group.answers}
    assert len(kept) <= number
    assert {max(kept)[0], min(kept)[0]} == {max(scores), min(scores)}
    assert len(kept) == min(number, len(scores)) or ranking == "best"
    assert Counter(said(group)) == naive(kept, ranking, 0)


def test_the_choice_of_answers_depends_on_the_row_alone():
    fields = {"prompt": "p", "responses": list("abcdefgh"), "scores": list(range(8))}
    source = Source(path="x", max_answers=4)

    def chosen(place, **changes):
        (group,) = read_groups_of(Row(fields | changes, place, ""), "groups", source)
        return "".join(answer[0]["content"] for answer in group.answers)

    assert chosen("x:1") == chosen("y:7", other=3)
    choices = {chosen("x:1", prompt=f"p{n}") for n in range(30)}
    assert len(choices) > 8 and all(each[0] == "h" and each[-1] == "a" and len(each) == 4 for each in choices)


def test_of_comparisons_the_answers_that_are_better_oftenest_are_kept():
    chain = [[n, m] for n in range(6) for m in range(n + 1, 6)]
    group = group_of("abcdef", {"max_answers": 3}, comparisons=chain)
    texts = [answer[0]["content"] for answer in group.answers]
    assert len(texts) == 3 and (texts[0], texts[-1]) == ("a", "f") and len(group.comparisons) == 3
    apart = [[0, 1], [2, 3]]
    assert group_of("abcd", {"max_answers": 2}, comparisons=apart).reason == (
        "max_answers leaves no two answers that are compared"
    )


def test_rows_of_one_prompt_are_joined(read):
    rows = [
        *rows_of(1, prompt="p", chosen="a", rejected="b", margin=1),
        *rows_of(1, prompt="q"),
        *rows_of(1, prompt="p", chosen="c", rejected="a", margin="big", note="x"),
        {"prompt": "p", "chosen": "a", "rejected": "a"},
        *rows_of(1, prompt="p", chosen="a", rejected="b", probability=0.75),
        *rows_of(1, prompt="p", source="other"),
        *rows_of(1, prompt="p", chosen="b", rejected="c"),
    ]
    write_lines("x.jsonl", rows)
    read_rows = read({"path": "x.jsonl", "group_by_prompt": True})
    joined = "joined into the group of its prompt"
    assert read_rows["deselected"][:] == ["", "", joined, "", joined, "", joined]
    assert set(read_rows["dropped"][:]) == {""}
    first = read_rows[0]
    assert [answer[0]["content"] for answer in first["answers"]] == ["a", "c", "b"]
    assert [(each["better"], each["worse"], each["margin"], each["target"]) for each in first["comparisons"]] == [
        (0, 2, 1.0, 1.0),
        (1, 0, None, 1.0),
        (0, 2, None, 0.75),
        (2, 1, None, 1.0),
    ]
    assert not is_order(3, [Comparison(**each) for each in first["comparisons"]])
    assert first["remarks"] == "margin: x.jsonl:3: field 'margin' is the text 'big', expected a finite number"
    assert read_rows["remarks"][2] == "not read: note"
    assert read_rows[2]["prompt"] == read_rows[2]["answers"] == read_rows[2]["comparisons"] == []
    alone = read("x.jsonl")
    assert outcomes(alone) == {"": 7}
    assert alone[1] == read_rows[1] and alone[3] == read_rows[3] and alone[5] == read_rows[5]
    assert read_rows[3]["answers"] == [[assistant("a")]] * 2  # which tokenising drops


def test_joined_rows_of_several_answers_are_capped_and_selected_as_groups(read):
    rows = [{"prompt": f"p{n % 3}", "responses": [f"{n}", "b", "c"], "ranks": [1, 2, 3]} for n in range(9)]
    write_lines("x.jsonl", rows)
    groups = read({"path": "x.jsonl", "group_by_prompt": True, "max_answers": 4, "max_pairs": 2})
    assert outcomes(groups) == {"": 2, "over max_pairs": 1, "joined into the group of its prompt": 6}
    assert {len(row["answers"]) for row in groups if not row["deselected"]} == {4}
    assert all(row["answers"][-1] == [assistant("c")] for row in groups if row["answers"])


def test_rows_of_groups_and_of_pairs_have_one_form(read):
    write_lines("x.jsonl", [{"prompt": "p", "responses": ["b", "a"], "scores": [1, 2]}])
    write_lines("y.jsonl", rows_of(1, prompt="p"))
    groups = read("x.jsonl", "y.jsonl")
    assert groups[0]["answers"] == groups[1]["answers"]
    assert [row["comparisons"][0]["margin"] for row in groups] == [1.0, None]
    assert convert(PAIR).comparisons == OF_A_PAIR
