"""A finished reward model as the start of a training: whether its head is taken over, and what is refused.

A folder of ours (final/) holds a causal LM and a reward head beside it. A sequence-classification folder holds the body
and a score; loaded as a causal LM it would lose the score without a word.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig

from hafrm_ds.config import ModelConfig
from hafrm_ds.errors import ModelError

REWARD_HEAD_FILE = "reward_head.safetensors"
ATTRIBUTE_HEAD_FILE = "attribute_head.safetensors"
"""The heads of a model of ours, beside the files of its causal LM; the second where it has attributes."""
SCORE_NAMES = ("score.weight", "classifier.weight", "v_head.summary.weight", "reward_head.weight")
"""The head of a sequence-classification model has one of these names, behind any prefix."""


def check_start(config: ModelConfig, folder: Path, stock: PretrainedConfig) -> str:
    """See that a model can be a start and that no head of it is lost unseen, before its weights are loaded.

    Args:
        folder: where the model lies. stock: its config.

    Returns:
        A warning, or "".

    Raises:
        ModelError: with what to do.
    """
    name = config.name_or_path
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"model.name_or_path {name!r} holds an adapter, not a whole model: start from the final/ folder of that "
            "training, in which it is merged"
        )
    kind = (getattr(stock, "architectures", None) or [""])[0]
    is_wanted = config.reward_head_init == "from_model"
    if kind.endswith("ForSequenceClassification"):
        if stock.num_labels != 1:
            raise ModelError(
                f"model.name_or_path {name!r} is a {kind} with {stock.num_labels} labels: no reward model, and no "
                "causal LM to start from"
            )
        if not stock.get_text_config().tie_word_embeddings:
            raise ModelError(
                f"model.name_or_path {name!r} is a {kind}: it has a score and no LM head (lm_head.weight), so it has "
                "no policy to train or to compare with. Start from the causal LM that it was made from; of a training "
                "with hafrm_ds, from its final/ folder, which has both heads"
            )
        if not is_wanted:
            raise ModelError(
                f"model.name_or_path {name!r} is a finished reward model ({kind}), whose score would be lost: set "
                "--model.reward_head_init from_model to start from its body and its score, or start from the causal LM "
                "that it was made from"
            )
    head = reward_head_of(folder)
    if is_wanted and head is None:
        raise ModelError(
            f"model.reward_head_init is from_model, but {name!r} has no reward head (neither {REWARD_HEAD_FILE} nor a "
            "score in its safetensors): set it to normal or zero"
        )
    if is_wanted and head is not None and "bias" in head and not config.reward_head_bias:
        raise ModelError(f"the reward head of {name!r} has a bias: set --model.reward_head_bias true to take it over")
    if head is not None and not is_wanted:
        return (
            f"{name} has a reward head of its own, which is not used: the reward head starts anew "
            f"({config.reward_head_init}). --model.reward_head_init from_model takes it over"
        )
    return ""


def reward_head_of(folder: Path) -> dict[str, Tensor] | None:
    """weight [1, H], and bias [1] if there is one, of the reward head that a folder holds; None without one."""
    file = folder / REWARD_HEAD_FILE
    if file.is_file():
        return {name: tensor for name in ("weight", "bias") if (tensor := tensor_of(file, name)) is not None}
    for name, file in names_in(folder):
        if any(name == known or name.endswith(f".{known}") for known in SCORE_NAMES):
            tensors = {"weight": tensor_of(file, name), "bias": tensor_of(file, name.removesuffix("weight") + "bias")}
            found = {key: tensor for key, tensor in tensors.items() if tensor is not None}
            return found if found["weight"].dim() == 2 and len(found["weight"]) == 1 else None
    return None


def names_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names of the tensors in the safetensors files of a model, each with its file."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        yield from ((name, folder / file) for name, file in json.loads(index.read_text())["weight_map"].items())
    elif (folder / "model.safetensors").is_file():
        file = folder / "model.safetensors"
        with opened(file) as tensors:
            names = tensors.keys()
            yield from ((name, file) for name in names)


def tensor_of(file: Path, name: str) -> Tensor | None:
    with opened(file) as tensors:
        names = tensors.keys()
        return tensors.get_tensor(name) if name in names else None


def opened(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
