"""Scoring a set of groups: every value at its place, and how often ranks ask one another whether to stop."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hafrm_ds.data.lengths import GroupLengths, places_of, starts_of
from hafrm_ds.data.pairs import OF_A_PAIR
from hafrm_ds.data.tokenization import PromptWithResponses, TokenizedGroup
from hafrm_ds.engine import scoring as module
from hafrm_ds.engine.scoring import Items, OccasionalQuestion, score_groups, score_items
from hafrm_ds.objective import ResponseScores

CPU = torch.device("cpu")


class CountingEngine:
    """The sum of a response's tokens is its reward, their number its log-prob."""

    device = CPU

    def __init__(self):
        self.positions: list[int] = []

    def __call__(self, batch, **heads) -> ResponseScores:
        self.positions.append(batch.num_positions)
        sums = torch.stack([part.sum().float() for part in batch.target_ids.split(batch.num_tokens.tolist())])
        return ResponseScores(reward=sums, logprob=batch.num_tokens.float(), num_tokens=batch.num_tokens)


class Groups(list):
    """Groups with their lengths, as PreparedGroups has them."""

    lengths: GroupLengths


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
@pytest.mark.parametrize("num_responses", [[2] * 7, [2, 5, 3, 2, 4, 3, 8]], ids=["pairs", "groups"])
@pytest.mark.parametrize("max_tokens", [200, 45])
def test_every_value_comes_to_its_response(group, layout, num_responses, max_tokens):
    """Also of groups that are too long for a micro-batch, which keeps its budget."""
    source, first = np.random.default_rng(0), starts_of(np.array(num_responses))
    prompt, sizes = source.integers(1, 30, size=7), source.integers(1, 12, size=first[-1])
    tokens = np.arange(2, 2 + len(sizes))
    responses = [[token] * size for token, size in zip(tokens, sizes, strict=True)]
    prepared = Groups(
        TokenizedGroup([9] * prompt[g], tuple(responses[slice(*first[g : g + 2])]), OF_A_PAIR, "", "") for g in range(7)
    )
    prepared.lengths = GroupLengths(prompt, sizes, first)
    index = np.array([6, 0, 3, 2, 5])
    wanted = places_of(first, index)

    def score(**options) -> dict[str, np.ndarray] | None:
        options = {"layout": layout, "max_tokens": max_tokens, "heads": ("reward", "logprob")} | options
        return score_groups(engine, prepared, index, **options)

    engine, finished = CountingEngine(), []
    scores = score(on_progress=finished.append)
    assert max(engine.positions) <= max_tokens
    assert sum(finished) == len(index)
    assert scores["reward"].tolist() == (sizes * tokens)[wanted].tolist()
    assert scores["logprob"].tolist() == sizes[wanted].tolist()
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
