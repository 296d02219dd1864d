"""Loading a causal LM and its tokenizer from the hub or a local folder."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from hafrm_ds.config import ModelConfig
from hafrm_ds.errors import ModelError
from hafrm_ds.model.attention import check_kernel
from hafrm_ds.model.hybrid import (
    HybridModel,
    RewardHead,
    check_log_probs,
    disable_dropout,
    make_attribute_head,
    make_reward_head,
)
from hafrm_ds.model.lora import check_packages, quantization
from hafrm_ds.model.recomputation import set_gradient_checkpointing
from hafrm_ds.model.reward_start import reward_head_of

OTHER_FORMATS = ["*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.tflite", "original/*"]
"""Files of a hub repository that no from_pretrained call reads."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def origin(config: ModelConfig) -> dict:
    """The arguments that every from_pretrained call shares."""
    return {
        "pretrained_model_name_or_path": config.name_or_path,
        "revision": config.revision,
        "trust_remote_code": config.trust_remote_code,
    }


def load_model_config(config: ModelConfig) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(**origin(config))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.name_or_path {config.name_or_path!r} cannot be loaded: {first_line(error)}") from error


def check_runnable(config: ModelConfig, layout: str, device: torch.device) -> None:
    """Raise ModelError, before a model or data is read, for an option whose package is missing or that this device
    cannot run.

    Args:
        layout: by the names of batch.layout; the padded one takes no kernel of ours.
    """
    check_packages(config.lora)
    if layout != "padded":
        check_kernel(config.attention, device)
    check_log_probs(config.log_probs, device)
    if config.fused not in ("auto", "off"):
        from hafrm_ds.model.fused import check_fused  # importing the families takes a while

        check_fused(config.fused, device)


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(**origin(config))
    except (OSError, ValueError, ImportError) as error:
        folder = Path(config.name_or_path)
        if folder.is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
            raise ModelError(
                f"{folder} has no tokenizer ({' or '.join(TOKENIZER_FILES)}): copy its files from the model that this "
                "one was made from, tokenizer_config.json among them"
            ) from error
        raise ModelError(
            f"no tokenizer could be loaded from model.name_or_path {config.name_or_path!r}: {first_line(error)}"
        ) from error
    # A sentencepiece model that could not be read gives an empty vocabulary instead of an error.
    if len(tokenizer) < 2:
        raise ModelError(f"the tokenizer of {config.name_or_path!r} has a vocabulary of {len(tokenizer)} tokens")
    return tokenizer


def fetch_model(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Bring a model of the hub into the local cache, weights and all, and load its tokenizer."""
    local_folder(config)
    return load_tokenizer(config)


def local_folder(config: ModelConfig) -> Path:
    """The folder of a local model, or the snapshot of one on the hub, fetched if it is not in the cache."""
    name = config.name_or_path
    if Path(name).is_dir():
        return Path(name)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:  # no hub id, whatever the hub would say of it
        raise ModelError(f"the model {name!r} is no local folder (model.name_or_path, or --model)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=config.revision, ignore_patterns=OTHER_FORMATS))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the model {name!r} is no local folder and cannot be fetched from the hub "
            f"(model.name_or_path, or --model): {first_line(error)}"
        ) from error


def load_hybrid_model(config: ModelConfig, *, layout: str, seed: int, device: torch.device) -> HybridModel:
    """The causal LM with fresh heads for reward and attributes, in the dtype of the run, dropout off, in train mode.

    It is loaded on the CPU, unless its weights are quantised; `device` is where it will run, which decides the
    attention kernel.

    Inside `engine.engine.sharded_loading` the weights are partitioned while they are read.
    """
    dtype = DTYPES[config.dtype]
    model_config = load_model_config(config)
    hidden_size = model_config.get_text_config().hidden_size
    head = make_reward_head(
        hidden_size, bias=config.reward_head_bias, init=config.reward_head_init, dtype=dtype, seed=seed
    )
    if config.reward_head_init == "from_model":
        take_over_head(head, config)
    attribute_head = make_attribute_head(hidden_size, config.attributes, dtype)
    options = {}
    if (how := quantization(config.lora, dtype)) is not None:
        options = {"quantization_config": how, "device_map": {"": device}}
    try:
        causal_lm, report = AutoModelForCausalLM.from_pretrained(
            **origin(config), config=model_config, dtype=dtype, output_loading_info=True, **options
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ModelError(f"model.name_or_path {config.name_or_path!r} cannot be loaded: {first_line(error)}") from error
    # transformers only warns, and continues with random values.
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"the weight files of model.name_or_path {config.name_or_path!r} lack {len(missing)} parameters of "
            f"{type(causal_lm).__name__}: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        )
    if causal_lm.get_output_embeddings() is None:
        raise ModelError(f"{type(causal_lm).__name__} has no language-model head")
    disable_dropout(causal_lm)
    causal_lm.train()
    if config.gradient_checkpointing:
        set_gradient_checkpointing(causal_lm, config.gradient_checkpointing)
    model = HybridModel(causal_lm, head, attribute_head)
    model.use_layout(layout, config.attention, device)
    model.use_log_probs(config.log_probs, device)
    model.use_fused(config.fused, device)
    return model


def take_over_head(head: RewardHead, config: ModelConfig) -> None:
    """Give a head the values of that in the model's folder. Raises ModelError if that has none that fits."""
    given = reward_head_of(local_folder(config))
    if given is None or given["weight"].shape != head.weight.shape or ("bias" in given and head.bias is None):
        raise ModelError(
            f"model.reward_head_init is from_model, but {config.name_or_path!r} has no reward head that fits"
        )
    with torch.no_grad():
        for name, values in given.items():
            getattr(head, name).copy_(values)


def first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
