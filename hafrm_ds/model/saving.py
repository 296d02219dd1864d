"""Saving a hybrid model as a Hugging Face folder, one parameter at a time.

No rank ever holds a whole copy of the model: each parameter is gathered, written by rank 0 and dropped, and a file is
closed when it is full.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import hafrm_ds
from hafrm_ds.capacity import full_numel, full_shape
from hafrm_ds.model.hybrid import HybridModel

MAX_SHARD_BYTES = 2 * 2**30
REWARD_HEAD_FILE = "reward_head.safetensors"
METADATA_FILE = "hafrm.json"

Gather = Callable[[Iterable[nn.Parameter]], AbstractContextManager]


def save_hybrid_model(
    model: HybridModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    gathered: Gather,
    is_writer: bool,
    metadata: dict,
) -> None:
    """Write the policy as a causal-LM folder, with reward_head.safetensors and hafrm.json beside it.

    The folder appears whole or not at all: it is written under another name and renamed.

    Args:
        tokenizer: with the chat template that the model was trained on.
        gathered: context in which given parameters are whole on every rank (`Engine.gathered`). All ranks call this
            function together.
        is_writer: True on the one rank that writes.
        metadata: content of hafrm.json.
    """
    draft = folder.with_name(f"{folder.name}.incomplete")
    if is_writer:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    causal_lm = model.causal_lm
    # named_parameters leaves out the second name of tied weights, as the format wants it.
    tensors = dict(causal_lm.named_parameters()) | persistent_buffers(causal_lm)
    write_sharded(tensors, draft, gathered, is_writer)
    with gathered(model.reward_head.parameters()):
        if is_writer:
            head = {name: owned(value) for name, value in model.reward_head.named_parameters()}
            for name, value in model.reward_head.named_parameters():
                check_whole(f"reward head {name}", head[name], value)
            save_file(head, draft / REWARD_HEAD_FILE, metadata={"format": "pt"})
    if not is_writer:
        return
    causal_lm.config.architectures = [type(causal_lm).__name__]
    causal_lm.config.save_pretrained(draft)
    if causal_lm.can_generate():
        causal_lm.generation_config.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    (draft / METADATA_FILE).write_text(
        json.dumps({"hafrm_ds": hafrm_ds.__version__, **metadata}, indent=2, ensure_ascii=False) + "\n"
    )
    readable = (draft / METADATA_FILE).stat().st_mode
    for file in draft.iterdir():
        file.chmod(readable)  # safetensors leaves its files to their owner alone
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    saved = module.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in saved}


def owned(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU that shares memory with nothing."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def check_whole(name: str, copy: Tensor, original: Tensor) -> None:
    """A parameter that was not gathered has no elements under ZeRO-3: better no folder than one of empty tensors."""
    if copy.shape != full_shape(original):
        raise RuntimeError(f"{name} has the shape {tuple(copy.shape)} instead of {full_shape(original)}: not gathered")


def write_sharded(tensors: dict[str, Tensor], folder: Path, gathered: Gather, is_writer: bool) -> None:
    """Write tensors into model.safetensors, or into numbered files with an index when they exceed MAX_SHARD_BYTES."""
    shards = plan_shards({name: full_numel(value) * value.element_size() for name, value in tensors.items()})
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    total = 0
    for file_name, members in zip(names, shards, strict=True):
        content = {}
        for name in members:
            with gathered([tensors[name]] if isinstance(tensors[name], nn.Parameter) else []):
                if is_writer:
                    content[name] = owned(tensors[name])
                    check_whole(name, content[name], tensors[name])
        if is_writer:
            total += sum(value.nbytes for value in content.values())
            save_file(content, folder / file_name, metadata={"format": "pt"})
    if is_writer and len(shards) > 1:
        weight_map = {name: file for file, members in zip(names, shards, strict=True) for name in members}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def plan_shards(sizes: dict[str, int]) -> list[list[str]]:
    """Names in files of at most MAX_SHARD_BYTES, in order; a larger tensor has a file of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > MAX_SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards
