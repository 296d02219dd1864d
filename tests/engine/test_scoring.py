"""Scoring a set of pairs: every value at its place, and how often ranks ask one another whether to stop."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hafrm_ds.data.tokenization import TokenizedPair
from hafrm_ds.engine import scoring as module
from hafrm_ds.engine.scoring import OccasionalQuestion, score_pairs
from hafrm_ds.objective import ResponseScores

CPU = torch.device("cpu")


class CountingEngine:
    """The sum of a response's tokens is its reward, their number its log-prob."""

    device = CPU

    def __call__(self, batch, **heads) -> ResponseScores:
        sums = torch.stack([part.sum().float() for part in batch.target_ids.split(batch.num_tokens.tolist())])
        return ResponseScores(reward=sums, logprob=batch.num_tokens.float(), num_tokens=batch.num_tokens)


class Pairs(list):
    """Pairs with their lengths, as PreparedPairs has them."""

    lengths: dict[str, np.ndarray]


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_every_value_comes_to_its_pair(group, layout):
    sizes = np.random.default_rng(0).integers(1, 30, size=(7, 3))
    pairs = [TokenizedPair([9] * p, [2] * c, [3] * r, margin=None, source="", id="") for p, c, r in sizes]
    prepared = Pairs(pairs)
    prepared.lengths = dict(zip(("prompt", "chosen", "rejected"), sizes.T))
    index = np.array([6, 0, 3, 2, 5])

    def score(**options) -> dict[str, np.ndarray] | None:
        options = {"layout": layout, "max_tokens": 120, "with_reward": True, "with_logprob": True} | options
        return score_pairs(CountingEngine(), prepared, index, **options)

    scores = score()
    assert scores["reward"].tolist() == (sizes[index, 1:] * [2, 3]).tolist()
    assert scores["logprob"].tolist() == sizes[index, 1:].tolist()
    assert list(score(with_reward=False)) == ["logprob"]
    assert score(must_stop=lambda: True) is None


@pytest.mark.parametrize(
    ("seconds", "asked"),
    [
        # The second micro-batch is the first that was timed. 1 s holds 4 of a quarter of a second.
        (0.25, [1, 2, 6, 10, 14]),
        (0.4, [1, 2, 4, 6, 8, 10, 12, 14]),
        (3.0, list(range(1, 16))),
    ],
)
def test_ranks_ask_about_once_a_second_by_the_clock_of_the_slowest(monkeypatch, seconds, asked):
    calls, clock = [], SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(module, "over_all_ranks", lambda operation, device, own: own * seconds / 0.1)
    question = OccasionalQuestion(lambda: calls.append(number) or number == 15, CPU)
    for number in range(1, 16):
        assert question() is (number == 15 and number in asked)
        clock.now += 0.1  # of this rank, which is faster than another
    assert calls == asked
