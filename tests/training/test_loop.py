"""The loss of a step and its gradients, whatever the cut of the global batch."""

import torch

from hafrm_ds.config import ObjectiveConfig
from hafrm_ds.data.micro_batches import make_micro_batch
from hafrm_ds.data.packing import lay_out
from hafrm_ds.data.tokenization import TokenizedPair
from hafrm_ds.objective import joint_loss, weights_at
from tests.tiny_models import random_items, tiny_hybrid, use_layout


def gradients(parts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Gradients of the mean joint loss over 16 pairs, accumulated over the given micro-batches."""
    items = random_items(seed=11, num_items=16)
    pairs = [TokenizedPair(i.prompt, *i.responses, margin=None, source="", id=str(n)) for n, i in enumerate(items)]
    model = tiny_hybrid("llama-tied")
    use_layout(model, "shared_prefix")
    for part in parts:
        micro_batch = make_micro_batch(pairs, part, "shared_prefix")
        scores = model(micro_batch.batch)
        reference = torch.linspace(-60, -5, 2 * len(pairs)).view(-1, 2)[micro_batch.index].view(-1)
        reference = torch.where(micro_batch.weight.repeat_interleave(2) > 0, reference, 0.0)
        objective = ObjectiveConfig()
        loss = joint_loss(objective, weights_at(objective, 0), scores, reference, micro_batch.margin)
        ((loss.total * micro_batch.weight).sum() / len(pairs)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_one_micro_batch_and_eight_give_the_same_gradients():
    whole = gradients([list(range(16))])
    uneven = [[0], [1, 2, 3], [4, 5], [6], [7, 8, 9, 10], [11, 12], [13, 14], [15]]
    cut = gradients(uneven)
    scale = max(gradient.abs().max().item() for gradient in whole.values())
    for name, gradient in whole.items():
        assert (cut[name] - gradient).abs().max().item() < 1e-5 * scale, name


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
