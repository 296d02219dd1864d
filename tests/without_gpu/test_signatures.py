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
from tests.without_gpu.package_index import floors, published, requirements

FIRST = "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
FA3 = (
    f"{FIRST}, seqused_q=None, seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, "
    "k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, "
    "pack_gqa=None, deterministic=False, sm_margin=0"
)
FA4 = (
    "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, "
    "seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False, "
    "window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, "
    "score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, "
    "return_lse=False"
)
PUBLISHED = {
    "flash-attn 2.6.3 to 2.8.3": f"{FIRST}, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), "
    "softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None",
    "flash-attn-3 beside flash-attn 2.8.3": FA3,
    "flash-attn-3 later": f"{FA3}, return_attn_probs=False",
    "flash-attn-4 4.0.0b22": FA4,
    "flash-attn-4 4.0.0b36": f"{FA4}, scheduler_metadata=None, seqlen_k_per_split=None, "
    "disable_scheduler_metadata=False, gather_bwd_recompute_p=False, gather_bwd_token_chunk=None",
}
"""Of flash_attn_varlen_func, as SOURCES has it; the later flash-attn-3 is in no package, but in the repository
Dao-AILab/flash-attention, hopper/flash_attn_interface.py."""
SOURCES = [
    ("flash-attn 2.6.3 to 2.8.3", "flash-attn==2.6.3", "flash_attn/flash_attn_interface.py"),
    ("flash-attn 2.6.3 to 2.8.3", "flash-attn==2.8.3.post2", "flash_attn/flash_attn_interface.py"),
    ("flash-attn-3 beside flash-attn 2.8.3", "flash-attn==2.8.3.post2", "hopper/flash_attn_interface.py"),
    ("flash-attn-4 4.0.0b22", f"flash-attn-4=={floors('cuda')['flash-attn-4']}", "flash_attn/cute/interface.py"),
    ("flash-attn-4 4.0.0b36", "flash-attn-4==4.0.0b36", "flash_attn/cute/interface.py"),
]
NEWEST = ("flash-attn-4 4.0.0b36", str(requirements("cuda")["flash-attn-4"]), "flash_attn/cute/interface.py")
TORCH_FIRST = "query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, "
TORCH_VARLEN = {
    "torch 2.11": f"{TORCH_FIRST}window_size=(-1, -1)",
    "torch 2.12 to 2.15": f"{TORCH_FIRST}window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, "
    "num_splits=None",
}
"""Of torch.nn.attention.varlen.varlen_attn, read in the wheels of 2.11.0, 2.12.0, 2.13.0 and 2.15.0."""
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


@pytest.mark.parametrize("version", TORCH_VARLEN)
def test_torch_varlen_binds(monkeypatch, version):
    package = ModuleType("torch.nn.attention.varlen")
    scope: dict = {"seen": {}}
    exec(f"def varlen_attn({TORCH_VARLEN[version]}):\n    seen.update(locals())\n    return query", scope)
    package.varlen_attn = scope["varlen_attn"]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    segments = lay_out(random_items(seed=0), "shared_prefix").segments
    query, key = (
        torch.zeros(sum(lengths), heads, 8) for lengths, heads in ((segments.q_lengths, 4), (segments.k_lengths, 2))
    )
    assert attention.run_varlen(query, key, key, segments, RULES["plain"]) is query
    groups = True if "enable_gqa" in TORCH_VARLEN[version] else "none"
    assert (scope["seen"]["window_size"], scope["seen"].get("enable_gqa", "none")) == ((-1, 0), groups)


# ---- the signatures are those that were published ------------------------------------------------------------------


def signature_in(text: str, name: str) -> str:
    """The parameters of a function in this source, without annotations."""
    (function,) = (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == name)
    arguments = function.args
    for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        each.annotation = None
    return ast.unparse(arguments)


def test_the_installed_torch_has_a_signature_that_is_known():
    source = Path(torch.__file__).parent / "nn/attention/varlen.py"
    assert signature_in(source.read_text(), "varlen_attn") in TORCH_VARLEN.values()


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("packages")


@pytest.mark.index
@pytest.mark.slow
@pytest.mark.parametrize(("name", "requirement", "path"), SOURCES, ids=[f"{each[1]} {each[2]}" for each in SOURCES])
def test_a_published_signature_is_as_written_here(packages, name, requirement, path):
    text = published(packages, requirement, path, is_source=requirement.startswith("flash-attn=="))
    assert signature_in(text, "flash_attn_varlen_func") == PUBLISHED[name]


@pytest.mark.index
@pytest.mark.slow
def test_the_newest_flash_attention_4_only_adds_to_what_is_known(packages):
    name, requirement, path = NEWEST
    assert signature_in(published(packages, requirement, path), "flash_attn_varlen_func").startswith(PUBLISHED[name])
