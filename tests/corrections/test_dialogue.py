"""One dialogue: who is sent what, and what becomes of a draft."""

import json
from itertools import count

import pytest

from hafrm_ds.corrections.dialogue import (
    CORRECTED,
    EMPTY,
    IDENTICAL,
    LEAK,
    NO_PROBLEM,
    TRUNCATED,
    UNSUPERVISED,
    Dialogue,
)
from hafrm_ds.corrections.seats import open_seats
from hafrm_ds.rewards.endpoint import Unanswered
from tests.corrections.desk import CASES, alone, desk, played
from tests.rewards.scripted import Answer, last_said, scripted


def play(folder, script, **more):
    with scripted(script) as endpoint:
        scenario = desk(folder, endpoint.url, **more)
        seats = open_seats(scenario, alone())
        record = Dialogue(scenario, seats, 0, CASES[0], check=lambda: None).play()
    return record, endpoint.requests


def of_model(requests, model):
    return [each["messages"] for each in requests if each["model"] == model]


def test_each_seat_sees_what_it_may_see_and_the_supervisor_everything(tmp_path):
    record, requests = play(tmp_path, played(chief="Ask where they are."))
    customer, desk_, chief = (of_model(requests, name) for name in ("customer", "desk", "chief"))
    assert record["end"] == "end_mark"
    assert customer[0] == [
        {"role": "system", "content": "You are Ines Okafor: the chain is off."},
        {"role": "user", "content": "(The conversation begins. You speak first.)"},
    ]
    for messages in (*customer, *desk_):  # templates that insist on it get roles in turn
        assert [each["role"] for each in messages[1:]] == ["user", "assistant"] * (len(messages) // 2 - 1) + ["user"]
    for messages in desk_:
        assert not any(secret in json.dumps(messages) for secret in ("repairs alone", "4711", "Okafor"))
    for messages in chief:
        assert all(f"{name}: {value}" in messages[0]["content"] for name, value in CASES[0].items())
        assert "- Ask where the customer is." in messages[1]["content"]
        assert "The assistant must not learn from you: name, trouble, cover, code." in messages[1]["content"]


def test_an_advised_draft_is_rewritten_from_advice_draft_and_last_message(tmp_path):
    record, requests = play(tmp_path, played(chief="Ask where they are."))
    first, second = record["turns"][:2]
    assert (first["seat"], first["outcome"]) == ("user", UNSUPERVISED)
    assert (second["seat"], second["outcome"], second["advice"]) == ("assistant", CORRECTED, "Ask where they are.")
    draft, rewrite = of_model(requests, "desk")[:2]
    assert second["prompt"] == draft and rewrite[:-1] == draft[:-1]
    assert all(text in rewrite[-1]["content"] for text in (first["sent"], second["draft"], second["advice"]))
    assert second["sent"] == second["rewrite"] != second["draft"]
    assert of_model(requests, "customer")[1][-1]["content"] == second["sent"]


def test_a_draft_without_a_problem_is_sent(tmp_path):
    for words in ("no problem", " No problem.\n", '"No Problem"'):
        record, _ = play(tmp_path, played(chief=words))
        assert {turn["outcome"] for turn in record["turns"] if turn["seat"] == "assistant"} == {NO_PROBLEM}
    for words in ("All good.", "all good", "**All good!**"):
        record, _ = play(tmp_path, played(chief=words), no_problem="All good.")
        assert record["turns"][1]["outcome"] == NO_PROBLEM
    assert play(tmp_path, played(chief="No problem, but ask."))[0]["turns"][1]["outcome"] == CORRECTED


def rewritten(text, reason="stop"):
    return lambda body: Answer(text, finish_reason=reason) if "advice" in last_said(body) else "Yes."


@pytest.mark.parametrize(
    ("scripts", "outcome", "sent"),
    [
        ({"desk": rewritten(" \n")}, EMPTY, "Yes."),
        ({"desk": rewritten("[END]")}, EMPTY, "Yes."),
        ({"desk": rewritten(" Yes.\n")}, IDENTICAL, "Yes."),
        ({"desk": rewritten("Yes, where are", "length")}, TRUNCATED, "Yes, where are"),
        ({"chief": "Say that only Repairs alone are covered."}, LEAK, None),
        ({"chief": "Say that the chain is off."}, LEAK, None),
    ],
)
def test_what_makes_no_pair_is_told_apart(scripts, outcome, sent, tmp_path):
    turn = play(tmp_path, played(**{"chief": "Say more."} | scripts))[0]["turns"][1]
    assert turn["outcome"] == outcome
    assert turn["sent"] == (sent or turn["draft"])


def test_what_has_been_said_is_no_secret_any_more(tmp_path):
    record, _ = play(tmp_path, played(customer="My chain: the chain is off", chief="Say that the chain is off."))
    assert record["turns"][1]["outcome"] == CORRECTED


def test_a_dialogue_ends_with_its_mark_or_its_last_turn(tmp_path):
    record, _ = play(tmp_path, played(customer="Hello?"))
    assert (record["end"], len(record["turns"])) == ("max_turns", 6)
    record, _ = play(tmp_path, played(desk="[END]"))
    assert (record["end"], len(record["turns"])) == ("end_mark", 1)
    record, _ = play(tmp_path, played(desk="Goodbye. [END]", chief="no problem"))
    assert (record["end"], [turn["sent"] for turn in record["turns"]][1:]) == ("end_mark", ["Goodbye."])


def test_every_request_has_a_seed_of_its_own_which_comes_again(tmp_path):
    seeds = [[each["seed"] for each in play(tmp_path, played())[1]] for _ in range(2)]
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == len(seeds[0])
    assert seeds[0][0] != play(tmp_path, played(), seed=1)[1][0]["seed"]


def test_empty_answers_are_asked_for_again_with_other_seeds_and_a_limited_number_of_times(tmp_path):
    number = count()
    record, requests = play(tmp_path, played(customer=lambda body: "" if next(number) < 2 else "Hello? [END]"))
    assert len(record["turns"]) == 1 and len({each["seed"] for each in requests}) == 3
    with pytest.raises(Unanswered, match=r"user, draft of message 1: 5 answers could not be used, .* is empty"):
        play(tmp_path, played(customer=""))
