"""What backward recomputes: gradients stay as they are, and what is kept is not computed twice."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hafrm_ds.data.packing import lay_out
from hafrm_ds.errors import ModelError
from hafrm_ds.hardware.flops import ForwardCost
from hafrm_ds.model import recomputation
from hafrm_ds.model.attention import KERNELS
from hafrm_ds.model.hybrid import HybridModel
from hafrm_ds.model.lora import add_adapters
from hafrm_ds.model.recomputation import recomputed_layers, set_gradient_checkpointing
from tests.model.test_hybrid import run
from tests.model.test_lora import options, randomize
from tests.tiny_models import EXPERTS, FAMILIES, random_items, tiny_hybrid

KINDS = ["selective", "every_2", True]
ITEMS = random_items(seed=1)
META = torch.device("meta")


def assert_equal_gradients(model: HybridModel, layout: str, kind: bool | str) -> None:
    """Bit for bit: on a CPU every operation gives the same each time."""
    set_gradient_checkpointing(model.causal_lm, False)
    *scores, gradients = run(model, ITEMS, layout)
    set_gradient_checkpointing(model.causal_lm, kind)
    *again, found = run(model, ITEMS, layout)
    assert all(map(torch.equal, again, scores))
    assert found.keys() == gradients.keys()
    assert [name for name in found if not torch.equal(found[name], gradients[name])] == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_without_recomputation(family, kind):
    for layout in ("shared_prefix", "padded"):
        assert_equal_gradients(tiny_hybrid(family), layout, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", EXPERTS)
def test_gradients_of_experts(family, kind):
    if (family, kind) == ("gpt-oss", "selective"):
        pytest.skip("its experts add their bias in place")
    assert_equal_gradients(tiny_hybrid(family), "padded" if family == "gpt-oss" else "shared_prefix", kind)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_adapters_in_bfloat16(kind):
    model = tiny_hybrid("llama").bfloat16()
    add_adapters(model.causal_lm, options(), seed=0)
    randomize(model)
    assert_equal_gradients(model, "shared_prefix", kind)


def test_products_and_attention_are_computed_once_and_count_once():
    model = tiny_hybrid("llama", num_hidden_layers=3)
    cost, batch = ForwardCost.of(model.causal_lm), lay_out(ITEMS, "shared_prefix")
    flops, useful = {}, set()
    for kind in (False, *KINDS):
        set_gradient_checkpointing(model.causal_lm, kind)
        with FlopCounterMode(display=False) as counter:
            run(model, ITEMS, "shared_prefix")
        flops[kind] = counter.get_total_flops()
        useful.add(ForwardCost.of(model.causal_lm).training_flops(batch, with_logprob=True))
    body, _, _ = cost.parts(batch, with_logprob=True)
    assert flops["selective"] == flops[False]
    # torch does not count the attention of CPUs. The last product of a layer is asked for by nobody.
    last = 2 * 32 * 48 * batch.num_positions
    for kind in ("every_2", True):
        layers = recomputed_layers(kind, 3)
        assert flops[kind] - flops[False] == layers / 3 * body - layers * last
    assert (recomputed_layers("every_2", 3), recomputed_layers(True, 3), recomputed_layers("selective", 3)) == (2, 3, 0)
    assert len(useful) == 1, "what is recomputed is of no use: MFU does not count it"


class Operations(TorchDispatchMode):
    """Counts operations by their names."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name] += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("kind", "times"), [(False, 1), ("selective", 1), (True, 2)])
def test_torch_s_attention_for_gpus_runs_once(kind, times):
    model = tiny_hybrid("llama").to(META)
    model.layout = "shared_prefix"
    model.causal_lm.set_attn_implementation(KERNELS["varlen"].implementation)
    set_gradient_checkpointing(model.causal_lm, kind)
    with Operations() as operations:
        model(lay_out(ITEMS, "shared_prefix").to(META)).reward.sum().backward()
    assert operations.counts["torch_attn::_varlen_attn"] == 2 * times


@pytest.mark.parametrize(
    "name",
    ["flash_attn::_flash_attn_varlen_forward", "flash_attn_3::_flash_attn_forward"],
)
def test_attention_of_the_packages_is_kept(name):
    library = torch.library.Library(name.split("::")[0], "FRAGMENT")
    library.define(f"{name.split('::')[1]}_here(Tensor q) -> Tensor")
    operation = getattr(getattr(torch.ops, name.split("::")[0]), f"{name.split('::')[1]}_here").default
    assert recomputation.is_kept(operation, (torch.ones(1),))


def test_what_is_kept_are_operations_of_this_torch():
    known = {schema.name for schema in torch._C._jit_get_all_schemas()}
    ours = [name for name in (*recomputation.PRODUCTS, *recomputation.BATCHED_PRODUCTS) if name.startswith("aten::")]
    assert known.issuperset(ours)
    assert all(any(name.startswith(start) for name in known) for start in recomputation.ATTENTION)


def test_scores_of_attention_are_not_kept():
    queries, keys = torch.ones(4, 100, 8), torch.ones(4, 8, 100)
    assert not recomputation.is_kept(torch.ops.aten.bmm.default, (queries, keys))
    assert recomputation.is_kept(torch.ops.aten.bmm.default, (torch.ones(4, 100, 100), torch.ones(4, 100, 8)))


def test_a_product_that_is_changed_in_place_is_found():
    """transformers adds the bias of experts so."""
    model = tiny_hybrid("gpt-oss")
    set_gradient_checkpointing(model.causal_lm, "selective")
    with pytest.raises(ModelError, match=r"changes a product in place \(aten::add_\).*; set it to true"):
        run(model, ITEMS, "padded")


def test_every_n_th_layer():
    model = tiny_hybrid("llama", num_hidden_layers=7).causal_lm
    for kind, expected in (("every_3", [0, 3, 6]), ("every_2", [0, 2, 4, 6]), (True, [*range(7)]), (False, [])):
        set_gradient_checkpointing(model, kind)
        assert [n for n, layer in enumerate(model.model.layers) if layer.gradient_checkpointing] == expected


def test_layers_of_another_make_are_recomputed_as_a_whole_or_not_at_all():
    other = SimpleNamespace(modules=lambda: iter(()), gradient_checkpointing_enable=lambda options: None)
    set_gradient_checkpointing(other, True)
    with pytest.raises(ModelError, match="gradient_checkpointing is selective, but the layers of"):
        set_gradient_checkpointing(other, "selective")
