"""Scoring a set of pairs: every value at its place, and how often ranks ask one another whether to stop."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hafrm_ds.data.tokenization import PromptWithResponses, TokenizedPair
from hafrm_ds.engine import scoring as module
from hafrm_ds.engine.scoring import Items, OccasionalQuestion, score_items, score_pairs
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
        options = {"layout": layout, "max_tokens": 120, "heads": ("reward", "logprob")} | options
        return score_pairs(CountingEngine(), prepared, index, **options)

    scores = score()
    assert scores["reward"].tolist() == (sizes[index, 1:] * [2, 3]).tolist()
    assert scores["logprob"].tolist() == sizes[index, 1:].tolist()
    assert list(score(heads=("logprob",))) == ["logprob"]
    assert score(must_stop=lambda: True) is None


def test_values_are_told_once_the_next_micro_batch_is_launched():
    """A caller that fetches them waits for a GPU which has been given the next one already."""
    events: list[str] = []
    lengths = np.array([20, 10, 5, 15])
    engine = CountingEngine()

    def forward(batch, **heads) -> ResponseScores:
        events.append("launched")
        return engine(batch)

    values = score_items(
        forward,
        Items(lambda place: PromptWithResponses([9], ([2] * lengths[place],)), np.full(4, 1), lengths + 1),
        ("logprob",),
        layout="packed",
        max_tokens=21,
        on_values=lambda positions, values: events.append(f"told {positions} {values.tolist()}"),
    )
    assert values is not None and values.tolist() == lengths.tolist()
    assert events == [
        "launched",
        "launched",
        "told [0] [20.0]",
        "launched",
        "told [3] [15.0]",
        "told [1, 2] [10.0, 5.0]",
    ]


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
