"""Forward and backward of a Llama of 1B's shape on meta tensors: how many kernels a layer starts, and what it keeps."""

from collections import Counter

import pytest

from hafrm_ds.capacity.working_memory import Pass, working_bytes
from hafrm_ds.data.packing import lay_out
from tests.gpu.benchmark import random_pairs
from tests.without_gpu.counting import counted_step, model_of

CEILINGS = {False: (40, 81), True: (18, 40)}
"""Kernels of a layer in forward and in backward, without and with fused functions. Raise them only for what is worth a
kernel a layer."""
KEPT = {False: 6.6, True: 4.6}
"""Million bytes of activations a token at 7B, at most."""


def kernels(num_layers: int, fused: bool) -> list[Counter[str]]:
    model = model_of("1B", num_layers)
    batch = lay_out(random_pairs(model.lm_head.out_features, 2048), "shared_prefix")
    return [counts.kernels for counts in counted_step(model, batch, fused)]


@pytest.mark.parametrize("fused", [False, True])
def test_a_layer_starts_no_more_kernels_than_it_did(fused):
    one, two = kernels(1, fused), kernels(2, fused)
    for name, first, second, ceiling in zip(("forward", "backward"), one, two, CEILINGS[fused], strict=True):
        layer = second - first
        assert 0 < layer.total() <= ceiling, f"{name}: {layer.total()} kernels a layer, {dict(layer)}"


@pytest.mark.parametrize("fused", [False, True])
def test_a_token_keeps_no_more_activations_than_it_did(fused):
    how = Pass("shared_prefix", "cuda", with_reward=True, with_logprob=False, fused=fused)
    model, few, many = model_of("7B"), random_pairs(1000, 2000), random_pairs(1000, 8000)
    taken = [working_bytes(model, items, how) for items in (few, many)]
    tokens = [lay_out(items, "shared_prefix").num_positions for items in (few, many)]
    kept = (taken[1] - taken[0]) / (tokens[1] - tokens[0]) / 1e6
    assert KEPT[fused] * 0.9 <= kept <= KEPT[fused], f"{kept:.2f} MB a token"
