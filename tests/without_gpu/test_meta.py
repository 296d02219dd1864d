"""Forward and backward of a Llama of 1B's shape on meta tensors: how many kernels a layer starts."""

from collections import Counter
from dataclasses import asdict, replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from hafrm_ds.data.packing import lay_out
from hafrm_ds.model.attention import KERNELS
from hafrm_ds.model.hybrid import HybridModel, RewardHead
from hafrm_ds.objective import bradley_terry_loss, dpo_loss
from tests.gpu.benchmark import SHAPES, random_pairs

FORWARD_CEILING, BACKWARD_CEILING = 40, 81
"""Kernels of a layer. Raise them only for what is worth a kernel a layer."""
STARTS_NOTHING = {
    *("view", "_unsafe_view", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "select"),
    *("split", "split_with_sizes", "detach", "alias", "as_strided", "reshape", "_reshape_alias", "unbind", "chunk"),
    *("empty", "empty_like", "new_empty", "empty_strided", "lift_fresh", "is_same_size", "result_type"),
    "_has_compatible_shallow_copy_type",
}
META = torch.device("meta")


class Kernels(TorchDispatchMode):
    """Counts the operations that would start a kernel."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (name := func.overloadpacket.__name__) not in STARTS_NOTHING:
            self.counts[name] += 1
        return func(*args, **kwargs or {})


def kernels(num_layers: int) -> tuple[Counter[str], Counter[str]]:
    """Of forward with loss, and of backward."""
    shape = replace(SHAPES["1B"], num_hidden_layers=num_layers)
    config = LlamaConfig(**asdict(shape), max_position_embeddings=4096)
    with META:
        causal_lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    head = RewardHead(config.hidden_size, 1, bias=False, device=META, dtype=torch.bfloat16)
    model = HybridModel(causal_lm.train(), head)
    model.causal_lm.set_attn_implementation(KERNELS["varlen"].implementation)
    batch = lay_out(random_pairs(shape.vocab_size, 2048), "shared_prefix").to(META)
    with Kernels() as forward:
        scores = model(batch)
        reference = torch.zeros(scores.logprob.shape, device=META)
        loss = (bradley_terry_loss(scores.reward) + dpo_loss(scores.logprob, reference, 0.1)).mean()
    with Kernels() as backward:
        loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return forward.counts, backward.counts


def test_a_layer_starts_no_more_kernels_than_it_did():
    one, two = kernels(1), kernels(2)
    for name, first, second, ceiling in zip(
        ("forward", "backward"), one, two, (FORWARD_CEILING, BACKWARD_CEILING), strict=True
    ):
        layer = second - first
        assert 0 < layer.total() <= ceiling, f"{name}: {layer.total()} kernels a layer, {dict(layer)}"
