"""A policy of ours at a seat: seeded, greedy, shared, and what it cannot be asked."""

import json
import threading

import pytest

from hafrm_ds.corrections.dialogue import CORRECTED, TRUNCATED
from hafrm_ds.corrections.job import correct
from hafrm_ds.corrections.seats import PolicySeat, open_seats
from hafrm_ds.data.pairs import assistant, user
from hafrm_ds.errors import ModelError
from hafrm_ds.rewards.endpoint import Unanswered
from tests.corrections.desk import alone, desk, played
from tests.rewards.scripted import scripted
from tests.tiny_models import save_tiny_final, save_tiny_model

MESSAGES = [{"role": "system", "content": "You are brief."}, user("Why?")]


@pytest.fixture(scope="module")
def final(tmp_path_factory):
    return save_tiny_final(tmp_path_factory.mktemp("model") / "final")


def reply(seat, messages=MESSAGES, temperature=1.0, seed=1):
    return seat.reply(messages, temperature=temperature, max_tokens=8, seed=seed)


def policy(model, max_tokens=8):
    return PolicySeat(str(model), max_tokens, alone(), threading.Lock())


def test_an_answer_depends_on_its_seed_alone_and_greedy_on_nothing(final):
    seat = policy(final)
    assert reply(seat) == reply(policy(final)) != reply(seat, seed=2)
    assert reply(seat, temperature=0) == reply(seat, temperature=0, seed=2)


def test_what_a_policy_cannot_be_asked_is_said_of_the_dialogue(final):
    with pytest.raises(Unanswered, match="more than 512 positions"):
        reply(policy(final), [user("long " * 200), assistant("Yes."), user("Why?")])


def test_a_template_that_loses_the_system_message_is_not_used(tmp_path):
    template = "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"
    save_tiny_model(tmp_path, chat_template=template)
    with pytest.raises(Unanswered, match="the template leaves out"):
        reply(policy(tmp_path))


def test_a_folder_that_is_no_policy_is_refused(tmp_path):
    with pytest.raises(ModelError):
        policy(tmp_path / "none")


def with_desk_at(folder, url, model):
    seats = desk(folder, url).model_dump()["seats"]
    seats["assistant"] |= {"endpoint": None, "model": str(model), "max_tokens": 8, "temperature": 1.0}
    return desk(folder, url, seats=seats, max_turns=4, dialogues=4, parallel=4)


def test_a_policy_sits_beside_endpoints_and_dialogues_come_again(final, tmp_path):
    records = []
    for name in "ab":
        with scripted(played(chief="Say more.")) as endpoint:
            assert correct(with_desk_at(tmp_path / name, endpoint.url, final), alone()) == 0
        records.append([file.read_bytes() for file in sorted((tmp_path / name / "dialogues").glob("0*.json"))])
    assert records[0] == records[1] and len(records[0]) == 4
    turns = [turn for each in records[0] for turn in json.loads(each)["turns"] if turn["seat"] == "assistant"]
    assert len({turn["draft"] for turn in turns}) == len(turns) == 8
    # A tiny model of random weights ends hardly an answer by itself, and what is truncated makes no pair.
    assert {turn["outcome"] for turn in turns} <= {CORRECTED, TRUNCATED}


def test_a_policy_at_several_seats_is_loaded_once(final, tmp_path):
    seats = desk(tmp_path).model_dump()["seats"]
    for each in seats.values():
        each |= {"endpoint": None, "model": str(final)}
    opened = open_seats(desk(tmp_path, seats=seats), alone())
    assert opened["user"] is opened["assistant"] is opened["supervisor"]
