"""The token budget that is found at the start, on made-up memory: growth is a line in the tokens of a micro-batch."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hafrm_ds.data.lengths import GroupLengths, starts_of
from hafrm_ds.data.pairs import OF_A_PAIR, Comparison
from hafrm_ds.data.tokenization import TokenizedGroup
from hafrm_ds.errors import UserError
from hafrm_ds.objective import ResponseScores
from hafrm_ds.training import token_budget as module
from hafrm_ds.training.token_budget import SAFE_SHARE, find_token_budget, groups_worth

PER_TOKEN, FIXED, FREE = 1000, 50_000, 20_000_000


class Pairs(list):
    @property
    def lengths(self) -> GroupLengths:
        return GroupLengths(
            np.array([len(group.prompt_ids) for group in self]),
            np.array([len(response) for group in self for response in group.responses]),
            starts_of(np.array([len(group.responses) for group in self])),
        )


def pairs_of(lengths: list[int]) -> Pairs:
    """Pairs that take so many tokens with a shared prompt."""
    return Pairs(TokenizedGroup([1] * (n - 2), ([2], [3]), OF_A_PAIR, source="", id="") for n in lengths)


class ScoringEngine:
    device, bytes_of_first_step = torch.device("cpu"), 0

    def __call__(self, batch, **heads) -> ResponseScores:
        self.positions = batch.num_positions
        return ResponseScores(reward=torch.zeros(2), logprob=torch.zeros(2), num_tokens=batch.num_tokens)


@pytest.fixture
def engine(monkeypatch):
    engine = ScoringEngine()

    def growth(device, work) -> int:
        work()
        return FIXED + PER_TOKEN * engine.positions

    monkeypatch.setattr(module, "peak_growth_bytes", growth)
    monkeypatch.setattr(module, "free_memory_bytes", lambda device, num_sharing: FREE)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield engine
    dist.destroy_process_group()


def find(engine, lengths: list[int], longest: int | None = None, largest_useful: int = 10**9) -> int:
    longest = longest or max(lengths)
    return find_token_budget(
        engine,
        pairs_of(lengths),
        "shared_prefix",
        longest=longest,
        largest_useful=largest_useful,
        with_reward=True,
        with_logprob=True,
    )


@pytest.mark.parametrize("lengths", [[700] * 9, [600, 650, 900, 1000], [100, 120, 1800, 300]])
def test_the_budget_is_what_fits_whatever_the_lengths_of_the_probes(engine, lengths):
    """Pairs are not divisible: probes hold fewer tokens than they were meant to, which must not flatten the line."""
    exact = (SAFE_SHARE * FREE - FIXED) / PER_TOKEN
    assert exact - 64 <= find(engine, lengths) <= exact


def test_no_more_than_is_useful_and_no_less_than_the_longest_pair_of_any_set(engine):
    assert find(engine, [100] * 50, largest_useful=2000) == 2000 // 64 * 64
    assert find(engine, [100] * 50, longest=5000, largest_useful=2000) == 5000


def test_probes_hold_parts_of_groups_that_are_longer_than_a_micro_batch_must_be(engine, monkeypatch):
    """Whole, a group of 4,000 tokens would not fit."""
    eight = TokenizedGroup([1] * 100, tuple([k] * 500 for k in range(8)), (Comparison(0, 1), Comparison(6, 7)), "", "")

    def growth(device, work) -> int:
        work()
        if engine.positions > 3000:
            raise torch.OutOfMemoryError("tried to allocate")
        return FIXED + PER_TOKEN * engine.positions

    monkeypatch.setattr(module, "peak_growth_bytes", growth)
    monkeypatch.setattr(module, "SMALLEST_PROBE", 700)
    options = {"largest_useful": 10**9, "with_reward": True, "with_logprob": True}
    budget = find_token_budget(engine, Pairs([eight]), "shared_prefix", longest=1100, **options)
    assert budget >= 1100


def test_memory_that_does_not_hold_the_longest_pair_is_an_error_with_advice(engine, monkeypatch):
    def no_room(device, work):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(module, "peak_growth_bytes", no_room)
    with pytest.raises(UserError, match=r"does not hold .* \(the longest pair has 900\): lower --data.max_length"):
        find(engine, [900] * 4)


def test_probes_have_the_longest_pair_and_keep_to_their_size():
    costs = pairs_of([50, 400, 70, 60]).lengths.costs("shared_prefix")
    for num_tokens in (10, 400, 520, 3000):
        chosen = groups_worth(costs, "shared_prefix", num_tokens)
        assert chosen[0] == 1
        assert len(chosen) == 1 or costs[chosen].sum() <= num_tokens
    assert costs[groups_worth(costs, "shared_prefix", 3000)].sum() > 3000 - 400
