"""A chat endpoint that is slow, full, down, or answers with what was not asked for."""

import socket
import time

import pytest

from hafrm_ds.errors import ConfigError
from hafrm_ds.rewards.endpoint import Chat, Endpoint, EndpointError, Unanswered, Unusable, insist, json_object, seed_of
from tests.rewards.scripted import Answer, in_turn, scripted

MESSAGES = [{"role": "user", "content": "Why?"}]
SOON = {"retry-after-ms": "10"}
"""What the client takes before Retry-After."""


def ask(url, schema=None, **endpoint):
    chat = Chat(Endpoint(**{"url": url, "model": "m", "attempts": 3, "timeout": 5.0} | endpoint))
    return chat.reply(MESSAGES, temperature=0.5, max_tokens=9, seed=1, schema=schema)


def test_what_is_sent_and_what_comes_back():
    usage = {"prompt_tokens": 7, "completion_tokens": 2}
    odd = {"prompt_tokens": "7"}
    said = [" Because. ", Answer("Bec", finish_reason="length", usage=usage), Answer("Be", usage=odd)]
    with scripted(in_turn(*said)) as endpoint:
        assert ask(endpoint.url) == ("Because.", True, 0, 0)
        assert ask(endpoint.url, body={"seed": None, "top_p": 0.9}) == ("Bec", False, 7, 2)
        assert ask(endpoint.url) == ("Be", True, 0, 0)
    whole = {"model": "m", "messages": MESSAGES, "temperature": 0.5, "max_tokens": 9, "seed": 1}
    assert endpoint.requests[0] == whole
    assert endpoint.requests[1] == {name: whole[name] for name in whole if name != "seed"} | {"top_p": 0.9}


def test_a_full_endpoint_is_asked_again_after_the_seconds_that_it_names():
    full = Answer("full", 429, {"Retry-After": "1"})
    with scripted(in_turn(full, "Because.")) as endpoint:
        started = time.monotonic()
        assert ask(endpoint.url).text == "Because."
        assert time.monotonic() - started > 0.95 and len(endpoint.requests) == 2


@pytest.mark.parametrize("status", [429, 500, 503])
def test_attempts_have_a_limit(status):
    with scripted(in_turn(Answer("not\nnow", status, SOON))) as endpoint:
        with pytest.raises(Unanswered, match=f"answered with status {status}: .*not.{{1,2}}now"):
            ask(endpoint.url)
        assert len(endpoint.requests) == 3


def test_a_wait_of_an_hour_is_not_waited():
    with scripted(in_turn(Answer("full", 429, {"Retry-After": "3600"}))) as endpoint:
        with pytest.raises(Unanswered, match="429"):
            ask(endpoint.url)
        assert len(endpoint.requests) == 1


def test_a_slow_endpoint_is_given_up():
    with scripted(in_turn(Answer("late", seconds=2.0))) as endpoint:
        with pytest.raises(Unanswered, match=r"took longer than 0.2 s in each of 2 attempts"):
            ask(endpoint.url, timeout=0.2, attempts=2)
        assert len(endpoint.requests) == 2


def test_where_nobody_listens_every_request_would_fail():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(EndpointError, match=f"http://127.0.0.1:{port}/v1 cannot be reached"):
        ask(f"http://127.0.0.1:{port}/v1", attempts=1)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_model_is_wrong_for_all(status):
    with scripted(in_turn(Answer("no such model", status))) as endpoint:
        with pytest.raises(EndpointError, match=f"status {status}: .*no such model"):
            ask(endpoint.url)
        assert len(endpoint.requests) == 1


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (Answer(body=b"{"), "is no JSON"),
        (Answer(body=b"<html>"), "is no JSON"),
        (Answer(body=b"<html>", headers={"Content-Type": "text/html"}), "is no chat completion"),
        (Answer(body=b"[]"), "is no chat completion"),
        (Answer(body=b'{"choices": []}'), "is no chat completion"),
        (Answer(body=b'{"choices": [{"message": null}]}'), "is no chat completion"),
        (Answer(None), "holds no text"),
        (Answer("half \ud83d"), "holds half of a surrogate pair"),
    ],
)
def test_what_is_no_answer_is_named(answer, fault):
    with scripted(in_turn(answer)) as endpoint, pytest.raises(Unusable, match=fault):
        ask(endpoint.url)


def test_other_answers_are_asked_for_a_limited_number_of_times():
    asked = []

    def say(attempt):
        asked.append(attempt)
        raise Unusable("is empty")

    with pytest.raises(Unanswered, match="5 answers could not be used, the last because it is empty"):
        insist(say)
    assert asked == [0, 1, 2, 3, 4]
    assert insist(lambda attempt: attempt + 7) == 7


def test_an_endpoint_that_takes_no_schema_is_asked_without_from_then_on():
    def script(body):
        return Answer("response_format is unknown", 400) if "response_format" in body else "{}"

    with scripted(script) as endpoint:
        chat = Chat(Endpoint(url=endpoint.url, model="m"))
        for _ in range(2):
            chat.reply(MESSAGES, temperature=0, max_tokens=9, seed=1, schema={"type": "object"})
    assert ["response_format" in each for each in endpoint.requests] == [True, False, False]


def test_a_request_that_is_refused_either_way_says_nothing_about_schemas():
    with scripted(in_turn(Answer("too long", 400), Answer("too long", 400), "{}")) as endpoint:
        chat = Chat(Endpoint(url=endpoint.url, model="m"))
        with pytest.raises(Unanswered, match="too long"):
            chat.reply(MESSAGES, temperature=0, max_tokens=9, seed=1, schema={"type": "object"})
        chat.reply(MESSAGES, temperature=0, max_tokens=9, seed=1, schema={"type": "object"})
    assert endpoint.requests[2]["response_format"]["json_schema"]["schema"] == {"type": "object"}


def test_a_key_comes_from_its_file(tmp_path):
    with pytest.raises(ConfigError, match=r"key_file .*none cannot be read"):
        Chat(Endpoint(url="http://127.0.0.1:9/v1", model="m", key_file=tmp_path / "none"))
    (tmp_path / "key").write_text("secret\n")
    assert Chat(Endpoint(url="http://h/v1", model="m", key_file=tmp_path / "key")).client.api_key == "secret"


def test_without_the_client_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[correct\]'"):
        Chat(Endpoint(url="http://h/v1", model="m"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1}', {"a": 1}),
        ('Sure:\n```json\n{"a": {"b": 2}}\n```', {"a": {"b": 2}}),
        ('{so} {"a": 1} {"b": 2}', {"a": 1}),
        ("none", None),
        ("{", None),
        ("{" * 2_000, None),
    ],
)
def test_a_json_object_is_found_in_a_text(text, found):
    assert json_object(text) == found


def test_seeds_have_31_bits_and_depend_on_every_part():
    seeds = {seed_of(a, b) for a in range(20) for b in ("draft", "advice")}
    assert len(seeds) == 40 and all(0 <= seed < 2**31 for seed in seeds)
