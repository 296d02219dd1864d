"""A function of the user: what it may return, and what its faults cost."""

import os
import time

import pytest

from hafrm_ds.data.pairs import assistant, user
from hafrm_ds.errors import ModelError
from hafrm_ds.rewards.function import OpenedFunction
from hafrm_ds.rewards.reward import Loader

FUNCTIONS = """
import os, sys, time
import numpy as np

def number(prompt, answer):
    print("no output of the job")
    return len(prompt) + len(answer) / 10

def whole(conversation):
    return len(conversation)

def spans(prompt, answer):
    return [len(each) for each in answer.split()]

def array(prompt, answer):
    return np.array([1.0, 2.0])

def faulty(prompt, answer):
    if answer == "raise":
        raise ValueError("two\\nlines")
    if answer == "hang":
        time.sleep(60)
    if answer == "exit":
        os._exit(7)
    if answer == "leave":
        sys.exit("done")
    return {"nan": float("nan"), "none": None, "text": "3", "empty": [], "inside": [1.0, [2.0]], "inf": [1, 1e999]}.get(
        answer, os.getpid()
    )

def many(prompts, answers):
    return [len(each) for each in answers][: 2 if "few" in answers else None]

def three(a, b, c):
    return 0.0
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("functions") / "rewards.py"
    file.write_text(FUNCTIONS)
    return file


def load(file, name, is_batched=False, timeout=20.0):
    return Loader(None, 0).load(OpenedFunction.open(file, name, is_batched=is_batched, timeout=timeout))


def asked(*answers):
    return [[user("a"), assistant("b"), user("c"), assistant(answer)] for answer in answers]


@pytest.mark.parametrize(
    ("name", "value", "spans"),
    [("number", 3.5, ()), ("whole", 4.0, ()), ("spans", 2.5, (3.0, 2.0)), ("array", 1.5, (1.0, 2.0))],
)
def test_a_function_gives_a_value_or_the_values_of_spans(file, name, value, spans, capfd):
    [score] = load(file, name).scores(asked("abc de" if name == "spans" else "abcde"))
    assert (score.value, score.spans, score.error) == (value, spans, "")
    assert "no output" not in capfd.readouterr().out


def test_what_goes_wrong_costs_its_row_alone(file):
    reward = load(file, "faulty", timeout=1.0)
    faults = {
        "raise": "ValueError: two lines",
        "nan": "gave a value not finite",
        "inf": "gave a value not finite",
        "none": "TypeError: gave None, expected a number or a list of numbers",
        "text": "TypeError: gave '3', expected a number or a list of numbers",
        "empty": "gave no value",
        "inside": "TypeError: float",
        "leave": "SystemExit: done",
        "exit": "ended its process (status 7)",
        "hang": "took longer than 1 seconds",
    }
    mixed = [answer for fault in faults for answer in (fault, "good")]
    scores = reward.scores(asked(*mixed))
    for answer, score in zip(mixed, scores, strict=True):
        if answer == "good":
            assert score.value is not None and score.error == ""
        else:
            assert score.value is None
            assert score.error.startswith(f"rewards.py:faulty: {faults[answer]}")
    assert (
        len({score.value for score in scores if score.value is not None}) == 3
    )  # after an end and a hang another process


def test_a_batched_function_is_called_once_and_a_wrong_count_is_said_of_all(file):
    reward = load(file, "many", is_batched=True)
    assert [score.value for score in reward.scores(asked("a", "bc", ""))] == [1.0, 2.0, 0.0]
    scores = reward.scores(asked("a", "few", "b"))
    assert {score.error for score in scores} == {"rewards.py:many: gave 2 values for 3 conversations"}
    assert [score.value for score in scores] == [None] * 3
    assert reward.scores([]) == []


@pytest.mark.parametrize(
    ("content", "name", "problem"),
    [
        ("def f(:", "f", "is not valid Python"),
        ("g = 1", "f", "defines no f"),
        ("import nothing_of_this_name\ndef f(a): ...", "f", "cannot be used: ModuleNotFoundError"),
        ("f = 1", "f", "cannot be used: TypeError"),
        ("def f(a, b, c): ...", "f", r"a reward takes \(prompt, answer\) or \(conversation\)"),
        ("import os\nos._exit(3)\ndef f(a): ...", "f", r"ended its process \(status 3\)"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(content, name, problem, tmp_path):
    (tmp_path / "bad.py").write_text(content)
    with pytest.raises(ModelError, match=problem):
        load(tmp_path / "bad.py", name)


def test_the_process_ends_with_the_reward_even_in_a_call_that_hangs(file):
    reward = load(file, "faulty")
    process, connection = reward.running
    connection.send(asked("hang"))
    time.sleep(0.2)
    connection.close()
    assert process.wait(timeout=10) == 0
    other = load(file, "faulty")
    number = other.running[0].pid
    del other
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)
