"""A layer under torch.compile: how many graphs it makes of micro-batches that differ in all their lengths."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from hafrm_ds.data.packing import lay_out
from hafrm_ds.model.attention import KERNELS
from tests.tiny_models import random_items, tiny_hybrid

MOST_GRAPHS, SETTLED_AFTER = 3, 3
"""Numbers are constants in the first graph. What differs in the second micro-batch becomes a variable, and in the third
what was equal in the first two by chance."""


@torch.library.custom_op("hafrm_tests::attention", mutates_args=())
def opaque_attention(query: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    """Stands for a kernel: what it is told is right, and nothing is attended to."""
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    return query.clone()


@opaque_attention.register_fake
def _(query: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    return torch.empty_like(query)


def varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    return opaque_attention(query, cu_q, cu_k, max_q, max_k)


def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
    return opaque_attention(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


@pytest.fixture
def stand_ins(monkeypatch):
    """torch's variable-length attention and the package of FlashAttention 2, which run on GPUs alone."""
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # of the signature's reader
@pytest.mark.parametrize("kernel", ["varlen", "fa2"])
def test_a_compiled_layer_settles_after_three_micro_batches(stand_ins, kernel):
    model = tiny_hybrid("llama")
    model.layout = "shared_prefix"
    model.causal_lm.set_attn_implementation(KERNELS[kernel].implementation)
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(current)
        return graph.forward

    torch._dynamo.reset()
    model.causal_lm.model.layers[0].compile(backend=count)
    numbers_of_segments = set()
    with torch.no_grad():
        for current in range(12):
            batch = lay_out(random_items(seed=current, num_items=4 + current % 5), "shared_prefix")
            numbers_of_segments.add(len(batch.segments.q_lengths))
            model(batch)
    torch._dynamo.reset()
    assert len(numbers_of_segments) == 5
    assert 1 <= len(graphs) <= MOST_GRAPHS, f"graphs were made at micro-batches {graphs}"
    assert max(graphs) < SETTLED_AFTER, f"graphs were made at micro-batches {graphs}"
