"""Many dialogues: what they leave, what is tried again, and what our reader makes of the pairs."""

import json
import random
import socket
import statistics
import threading

import pytest

from hafrm_ds.corrections.job import correct
from hafrm_ds.data.reading import read_groups
from hafrm_ds.data.sources import Source
from hafrm_ds.errors import ConfigError, DataError
from hafrm_ds.rewards.endpoint import EndpointError
from tests.corrections.desk import alone, desk, played, seat
from tests.rewards.scripted import Answer, last_said, scripted

SOON = {"retry-after-ms": "10"}


def run(folder, script, **more):
    """(dialogues that failed, requests, rows, report)"""
    with scripted(script) as endpoint:
        num_failed = correct(desk(folder, endpoint.url, **more), alone())
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    return num_failed, endpoint.requests, rows, json.loads((folder / "report.json").read_text())


def test_pairs_of_somebody_else_are_not_written_over(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("mine")
    with pytest.raises(DataError, match=r"pairs\.jsonl is there already, and not of this job"):
        run(tmp_path, played())
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("pairs.jsonl", "mine")]


def test_the_pairs_are_the_corrections_of_the_trained_seat(tmp_path):
    num_failed, requests, rows, report = run(tmp_path, played(), dialogues=20)
    records = [json.loads(file.read_text()) for file in sorted((tmp_path / "dialogues").glob("0*.json"))]
    corrected = [turn for each in records for turn in each["turns"] if turn["outcome"] == "corrected"]
    assert num_failed == 0 and len(records) == 20 and 10 < len(rows) == len(corrected) < 50
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in rows] == [
        (turn["prompt"], turn["sent"], turn["draft"]) for turn in corrected
    ]
    first = rows[0]
    assert first["models"] == {"assistant": "desk", "supervisor": "chief"}
    assert first["temperatures"] == {"assistant": 0.5, "supervisor": 0.5}
    assert set(first["seeds"]) == set(first["prompt_hashes"]) == {"draft", "advice", "rewrite"}
    assert {first["seeds"][kind] for kind in first["seeds"]} <= {each["seed"] for each in requests}
    assert (first["source"], first["seat"], first["advice"]) == ("desk", "assistant", "Ask where they are.")
    assert len({row["id"] for row in rows}) == len(rows)
    figures = report["seats"]["assistant"]
    assert figures["messages"] == 40
    assert figures["share_corrected"] == len(rows) / figures["messages"] == figures["share_advised"]
    longer = [len(row["chosen"].split()) - len(row["rejected"].split()) for row in rows]
    assert report["words"]["difference"] == pytest.approx(statistics.fmean(longer)) and min(longer) > 0
    assert report["words"]["share_chosen_longer"] == 1.0 and report["different_pairs"] == report["pairs"] == len(rows)


def test_the_tokens_of_endpoints_are_counted_also_those_of_an_earlier_start(tmp_path, capsys):
    script = played()

    def counts(body):
        return Answer(script(body), usage={"prompt_tokens": 10, "completion_tokens": 2})

    _, requests, _, _ = run(tmp_path, counts, dialogues=2)
    _, more, _, report = run(tmp_path, counts, dialogues=4)
    of_chief = sum(each["model"] == "chief" for each in [*requests, *more])
    assert report["tokens"]["supervisor"] == {"read": 10 * of_chief, "written": 2 * of_chief} and of_chief > 2
    assert f"supervisor: its endpoint has read {10 * of_chief:,} tokens" in capsys.readouterr().out


def test_our_reader_takes_every_row_and_refuses_no_column(tmp_path):
    _, _, rows, _ = run(tmp_path, played(), dialogues=10)
    groups = read_groups([Source(path=str(tmp_path / "pairs.jsonl"))], role="train", seed=0, cache_dir=None)
    assert len(groups) == len(rows) and set(groups["dropped"]) == set(groups["deselected"]) == {""}
    assert set(groups["format"]) == {"explicit_prompt"} and set(groups["source"]) == {"desk"}
    for group, row in zip(groups, rows):
        assert group["prompt"] == row["prompt"]
        assert [answer[0]["content"] for answer in group["answers"]] == [row["chosen"], row["rejected"]]


def test_pairs_that_repeat_one_another_are_told(tmp_path, capsys):
    said = played(
        customer="Hello?", chief="Ask.", desk=lambda body: "Where?" if "advice" in last_said(body) else "Yes."
    )
    _, _, _, report = run(tmp_path, said, dialogues=4)
    assert (report["pairs"], report["different_pairs"]) == (12, 3)
    assert "9 pairs repeat another one" in capsys.readouterr().out


def test_a_seat_that_is_supervised_and_not_trained_makes_no_pairs(tmp_path):
    rules = {"user": ["Be brief."], "assistant": ["Ask where they are."]}

    def brief(body):
        return "Where?" if "advice" in last_said(body) else "Hello?"

    _, _, rows, report = run(tmp_path / "a", played(chief="Be brief.", customer=brief), rules=rules)
    assert report["seats"]["user"]["share_corrected"] == 1.0 and {row["seat"] for row in rows} == {"assistant"}
    _, _, rows, _ = run(tmp_path / "b", played(chief="Be brief.", customer=brief), rules=rules, train="user")
    assert {row["seat"] for row in rows} == {"user"} and rows[0]["chosen"] == "Where?"
    assert [message["role"] for message in rows[0]["prompt"]] == ["system", "user"]


