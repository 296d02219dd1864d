"""Groups in parts: nothing is lost, the budget is kept, and losses and gradients are those of the whole."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hafrm_ds.config import ObjectiveConfig
from hafrm_ds.data.lengths import GroupLengths, starts_of
from hafrm_ds.data.micro_batches import MicroBatch, make_micro_batch
from hafrm_ds.data.packing import padded_rows
from hafrm_ds.data.pairs import Comparison
from hafrm_ds.data.planning import DUMMY, partition_into_micro_batches
from hafrm_ds.data.splitting import Slices, TrainingItems
from hafrm_ds.data.tokenization import Groups, TokenizedGroup
from hafrm_ds.objective import ResponseScores, joint_loss, weights_at

LAYOUTS = ("shared_prefix", "packed", "padded")
OBJECTIVE = ObjectiveConfig(rm_weight=0.8, alpha=0.4, use_margin=True, reward_centering=0.01)


class Prepared(list):
    """Groups as far as they are asked here. Every token of a response stands nowhere else."""

    @property
    def lengths(self) -> GroupLengths:
        return GroupLengths(
            np.array([len(group.prompt_ids) for group in self], dtype=np.int64),
            np.array([len(response) for group in self for response in group.responses], dtype=np.int64),
            starts_of(np.array([len(group.responses) for group in self], dtype=np.int64)),
        )

    def needed_tokens(self, layout: str) -> int:
        """Of the longest comparison."""
        return max(cost(group, (each.better, each.worse), layout) for group in self for each in group.comparisons)


def cost(group: TokenizedGroup, answers: tuple[int, ...], layout: str) -> int:
    """Tokens of a group with some of its answers."""
    prompt, lengths = len(group.prompt_ids), [len(group.responses[answer]) for answer in answers]
    if layout == "padded":
        return len(lengths) * (prompt + max(lengths))
    return (len(lengths) if layout == "packed" else 1) * prompt + sum(lengths)


@st.composite
def prepared(draw, smallest: int = 2, largest: int = 7) -> Prepared:
    groups, token = Prepared(), 0
    for number in range(draw(st.integers(1, 4))):
        responses = []
        for length in draw(st.lists(st.integers(1, 12), min_size=smallest, max_size=largest)):
            responses.append(list(range(token, token + length)))
            token += length
        every = [(i, j) for i in range(len(responses)) for j in range(len(responses)) if i != j]
        weights, targets = st.sampled_from([1.0, 0.5, 3.0]), st.sampled_from([1.0, 0.75])
        comparisons = [
            Comparison(*both, draw(st.sampled_from([None, 0.5])), draw(targets), draw(weights))
            for both in (draw(st.lists(st.sampled_from(every), min_size=1, max_size=8, unique=True)) if every else [])
        ]
        prompt = [0] * draw(st.integers(1, 6))
        groups.append(TokenizedGroup(prompt, tuple(responses), tuple(comparisons), "", str(number)))
    return groups


@given(groups=prepared(), layout=st.sampled_from(LAYOUTS), room=st.integers(0, 60))
@settings(max_examples=100, deadline=None)
def test_every_comparison_stands_in_one_part_and_the_parts_keep_the_budget(groups, layout, room):
    max_tokens = groups.needed_tokens(layout) + room
    items = TrainingItems.of(groups, layout, max_tokens)
    costs = items.lengths.costs(layout)
    for number, group in enumerate(groups):
        own = items.of_groups(np.array([number])).tolist()
        is_whole = cost(group, tuple(range(len(group.responses))), layout) <= max_tokens
        assert own == [number] if is_whole else len(groups) <= min(own)
        found, shares = Counter(), 0.0
        for item in own:
            part, places = items[item], items.responses([item]) - groups.lengths.first[number]
            assert list(part.responses) == [group.responses[place] for place in places]
            assert costs[item] == cost(group, tuple(places), layout) <= max_tokens
            assert items.lengths.response[slice(*items.lengths.first[item : item + 2])].tolist() == [
                len(response) for response in part.responses
            ]
            found += Counter(
                each._replace(better=int(places[each.better]), worse=int(places[each.worse]))
                for each in part.comparisons
            )
            compared = {place for each in part.comparisons for place in (each.better, each.worse)}
            assert is_whole or compared == set(range(len(part.responses)))
            shares += part.share
        assert found == Counter(group.comparisons)
        assert shares == pytest.approx(1)
        assert sorted(own) == own


def test_groups_that_all_keep_the_budget_are_the_items():
    groups = Prepared([TokenizedGroup([0], ([1], [2]), (Comparison(0, 1),), "", str(number)) for number in range(5)])
    items = TrainingItems.of(groups, "shared_prefix", 3)
    index = np.array([3, 1, 4])
    assert items.of_groups(index) is index
    assert (len(items), items.parts, items[3]) == (5, [], groups[3])
    assert items.responses([3, DUMMY, 0]).tolist() == [6, 7, DUMMY, DUMMY, 0, 1]


def test_parts_of_a_ranking_by_hand():
    """Four answers of two tokens behind a prompt of one: three of them fit."""
    comparisons = [Comparison(i, j) for i in range(4) for j in range(i + 1, 4)]
    four = TokenizedGroup([0], ([1] * 2, [2] * 2, [3] * 2, [4] * 2), tuple(comparisons), "", "")
    pair = TokenizedGroup([0], ([5], [6]), (Comparison(0, 1),), "", "")
    items = TrainingItems.of(Prepared([pair, four]), "shared_prefix", 7)
    # 01 02 12 | 03 13 | 23
    assert items.of_groups(np.array([1, 0])).tolist() == [2, 3, 4, 0]
    assert [part.answers for part in items.parts] == [(0, 1, 2), (0, 1, 3), (2, 3)]
    assert [items[item].share for item in range(5)] == pytest.approx([1, 1, 1 / 2, 1 / 3, 1 / 6])
    assert items[3].comparisons == (Comparison(0, 2), Comparison(1, 2))
    assert items.responses([3, DUMMY, 0, 4]).tolist() == [2, 3, 5, DUMMY, DUMMY, 0, 1, 4, 5]


def loss_and_gradients(
    items: Groups, parts: list[np.ndarray], layout: str, normalize_by: str, references: list[torch.Tensor], tokens: int
) -> list[torch.Tensor]:
    """Weighted sum of the joint losses of micro-batches whose scores are sums over the tokens of a response."""
    thetas = torch.randn(2, tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    thetas.requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for part, reference in zip(parts, references, strict=True):
        micro_batch: MicroBatch = make_micro_batch(items, part, layout, reference, normalize_by)
        batch = micro_batch.batch
        reward, logprob = (
            torch.stack([each.sum() for each in theta[batch.target_ids].split(batch.num_tokens.tolist())])
            for theta in thetas
        )
        scores = ResponseScores(reward, logprob, batch.num_tokens)
        loss = joint_loss(OBJECTIVE, weights_at(OBJECTIVE, 0), scores, reference, micro_batch.comparisons)
        total = total + (loss.total * micro_batch.weight).sum()
    total.backward()
    return [total.detach(), thetas.grad]


@given(
    groups=prepared(),
    layout=st.sampled_from(LAYOUTS),
    normalize_by=st.sampled_from(["group", "comparison"]),
    room=st.integers(0, 30),
    num_ranks=st.integers(1, 3),
)
@settings(max_examples=100, deadline=None)
def test_losses_and_gradients_of_the_parts_are_those_of_the_groups(groups, layout, normalize_by, room, num_ranks):
    """Over the micro-batches of all ranks, dummies among them."""
    max_tokens = groups.needed_tokens(layout) + room
    items = TrainingItems.of(groups, layout, max_tokens)
    every = items.of_groups(np.arange(len(groups)))
    lengths = items.lengths.take(every)
    rows = padded_rows(layout, len(every), lengths.num_responses)
    ranks = partition_into_micro_batches(lengths.costs(layout), num_ranks, max_tokens, rows)
    parts = [np.array([DUMMY if i == DUMMY else every[i] for i in part]) for own in ranks for part in own]
    used = np.concatenate(parts)
    assert sorted(used[used != DUMMY]) == sorted(every)

    tokens = int(groups.lengths.response.sum()) + 1
    values = torch.randn(len(groups.lengths.response), dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def reference_of(responses: np.ndarray) -> torch.Tensor:
        known = torch.from_numpy(responses)
        return torch.where(known == DUMMY, 0.0, values[known])

    split = [reference_of(items.responses(part)) for part in parts]
    found = [
        loss_and_gradients(items, parts, layout, normalize_by, split, tokens),
        loss_and_gradients(groups, [np.arange(len(groups))], layout, normalize_by, [values], tokens),
    ]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@given(groups=prepared(smallest=1, largest=9), layout=st.sampled_from(LAYOUTS), max_tokens=st.integers(5, 120))
@settings(max_examples=100, deadline=None)
def test_slices_are_all_responses_in_their_order_and_as_long_as_the_budget_allows(groups, layout, max_tokens):
    lengths = groups.lengths
    slices = Slices.of(lengths, layout, max_tokens)
    assert [place for run in zip(slices.first, slices.end) for place in range(*run)] == list(range(lengths.first[-1]))
    of_slices = slices.lengths(lengths)
    assert of_slices.num_responses.tolist() == (slices.end - slices.first).tolist()
    costs = of_slices.costs(layout)
    for place, (number, start, end) in enumerate(zip(*slices, strict=True)):
        first, last = lengths.first[number : number + 2]
        assert first <= start < end <= last
        answers = tuple(range(start - first, end - first))
        assert costs[place] == cost(groups[number], answers, layout)
        assert costs[place] <= max_tokens or len(answers) == 1
        assert end == last or cost(groups[number], (*answers, answers[-1] + 1), layout) > max_tokens
