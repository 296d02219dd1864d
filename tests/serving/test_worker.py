"""A worker whose device has no room for all that came together, and values that are none."""

import asyncio

import pytest
import torch

from hafrm_ds.data.pairs import assistant, user
from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.errors import NoRoomError
from hafrm_ds.rewards.reward import Score
from hafrm_ds.serving.worker import Answer, Question, Served
from tests.serving.loopback import Alive, ThreadWorker, in_loop, running


class Narrow:
    """A reward of lengths, on a device with room for `rows` conversations and for answers of 50 characters."""

    def __init__(self, rows: int, error: type[Exception] = torch.OutOfMemoryError):
        self.rows, self.error, self.asked = rows, error, []

    def scores(self, conversations):
        self.asked.append(len(conversations))
        lengths = [len(conversation[-1]["content"]) for conversation in conversations]
        if len(conversations) > self.rows or max(lengths) > 50:
            raise self.error(f"tried to allocate {sum(lengths)} bytes")
        return [Score(float(length)) for length in lengths]


def questions(lengths, kind="score"):
    return [Question(kind, [user("hi"), assistant("x" * length)]) for length in lengths]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, NoRoomError])
@pytest.mark.parametrize("rows, most", [(100, 1), (3, 7), (1, 21)])
def test_what_has_no_room_together_is_asked_in_halves(error, rows, most):
    reward = Narrow(rows, error)
    answers = Served(reward, None, None).answers(questions(range(11)))
    assert [answer.value for answer in answers] == list(range(11)) and not any(answer.error for answer in answers)
    assert len(reward.asked) <= most


def test_only_what_does_not_fit_alone_has_no_answer():
    lengths = [*range(5), 60, *range(5), 70]
    answers = Served(Narrow(4), None, None).answers(questions(lengths))
    assert [answer.value for answer in answers] == [None if length > 50 else length for length in lengths]
    errors = [answer.error for answer in answers if answer.error]
    assert errors == ["tried to allocate 60 bytes", "tried to allocate 70 bytes"]


def test_another_fault_is_none_of_room():
    with pytest.raises(ZeroDivisionError):
        Served(Narrow(1, ZeroDivisionError), None, None).answers(questions([1, 2]))


@in_loop
async def test_requests_that_were_merged_do_not_share_a_fault(monkeypatch):
    reward = Narrow(4)

    class Worker(ThreadWorker):
        def load(self):
            self.served, self.running, self.is_ready = Served(reward, None, None), (Alive(), None), True

    async with running(monkeypatch, Worker, max_wait_ms=200) as up:
        rows = [{"prompt": "p", "response": "x" * length} for length in (1, 2, 60, 3, 4, 5, 6)]
        replies = await asyncio.gather(*(up.post("/score", [row]) for row in rows))
        assert await up.metric("batches_total") == 1 and reward.asked[0] == 7
    assert [reply.status_code for reply in replies] == [200, 200, 422, 200, 200, 200, 200]
    assert [reply.json()["rows"][0]["score"] for reply in replies] == [1, 2, None, 3, 4, 5, 6]
    assert replies[2].json()["error"]["rows"] == [{"row": "rows[0]", "error": "tried to allocate 60 bytes"}]


def test_log_probs_that_are_not_finite_are_no_answer():
    class Broken:
        logprobs = {"logprob": float("nan"), "implicit_reward": 1.0}, {"logprob": -1.0, "implicit_reward": float("inf")}

        def of_tokens(self, encoded):
            return [*self.logprobs, {"logprob": -1.0}]

    class Encoding(Served):
        def encode(self, item):
            return PromptWithResponses([1], ([2],))

    served = Encoding(Narrow(9), Broken(), None)
    bad = Answer(None, "the score is not finite", 2)
    assert served.answers(questions([1, 2, 3], "logprobs")) == [bad, bad, Answer({"logprob": -1.0}, "", 2)]
