"""The loss of a step and its gradients, whatever the cut of the global batch."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hafrm_ds.config import BatchConfig, ObjectiveConfig
from hafrm_ds.data.lengths import GroupLengths
from hafrm_ds.data.micro_batches import make_micro_batch
from hafrm_ds.data.packing import lay_out
from hafrm_ds.data.pairs import OF_A_PAIR
from hafrm_ds.data.planning import imbalance, partition_into_micro_batches
from hafrm_ds.data.tokenization import TokenizedGroup
from hafrm_ds.hardware.flops import ForwardCost
from hafrm_ds.objective import joint_loss, weights_at
from hafrm_ds.training import loop
from hafrm_ds.training.loop import StepTotals, Trainer
from tests.tiny_models import random_items, tiny_hybrid, use_layout


def gradients(parts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Gradients of the mean joint loss over 16 pairs, accumulated over the given micro-batches."""
    items = random_items(seed=11, num_items=16)
    pairs = [TokenizedGroup(i.prompt, i.responses, OF_A_PAIR, source="", id=str(n)) for n, i in enumerate(items)]
    model = tiny_hybrid("llama-tied")
    use_layout(model, "shared_prefix")
    for part in parts:
        micro_batch = make_micro_batch(pairs, part, "shared_prefix")
        scores = model(micro_batch.batch)
        reference = torch.linspace(-60, -5, 2 * len(pairs)).view(-1, 2)[micro_batch.index].view(-1)
        reference = torch.where(micro_batch.weight.repeat_interleave(2) > 0, reference, 0.0)
        objective = ObjectiveConfig()
        loss = joint_loss(objective, weights_at(objective, 0), scores, reference, micro_batch.comparisons)
        ((loss.total * micro_batch.weight).sum() / len(pairs)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_one_micro_batch_and_eight_give_the_same_gradients():
    whole = gradients([list(range(16))])
    uneven = [[0], [1, 2, 3], [4, 5], [6], [7, 8, 9, 10], [11, 12], [13, 14], [15]]
    cut = gradients(uneven)
    scale = max(gradient.abs().max().item() for gradient in whole.values())
    for name, gradient in whole.items():
        assert (cut[name] - gradient).abs().max().item() < 1e-5 * scale, name


def test_what_trains_the_policy_alone_gives_the_reward_head_no_gradient_in_any_micro_batch():
    """The gradient of the head is that of the other pairs alone, however they are laid out."""
    items = random_items(seed=11, num_items=6)
    trains = [True, False, False, True, False, True]
    pairs = [
        TokenizedGroup(each.prompt, each.responses, OF_A_PAIR, "", str(n), trains_reward=trains[n])
        for n, each in enumerate(items)
    ]

    def head_gradient(parts: list[list[int]]) -> torch.Tensor:
        model = tiny_hybrid("llama-tied")
        use_layout(model, "shared_prefix")
        objective = ObjectiveConfig()
        for part in parts:
            each = make_micro_batch(pairs, part, "shared_prefix")
            reference = torch.zeros(len(each.batch.readout_index))
            weights = weights_at(objective, 0)
            loss = joint_loss(objective, weights, model(each.batch), reference, each.comparisons, each.trains_reward)
            (loss.total.sum() / len(pairs)).backward()
        return model.reward_head.weight.grad

    assert make_micro_batch(pairs, [0, 3], "shared_prefix").trains_reward is None
    expected = head_gradient([[0, 3, 5]])
    for parts in ([list(range(6))], [[0, 1], [2, 4], [3], [5]]):
        assert (head_gradient(parts) - expected).abs().max() < 1e-6 * expected.abs().max()
    assert head_gradient([[1, 2, 4]]).abs().max() == 0


def test_a_dummy_changes_no_gradient():
    whole, with_dummy = gradients([list(range(16))]), gradients([[-1], list(range(16))])
    for name, gradient in whole.items():
        assert torch.equal(with_dummy[name], gradient), name


def test_an_idle_lm_head_has_a_gradient_of_0_and_leaves_the_rest_as_it_is():
    """Not none: under ZeRO-3 a weight without a gradient would be updated by that of an earlier step."""
    model = tiny_hybrid("llama")
    use_layout(model, "shared_prefix")
    batch = lay_out(random_items(seed=3), "shared_prefix")
    found = {}
    for idle in (False, True):
        model.zero_grad()
        model(batch, with_logprob=False, idle_heads=idle).reward.square().sum().backward()
        found[idle] = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert not found[True].pop("causal_lm.lm_head.weight").any()
    assert found[False].pop("causal_lm.lm_head.weight") is None
    assert all(torch.equal(gradient, found[False][name]) for name, gradient in found[True].items())


# ---- the order of a step ---------------------------------------------------------------------------------------------


@pytest.fixture
def recorded():
    """A trainer of two steps, of 3 micro-batches and of 1, that writes down what it does instead of doing it."""
    events: list[str] = []
    trainer = Trainer.__new__(Trainer)

    def lay_out(part):
        events.append(f"lay out {part[0]}")
        return SimpleNamespace(batch=SimpleNamespace(num_positions=7), name=part[0])

    def joint_loss(weights, micro_batch, batch_weight, totals):
        events.append(f"forward {micro_batch.name}")
        return micro_batch.name

    def backward(loss, is_last):
        events.append(f"backward {loss}" + " and reduce" * is_last)

    trainer.ahead, trainer.num_steps = None, 2
    trainer.plan = SimpleNamespace(global_batch=lambda step: np.array([step]))
    trainer.items = SimpleNamespace(of_groups=lambda index: index)
    trainer.partition = lambda items: ([[0], [1], [2]] if items == [0] else [[3]], 0.0)
    trainer.weight_of = lambda index: 1.0
    trainer.lay_out, trainer.joint_loss = lay_out, joint_loss
    trainer.engine = SimpleNamespace(backward=backward, device=torch.device("cpu"))
    return trainer, events


def test_the_next_micro_batch_is_laid_out_before_backward_also_that_of_the_next_step(recorded):
    trainer, events = recorded
    assert [trainer.accumulate(step, None, StepTotals())[0] for step in (0, 1)] == [3, 1]
    assert events == [
        *("lay out 0", "forward 0", "lay out 1", "backward 0"),
        *("forward 1", "lay out 2", "backward 1"),
        *("forward 2", "lay out 3", "backward 2 and reduce"),
        *("forward 3", "backward 3 and reduce"),
    ]


def test_a_step_that_is_computed_again_is_laid_out_again(recorded):
    """As where the pull of one loss is measured before the step."""
    trainer, events = recorded
    for step in (0, 0, 1, 1):
        trainer.accumulate(step, None, StepTotals())
    forwards = [event for event in events if event.startswith("forward")]
    assert forwards == [f"forward {number}" for number in (0, 1, 2, 0, 1, 2, 3, 3)]


@pytest.mark.parametrize("are_pairs", [True, False])
def test_groups_are_partitioned_by_operations_and_pairs_by_tokens(are_pairs):
    source = np.random.default_rng(0)
    lengths = GroupLengths(source.integers(1, 500, 40), source.integers(1, 100, 160), np.arange(41) * 4)
    trainer = SimpleNamespace(
        config=SimpleNamespace(
            batch=BatchConfig(layout="shared_prefix", max_tokens_per_micro_batch=4000), objective=ObjectiveConfig()
        ),
        items=SimpleNamespace(lengths=lengths),
        train_set=SimpleNamespace(groups=SimpleNamespace(are_pairs=are_pairs)),
        cost=ForwardCost(1.0, 5.0, 0.1, 1.0, 0.0),
        world_size=2,
        rank=1,
    )
    items = source.permutation(40)[:32]
    parts, waiting = Trainer.partition(trainer, items)
    costs = lengths.costs("shared_prefix")[items]
    work = 3 * costs + 2 * 5 * lengths.all_responses[items] + 3 * 0.1 * lengths.visible_keys("shared_prefix")[items]
    expected = partition_into_micro_batches(costs, 2, 4000, None, None if are_pairs else work)
    assert [part.tolist() for part in parts] == [items[part].tolist() for part in expected[1]]
    assert waiting == imbalance(costs if are_pairs else work, expected)


def test_sums_and_largest_values_come_from_one_row(monkeypatch):
    heard: list = []
    trainer = SimpleNamespace(
        engine=SimpleNamespace(device=torch.device("cpu")),
        saver=SimpleNamespace(votes=lambda: [2.0, 0.0], hear=heard.append),
        rank=1,
        world_size=3,
    )
    totals = StepTotals(sums={"loss/total": torch.tensor(3.0).double(), "a": torch.tensor(-1.0).double()})
    totals.tokens, totals.padding, totals.flops, totals.weight = 10, 1, 5.0, 4.0
    totals.expert_load = torch.tensor([[1.0, 3.0]]).double()
    reduced: list[torch.Tensor] = []

    def all_reduce(row):
        """Rank 0 has the most memory, rank 2 votes for a save."""
        of_ranks = torch.tensor([[2.0**34, 0, 0], [0, 0, 0], [0, 1, 1]]).double()
        row += torch.cat([torch.tensor([5.0, 1.0, 100, 0, 7]).double(), of_ranks.flatten(), torch.tensor([0.0, 4])])
        reduced.append(row)

    monkeypatch.setattr(loop.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(loop, "peak_memory_bytes", lambda device: 2**30)
    metrics = Trainer.reduce(trainer, totals)
    assert len(reduced) == 1
    assert metrics == {
        **{"a": 1.0, "loss/total": 1.0, "tokens": 110.0, "padding": 1.0, "flops": 12.0, "memory_gib": 16.0},
        **{"experts/largest_load": 7 / 4, "experts/unused": 0.0},
    }
    assert heard == [[2.0, 1.0]]
    assert all(type(value) is float for value in metrics.values())
