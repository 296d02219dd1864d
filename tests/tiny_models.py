"""Tiny random models of each architecture family, and random prompts with responses."""

import random
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hafrm_ds.data.comparisons import Comparisons
from hafrm_ds.data.packing import move
from hafrm_ds.data.pairs import OF_A_PAIR
from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.model.hybrid import HybridModel, disable_dropout, make_attribute_head, make_reward_head
from hafrm_ds.objective import bradley_terry_loss, dpo_loss

VOCABULARY = 120
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# Family -> config class and what differs from SHAPE. Windows are shorter than the test sequences, so that they matter.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "llama-tied": ("LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 6}),
    "qwen2": ("Qwen2Config", {**GROUPED, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3-tied": ("Qwen3Config", {**GROUPED, "head_dim": 8, "tie_word_embeddings": True}),
    "phi": ("PhiConfig", {}),
    "phi3": ("Phi3Config", {**GROUPED, "sliding_window": 6}),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "head_dim": 8, "sliding_window": 6}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "gpt-neox-tied": ("GPTNeoXConfig", {"tie_word_embeddings": True}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.1, "layerdrop": 0.1}),
    "cohere": ("CohereConfig", GROUPED),
    "granite": ("GraniteConfig", {**GROUPED, "logits_scaling": 4.0, "attention_multiplier": 0.3}),
}

STATE_SPACE: dict[str, tuple[str, dict[str, Any]]] = {"mamba": ("MambaConfig", {"state_size": 8})}
"""Not of the families: such a layer runs on from one packed answer into the next."""
MASKED_WINDOW: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {
            **GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "use_sliding_window": True,
            "sliding_window": 16,
        },
    )
}
"""Not of the families: its window is in its attention mask alone."""

TWO_OF_FOUR = {**GROUPED, "num_experts_per_tok": 2}
EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": ("Qwen3MoeConfig", {**TWO_OF_FOUR, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16}),
    "mixtral": ("MixtralConfig", {**TWO_OF_FOUR, "num_local_experts": 4}),
    "olmoe": ("OlmoeConfig", {**TWO_OF_FOUR, "num_experts": 4}),
    # Its attention has sinks, which the layouts without padding do not know.
    "gpt-oss": (
        "GptOssConfig",
        {**TWO_OF_FOUR, "head_dim": 8, "num_local_experts": 4, "sliding_window": 6, "rope_parameters": ROPE},
    ),
}
"""Mixtures of experts."""


def tiny_causal_lm(family: str, seed: int = 0, **shape) -> transformers.PreTrainedModel:
    """fp32, every parameter moved off its initial value, so that no bias is 0 and no norm is 1."""
    class_name, changes = (FAMILIES | STATE_SPACE | MASKED_WINDOW | EXPERTS)[family]
    config = getattr(transformers, class_name)(**{"tie_word_embeddings": False, **SHAPE, **changes, **shape})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def save_tiny_model(folder: Path, family: str = "llama-tied", **tokenizer_options) -> Path:
    """A folder as users have it: a tiny model and a byte-level tokenizer with a chat template."""
    from tests.tiny_tokenizers import byte_level_tokenizer

    tokenizer = byte_level_tokenizer(**tokenizer_options)
    tiny_causal_lm(family, vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_tiny_final(
    folder: Path,
    family: str = "llama-tied",
    dtype: torch.dtype = torch.float32,
    bias: bool = False,
    base: str | Path = "example/tiny",
    objective: dict[str, float] | None = None,
    attributes: Sequence[str] = (),
    **tokenizer_options,
) -> Path:
    """A folder as a training leaves it: a tiny model with a reward head of large weights, so that scores differ.

    Args:
        base: what it says that it was trained from. objective: options of its training, instead of HaF's.
        attributes: those that a head of it gives, of which the values of any two answers differ.
    """
    # Here, as tests/gpu takes models from this file where datasets and pyarrow are not installed.
    from hafrm_ds.data.formatting import ChatFormatter
    from hafrm_ds.saved.writing import save_hybrid_model
    from tests.tiny_tokenizers import byte_level_tokenizer

    formatter = ChatFormatter.create(byte_level_tokenizer(**tokenizer_options), None, "2024-07-26")
    causal_lm = tiny_causal_lm(family, vocab_size=len(formatter.tokenizer), max_position_embeddings=512).to(dtype)
    head = make_reward_head(32, bias=bias, init="normal", dtype=dtype, seed=0)
    attribute_head = make_attribute_head(32, attributes, dtype)
    if attribute_head is not None:
        for place, parameter in enumerate(attribute_head.parameters()):
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(place))
    model = HybridModel(causal_lm, head, attribute_head)
    use_layout(model, "shared_prefix")
    save_hybrid_model(
        model,
        formatter,
        folder,
        gathered=lambda parameters: nullcontext(),
        is_writer=True,
        metadata={
            "base": {"model": str(base), "license": "apache-2.0"},
            **({"attributes": list(attributes)} if attributes else {}),
            "training": {"steps": 3, "pairs": 24},
            "data": {"train": {"read": 30, "kept": 28, "dropped": 2, "cut": 1}},
            "evaluation": {"held_out": {"pairs": 8, "accuracy/reward": 0.75, "reward/mean": 0.5, "reward/std": 2.0}},
            "config": {"objective": objective or {"alpha": 0.2}},
        },
    )
    return folder


def tiny_hybrid(family: str, seed: int = 0, **shape) -> HybridModel:
    causal_lm = tiny_causal_lm(family, seed, **shape)
    disable_dropout(causal_lm)
    head = make_reward_head(32, bias=False, init="normal", dtype=torch.float32, seed=seed)
    return HybridModel(causal_lm.train(), head)


def use_layout(model: HybridModel, layout: str) -> None:
    """Choose the attention that a layout runs under on the CPU, as loading does."""
    model.use_layout(layout, "auto", torch.device("cpu"))


def random_items(
    seed: int, num_items: int = 4, num_responses: int = 2, prompt_lengths=(1, 5, 12), response_lengths=(1, 4, 9)
) -> list[PromptWithResponses]:
    source = random.Random(seed)

    def tokens(lengths) -> list[int]:
        return [source.randrange(3, VOCABULARY) for _ in range(source.choice(lengths))]

    return [
        PromptWithResponses(tokens(prompt_lengths), tuple(tokens(response_lengths) for _ in range(num_responses)))
        for _ in range(num_items)
    ]


def comparisons_of_pairs(num_pairs: int) -> Comparisons:
    """The comparisons of pairs whose answers stand as [chosen 0, rejected 0, chosen 1, rejected 1, ...]."""
    return Comparisons.of([(2, OF_A_PAIR)] * num_pairs)


def pair_losses(reward: Tensor, logprob: Tensor | None = None, reference: Tensor | None = None) -> Tensor:
    """[P] of pairs that lie one after another: the loss of Bradley and Terry, and that of DPO of log-probs."""
    pairs = move(comparisons_of_pairs(len(reward) // 2), reward.device)
    loss = bradley_terry_loss(reward, pairs, use_margin=False, label_smoothing=0.0)
    if logprob is None or reference is None:
        return loss
    return loss + dpo_loss(logprob, reference, pairs, beta=0.1)