def test_dialogues_are_played_several_at_once_and_no_more(tmp_path):
    slow = played(customer=lambda body: Answer("Bye [END]", seconds=0.1))
    with scripted(slow) as endpoint:
        correct(desk(tmp_path, endpoint.url, dialogues=12, parallel=3), alone())
    assert endpoint.most_at_once == 3


def test_a_job_that_ended_half_way_resumes_with_the_same_rows_and_asks_nothing_twice(tmp_path):
    _, all_requests, rows, _ = run(tmp_path / "whole", played(), dialogues=12)
    number, lock = iter(range(10_000)), threading.Lock()
    script = played()

    def ends(body):
        with lock:
            is_over = next(number) >= 40
        return Answer("wrong key", 401) if is_over else script(body)

    with scripted(ends) as endpoint, pytest.raises(EndpointError, match="start again to play the others"):
        correct(desk(tmp_path / "half", endpoint.url, dialogues=12, parallel=2), alone())
    there = len(list((tmp_path / "half" / "dialogues").glob("0*.json")))
    assert 0 < there < 12
    _, requests, resumed, _ = run(tmp_path / "half", played(), dialogues=12)
    assert resumed == rows and 0 < len(requests) < len(all_requests)
    again, requests, more, _ = run(tmp_path / "half", played(), dialogues=14)  # more of them, later
    assert again == 0 and more[: len(rows)] == rows and len(requests) < 40
    with pytest.raises(DataError, match="holds parts of a job with another"):
        run(tmp_path / "half", played(), dialogues=12, seed=1)


def test_a_dialogue_that_fails_is_named_with_its_reason_and_tried_anew(tmp_path, capsys):
    def bad(body):
        return Answer(None) if "Tobias" in body["messages"][0]["content"] else "Hello? [END]"

    num_failed, _, _, report = run(tmp_path, played(customer=bad), dialogues=4)
    assert num_failed == 2 and list(report["failed"]) == ["1", "3"] and report["ends"] == {"end_mark": 2}
    reason = "user, draft of message 1: 5 answers could not be used, the last because it holds no text"
    assert report["failed"]["1"] == reason and f"dialogue 1 has failed: {reason}" in capsys.readouterr().out
    num_failed, requests, _, report = run(tmp_path, played(), dialogues=4)
    assert num_failed == 0 and report["failed"] == {}
    assert all("Ines" not in json.dumps(each) for each in requests)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer("full", 429, SOON), "status 429"),
        (Answer("broken", 500, SOON), "status 500"),
        (Answer("too long", 400), "too long"),
        (Answer("late", seconds=1.0), "took longer than 0.2 s in each of 2 attempts"),
        (Answer(body=b"<html>"), "is no JSON"),
        (Answer(""), "is empty"),
    ],
)
def test_an_endpoint_that_fails_for_ever_costs_each_dialogue_once(answer, reason, tmp_path):
    def script(body):
        return answer if body["model"] == "chief" else played()(body)

    with scripted(script) as endpoint:
        seats = desk(tmp_path, endpoint.url).model_dump()["seats"]
        seats["supervisor"] = seat(endpoint.url, "chief", "You supervise.", timeout=0.2, attempts=2)
        num_failed = correct(desk(tmp_path, endpoint.url, seats=seats), alone())
    report = json.loads((tmp_path / "report.json").read_text())
    assert num_failed == len(report["failed"]) == 2
    for said in report["failed"].values():
        assert said.startswith("supervisor, advice of message 2: ") and reason in said
    assert (tmp_path / "pairs.jsonl").read_text() == ""


def test_an_endpoint_that_is_down_ends_the_job(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/v1"
    seats = desk(tmp_path, url).model_dump()["seats"]
    for each in seats.values():
        each["endpoint"]["attempts"] = 1
    with pytest.raises(EndpointError, match="cannot be reached"):
        correct(desk(tmp_path, url, seats=seats, dialogues=50), alone())
    assert not (tmp_path / "report.json").exists()


def test_a_leak_is_refused_before_anybody_is_asked(tmp_path):
    with scripted(played()) as endpoint, pytest.raises(ConfigError, match="tells the user the value of cover"):
        seats = desk(tmp_path, endpoint.url).model_dump()["seats"]
        seats["user"]["system"] = "You are {name}. Your cover is: repairs alone."
        correct(desk(tmp_path, endpoint.url, seats=seats), alone())
    assert endpoint.requests == [] and not list(tmp_path.iterdir())


def test_corrections_that_are_none_are_counted_and_make_no_pair(tmp_path):
    choice = random.Random(0)

    def unhelpful(body):
        return choice.choice(["", "Yes."]) if "advice" in last_said(body) else "Yes."

    _, _, rows, report = run(tmp_path, played(desk=unhelpful, chief="Say more."), dialogues=10)
    outcomes = report["seats"]["assistant"]["outcomes"]
    assert rows == [] and report["words"]["difference"] is None
    assert set(outcomes) == {"the correction is empty: the draft is sent", "the correction is the draft"}
    assert sum(outcomes.values()) == report["seats"]["assistant"]["messages"]


def test_several_processes_are_refused(tmp_path):
    processes = alone()
    processes.world_size = 2
    with pytest.raises(ConfigError, match="one process"):
        correct(desk(tmp_path), processes)
