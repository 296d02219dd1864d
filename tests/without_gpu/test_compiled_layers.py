"""model.fused compile_layers and compile: the graphs that are made of micro-batches that differ in all lengths."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from hafrm_ds.data.packing import lay_out
from hafrm_ds.model import fused
from hafrm_ds.model.attention import KERNELS
from hafrm_ds.model.hybrid import HybridModel
from hafrm_ds.model.recomputation import set_gradient_checkpointing
from tests.tiny_models import random_items, tiny_hybrid, use_layout


@torch.library.custom_op("hafrm_tests::attention", mutates_args=())
def opaque_attention(query: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    """Stands for a kernel: what it is told is right, and nothing is attended to."""
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    return query.clone()


@opaque_attention.register_fake
def _(query: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
    return torch.empty_like(query)


opaque_attention.register_autograd(lambda context, grad: (grad, None, None, None, None))


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


class Graphs:
    """A backend of torch.compile that computes a graph as it is, and notes in which micro-batch it was made."""

    def __init__(self):
        self.micro_batch = 0
        self.made: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]):
        self.made.append(self.micro_batch)
        return graph.forward


@pytest.fixture
def graphs(monkeypatch):
    graphs, usual = Graphs(), fused.for_any_length()
    monkeypatch.setattr(fused, "for_any_length", lambda: usual | {"backend": graphs})
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


def run_through(model: HybridModel, graphs: Graphs) -> None:
    """Micro-batches that differ in all their lengths, by turns with gradients and without."""
    numbers_of_segments = set()
    for graphs.micro_batch in range(12):
        number = graphs.micro_batch // 2
        batch = lay_out(random_items(seed=number, num_items=4 + number % 5), "shared_prefix")
        numbers_of_segments.add(len(batch.segments.q_lengths))
        with torch.set_grad_enabled(graphs.micro_batch % 2 == 0):
            scores = model(batch)
        if scores.reward.requires_grad:
            (scores.reward.sum() + scores.logprob.sum()).backward()
    assert len(numbers_of_segments) == 5


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")  # of the signature's reader
@pytest.mark.parametrize(
    ("family", "kernel", "checkpointing", "most"),
    # With gradients and without; qwen2 and gemma2 have two kinds of layers. What recomputes lets the embeddings have
    # gradients, so that the first layer's input differs where there are none.
    [
        ("llama", "varlen", False, 2),
        ("llama", "fa2", True, 3),
        ("qwen2", "varlen", False, 4),
        ("gemma2", "fa2", True, 5),
    ],
)
def test_all_layers_of_a_kind_share_a_graph(stand_ins, graphs, family, kernel, checkpointing, most):
    model = tiny_hybrid(family, num_hidden_layers=4)
    model.layout = "shared_prefix"
    model.causal_lm.set_attn_implementation(KERNELS[kernel].implementation)
    set_gradient_checkpointing(model.causal_lm, checkpointing)
    model.use_fused("compile_layers", torch.device("cpu"))
    run_through(model, graphs)
    assert 0 < len(graphs.made) <= most, f"graphs were made in micro-batches {graphs.made}"
    assert max(graphs.made) < 2, f"graphs were made in micro-batches {graphs.made}"


def test_graphs_end_at_a_kernel_that_cannot_be_traced(graphs):
    model = tiny_hybrid("llama")
    model.layout = "shared_prefix"
    model.causal_lm.set_attn_implementation(KERNELS["segmented"].implementation)
    model.use_fused("compile_layers", torch.device("cpu"))
    run_through(model, graphs)
    # Before and behind it, in the layer, its attention and the function around the kernel.
    assert len(graphs.made) <= 2 * 6, f"graphs were made in micro-batches {graphs.made}"
    assert max(graphs.made) < 2, f"graphs were made in micro-batches {graphs.made}"


@pytest.mark.parametrize("family", ["qwen3-tied", "cohere", "phi3"])
def test_compiled_functions_settle_in_the_first_micro_batches(graphs, family):
    model = tiny_hybrid(family, num_hidden_layers=4)
    use_layout(model, "shared_prefix")
    model.use_fused("compile", torch.device("cpu"))
    run_through(model, graphs)
    # A norm of states, one of heads, a rotation and a gate, with gradients and without.
    assert 0 < len(graphs.made) <= 2 * 4, f"graphs were made in micro-batches {graphs.made}"
    assert max(graphs.made) < 2, f"graphs were made in micro-batches {graphs.made}"
