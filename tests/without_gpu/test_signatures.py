"""The calls of the attention kernels bind to the published signatures of the packages that machines without a GPU
cannot import."""

import ast
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hafrm_ds.data.packing import lay_out
from hafrm_ds.model import attention
from hafrm_ds.model.attention import ScoreRule
from tests.tiny_models import random_items

FIRST = "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
PUBLISHED = {
    "flash-attn 2.6.3 to 2.8.3": f"{FIRST}, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), "
    "softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None",
    "flash-attn-3 2.8": f"{FIRST}, seqused_q=None, seqused_k=None, softmax_scale=None, causal=False, qv=None, "
    "q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, "
    "num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False",
    "flash-attn-4 4.0.0b22": "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, "
    "max_seqlen_k=None, min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, "
    "softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, "
    "pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, "
    "aux_tensors=None, aux_scalars=None, return_lse=False",
}
"""Of flash_attn_varlen_func. flash-attn-4 4.0.0b36 has more at the end, with defaults."""
RULES = {
    "plain": ScoreRule(scale=None, window=None, softcap=None),
    "all": ScoreRule(scale=0.3, window=4, softcap=2.0),
}


def call(monkeypatch: pytest.MonkeyPatch, signature: str, rule: ScoreRule) -> dict:
    """The arguments that a function of this signature gets."""
    scope: dict = {}
    exec(f"def flash_attn_varlen_func({signature}):\n    seen.update(locals())\n    return q", scope)
    scope["seen"] = {}
    package = ModuleType("published")
    package.flash_attn_varlen_func = scope["flash_attn_varlen_func"]
    monkeypatch.setitem(sys.modules, "published", package)
    segments = lay_out(random_items(seed=0), "shared_prefix").segments
    query = torch.zeros(sum(segments.q_lengths), 4, 8)
    key = torch.zeros(sum(segments.k_lengths), 2, 8)
    assert attention.run_flash_package("published", query, key, key, segments, rule) is query
    return scope["seen"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("package", PUBLISHED)
def test_a_call_binds(monkeypatch, package, rule):
    seen = call(monkeypatch, PUBLISHED[package], RULES[rule])
    assert seen["causal"] is True
    assert seen["max_seqlen_k"] >= seen["max_seqlen_q"] > 0 and isinstance(seen["max_seqlen_k"], int)
    assert {seen[name].dtype for name in ("cu_seqlens_q", "cu_seqlens_k")} == {torch.int32}
    if rule == "all":
        assert (seen["window_size"], seen["softcap"], seen["softmax_scale"]) == ((3, 0), 2.0, 0.3)


@pytest.mark.parametrize("package", PUBLISHED)
def test_deterministic_algorithms_reach_the_kernel(monkeypatch, package):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert call(monkeypatch, PUBLISHED[package], RULES["plain"])["deterministic"] is True


@pytest.mark.parametrize("groups", [True, False], ids=["torch 2.12 and later", "torch 2.11"])
def test_torch_varlen_binds(monkeypatch, groups):
    """By the parameters of torch's own source; before torch 2.12 without enable_gqa."""
    source = Path(torch.__file__).parent / "nn/attention/varlen.py"
    tree = ast.parse(source.read_text())
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "varlen_attn"]
    arguments = function.args
    kept = [
        (argument, default)
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        if groups or argument.arg != "enable_gqa"
    ]
    arguments.kwonlyargs, arguments.kw_defaults = [pair[0] for pair in kept], [pair[1] for pair in kept]
    for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        each.annotation = None
    seen: dict = {}
    scope = {"seen": seen}
    exec(f"def varlen_attn({ast.unparse(arguments)}):\n    seen.update(locals())\n    return query", scope)
    package = ModuleType("torch.nn.attention.varlen")
    package.varlen_attn = scope["varlen_attn"]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    segments = lay_out(random_items(seed=0), "shared_prefix").segments
    query, key = (
        torch.zeros(sum(lengths), heads, 8) for lengths, heads in ((segments.q_lengths, 4), (segments.k_lengths, 2))
    )
    assert attention.run_varlen(query, key, key, segments, RULES["plain"]) is query
    assert (seen["window_size"], seen.get("enable_gqa", "none")) == ((-1, 0), True if groups else "none")
