"""A judge behind an endpoint: what it is asked, what its verdicts are worth, and what its faults cost."""

import json
import threading

import pytest
import torch.distributed as dist

from hafrm_ds.data.pairs import assistant, user
from hafrm_ds.errors import ConfigError
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.rewards.composition import open_reward, read_composition
from hafrm_ds.rewards.endpoint import EndpointError
from hafrm_ds.rewards.loading import load_reward
from hafrm_ds.scoring.files import ScoringOptions, score_file
from tests.rewards.scripted import Answer, in_turn, last_said, scripted

RUBRIC = """
rubric:
  helpful: {{text: "Does it help?", scale: [1, 5], caps: {{It invents a fact: 2}}, weight: 3}}
  short: {{text: "Is it short?", scale: [0, 10]}}
endpoint: {{url: "{url}", model: judge, attempts: 2, timeout: 5}}
"""
GRADES = {"helpful": 5, "helpful_condition_1": False, "short": 10}
SOON = {"retry-after-ms": "10"}


def load(folder, url, more="", rubric=RUBRIC):
    (folder / "rubric.yaml").write_text(rubric.format(url=url) + more)
    return load_reward(folder / "rubric.yaml")


def answers(*texts, prompt="Why?"):
    return [[user(prompt), assistant(text)] for text in texts]


def said(**changes):
    return json.dumps(GRADES | changes)


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({}, 1.0),
        ({"helpful": 1, "short": 0}, 0.0),
        ({"helpful": 3, "short": 5}, 0.5),
        ({"helpful_condition_1": True}, (3 * 0.25 + 1) / 4),  # capped at 2 of 1..5
        ({"helpful_condition_1": True, "helpful": 1}, 0.25),
    ],
)
def test_a_value_is_the_weighted_mean_of_grades_under_their_caps(changes, value, tmp_path):
    with scripted(in_turn(said(**changes))) as endpoint:
        [score] = load(tmp_path, endpoint.url).scores(answers("Because."))
    assert score.value == pytest.approx(value)


def test_the_judge_gets_conversation_criteria_and_a_schema(tmp_path):
    with scripted(in_turn(said())) as endpoint:
        load(tmp_path, endpoint.url).scores(answers("Because."))
    [body] = endpoint.requests
    text = last_said(body)
    assert all(each in text for each in ("user:\nWhy?", "assistant:\nBecause.", "Does it help?", "It invents a fact"))
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["required"] == list(GRADES) and schema["additionalProperties"] is False
    assert schema["properties"]["helpful"] == {"type": "integer", "enum": [1, 2, 3, 4, 5]}
    assert schema["properties"]["helpful_condition_1"]["type"] == "boolean"


def test_samples_are_drawn_with_other_seeds_and_averaged(tmp_path):
    with scripted(in_turn(*(said(short=number) for number in (0, 4, 8)))) as endpoint:
        [score] = load(tmp_path, endpoint.url, "samples: 3").scores(answers("Because."))
    assert score.value == pytest.approx((3 + 0.4) / 4)
    assert len({body["seed"] for body in endpoint.requests}) == 3


def test_an_endpoint_without_schemas_is_read_as_plain_json(tmp_path):
    def script(body):
        if "response_format" in body:
            return Answer("unknown: response_format", 400)
        return f"<think>Hm {{so}}.</think>\n```json\n{said(short=0)}\n```"

    with scripted(script) as endpoint:
        scores = load(tmp_path, endpoint.url, "parallel: 1").scores(answers("Because.", "So."))
    assert [score.value for score in scores] == [0.75, 0.75]
    assert len(endpoint.requests) == 3


@pytest.mark.parametrize(
    "bad",
    [
        "It is good.",
        said(helpful=6),
        said(helpful=True),
        said(helpful="5"),
        said(helpful_condition_1=1),
        said(short=None),
    ]
    + [json.dumps({"helpful": 5}), "[]", "", Answer(None), Answer(body=b"<html>")],
)
def test_verdicts_that_are_none_are_asked_for_again_and_in_the_end_an_error(bad, tmp_path):
    with scripted(in_turn(bad, bad, said())) as endpoint:
        assert load(tmp_path, endpoint.url).scores(answers("Because."))[0].value == 1.0
    assert len({body["seed"] for body in endpoint.requests}) == 3
    with scripted(in_turn(bad)) as endpoint:
        [score] = load(tmp_path, endpoint.url).scores(answers("Because."))
    assert score.value is None and "judge judge: 5 answers could not be used" in score.error
    assert len(endpoint.requests) == 5


