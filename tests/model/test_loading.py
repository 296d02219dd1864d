"""What `load_hybrid_model` makes of a folder, and what it refuses."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from hafrm_ds.config import ModelConfig
from hafrm_ds.errors import ModelError
from hafrm_ds.model import loading
from hafrm_ds.model.hybrid import HybridModel
from hafrm_ds.model.loading import load_tokenizer
from tests.tiny_models import save_tiny_model


def load_hybrid_model(config: ModelConfig, layout: str) -> HybridModel:
    return loading.load_hybrid_model(config, layout=layout, seed=0, device=torch.device("cpu"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_body_and_heads_have_one_dtype(dtype, tmp_path):
    """ZeRO-3 gathers parameters of one dtype at a time; the reward is fp32 by an upcast in the head's forward."""
    config = ModelConfig(name_or_path=str(save_tiny_model(tmp_path)), dtype=dtype, reward_head_bias=True)
    model = load_hybrid_model(config, layout="shared_prefix")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert model.causal_lm.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("family", "layout", "attention"),
    [
        ("llama", "shared_prefix", "hafrm_segmented"),
        ("llama", "packed", "hafrm_segmented"),
        ("llama", "padded", "sdpa"),
        ("gemma2", "padded", "eager"),  # sdpa would leave its soft cap out
    ],
)
def test_the_layout_decides_the_attention(family, layout, attention, tmp_path):
    config = ModelConfig(name_or_path=str(save_tiny_model(tmp_path, family)), dtype="float32")
    model = load_hybrid_model(config, layout=layout)
    assert model.causal_lm.config._attn_implementation == attention


def test_a_folder_without_a_model_is_named(tmp_path):
    config = ModelConfig(name_or_path=str(tmp_path))
    for load in (load_tokenizer, lambda config: load_hybrid_model(config, layout="packed")):
        with pytest.raises(ModelError, match=str(tmp_path)):
            load(config)


def test_a_model_without_a_tokenizer_says_what_to_copy(tmp_path):
    folder = save_tiny_model(tmp_path, "llama")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer \(tokenizer\.json or .*copy its files"):
        load_tokenizer(ModelConfig(name_or_path=str(folder)))


def test_missing_weights_are_no_random_ones(tmp_path):
    config = ModelConfig(name_or_path=str(save_tiny_model(tmp_path, "llama")), dtype="float32")
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["lm_head.weight"], weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 2 parameters of LlamaForCausalLM: lm_head.weight, model.layers.1.mlp"):
        load_hybrid_model(config, layout="packed")


def test_a_damaged_weight_file_is_named(tmp_path):
    config = ModelConfig(name_or_path=str(save_tiny_model(tmp_path)), dtype="float32")
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ModelError, match=rf"{tmp_path}' cannot be loaded: .*header"):
        load_hybrid_model(config, layout="packed")