def test_a_fault_costs_its_row_alone_and_an_endpoint_that_is_down_the_job(tmp_path):
    def script(body):
        return Answer("full", 429, SOON) if "Because" in last_said(body) else said()

    with scripted(script) as endpoint:
        bad, good = load(tmp_path, endpoint.url).scores(answers("Because.", "So."))
    assert bad.value is None and "status 429" in bad.error and good.value == 1.0
    with pytest.raises(EndpointError, match="cannot be reached"):
        load(tmp_path, endpoint.url).scores(answers("Because."))


@pytest.mark.parametrize("compare", ["", "compare: true\n"])
def test_a_key_that_is_refused_ends_the_job_without_waiting_for_other_questions(compare, tmp_path):
    first, second, is_over = threading.Lock(), threading.Event(), threading.Event()

    def script(body):
        if first.acquire(blocking=False):
            second.wait(20)
            return Answer("wrong key", 401)
        second.set()
        is_over.wait(3)  # less than the time-out
        return said()

    rubric = RUBRIC.replace("caps: {{It invents a fact: 2}}, ", "") if compare else RUBRIC
    with scripted(script) as endpoint:
        with pytest.raises(EndpointError, match="status 401"):
            load(tmp_path, endpoint.url, f"parallel: 2\n{compare}", rubric).scores(answers(*"abcdefgh"))
        assert endpoint.now  # the second question has no answer yet
        is_over.set()


COMPARE = """
rubric: {{a: {{text: "Is it kind?", weight: 3}}, b: {{text: "Is it short?"}}}}
compare: true
endpoint: {{url: "{url}", model: judge}}
"""


def shown(body):
    """The two answers, in the order in which the judge sees them."""
    text = last_said(body)
    first, second = text.split("Answer A:\n")[1].split("Answer B:\n")
    return first.strip(), second.split("\n")[0].strip()


def test_a_judge_that_favours_a_place_favours_no_answer(tmp_path):
    with scripted(in_turn('{"a": "A", "b": "A"}')) as endpoint:
        scores = load(tmp_path, endpoint.url, rubric=COMPARE).scores(answers("One.", "Two.", "Three."))
    assert [score.value for score in scores] == [0.5, 0.5, 0.5]
    assert len({shown(body) for body in endpoint.requests}) == len(endpoint.requests) == 6


def test_answers_to_a_prompt_are_compared_by_weight_with_ties_half(tmp_path):
    def script(body):
        first, second = shown(body)
        longer = "A" if len(first) > len(second) else "B"
        return json.dumps({"a": longer, "b": "tie"})

    conversations = [*answers("A long answer.", "Short."), *answers("Other.", prompt="What?")]
    with scripted(script) as endpoint:
        scores = load(tmp_path, endpoint.url, rubric=COMPARE).scores(conversations)
    assert [score.value for score in scores] == [0.875, 0.125, None]
    assert "stands alone" in scores[2].error


def test_a_file_of_answers_is_compared_and_resumed_by_the_rubric_alone(tmp_path):
    def script(body):
        first, second = shown(body)
        return json.dumps({"a": "A" if len(first) > len(second) else "B", "b": "tie"})

    rows = [{"prompt": "Why?", "responses": ["A long answer.", "Short."]}, {"prompt": "What?", "response": "Alone."}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"input": tmp_path / "in.jsonl", "output": tmp_path / "out.jsonl", "model": tmp_path / "rubric.yaml"}
    with scripted(script) as endpoint:
        (tmp_path / "rubric.yaml").write_text(COMPARE.format(url=endpoint.url))
        identity = open_reward(tmp_path / "rubric.yaml").identity()
        processes = Processes(rank=0, local_rank=0, world_size=1, store=dist.HashStore())
        assert score_file(ScoringOptions(**options), processes) == 1
    scored = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert scored[0]["scores"] == [0.875, 0.125] and "stands alone" in scored[1]["score_error"]
    (tmp_path / "rubric.yaml").write_text(COMPARE.format(url="http://elsewhere/v1"))
    assert open_reward(tmp_path / "rubric.yaml").identity() == identity  # where the judge listens is no part of it


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("[1, 5]", "[5, 1]", "rubric.helpful.scale: 5 is not below 1"),
        ("fact: 2", "fact: 5", "rubric.helpful.caps: a cap lies on the scale, below 5"),
        ("endpoint", "compare: true\nendpoint", "rubric.helpful.caps: have no meaning with compare"),
        ("helpful:", "is it helpful:", "rubric.is it helpful"),
        ("model: judge", "modle: judge", "rubric.yaml: endpoint.modle: unknown key"),
        ('text: "Is it short?", ', "", "rubric.short.text: is required and was not given"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(old, new, problem, tmp_path):
    (tmp_path / "rubric.yaml").write_text(RUBRIC.format(url="http://h/v1").replace(old, new))
    with pytest.raises(ConfigError) as error:
        read_composition(tmp_path / "rubric.yaml")
    assert problem in str(error.value) and "did you mean" not in str(error.value)
