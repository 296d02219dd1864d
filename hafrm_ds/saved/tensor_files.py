"""Safetensors files of tensors that are not at hand yet: gathered one by one, held a shard at a time, read back."""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from hafrm_ds.engine.shapes import full_shape
from hafrm_ds.errors import ModelError
from hafrm_ds.model.experts import expert_layers

MAX_SHARD_BYTES = 2 * 2**30
"""The writing rank holds so much of a model at once; a larger tensor has a file of its own."""

Gather = Callable[[Iterable[nn.Parameter]], AbstractContextManager]
"""Context in which the given parameters are whole on every rank; all ranks enter it together."""


@dataclass(frozen=True)
class TensorSource:
    """A tensor that is not at hand yet. `open` gives it whole, for as long as its context lasts."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    open: Callable[[], AbstractContextManager[Tensor]]

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSource":
        return cls(tuple(tensor.shape), tensor.dtype, lambda: nullcontext(tensor))

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def tensors_of(module: nn.Module, gathered: Gather = lambda parameters: nullcontext()) -> dict[str, TensorSource]:
    """What a folder holds of a module: its parameters, each gathered when it is opened, and its persistent buffers.

    named_parameters leaves out the second name of tied weights, as the format wants it.
    """

    def whole(parameter: nn.Parameter) -> Callable[[], AbstractContextManager[Tensor]]:
        @contextmanager
        def opened() -> Iterator[Tensor]:
            with gathered([parameter]):
                yield parameter.detach()

        return opened

    tensors = {
        name: TensorSource(full_shape(parameter), parameter.dtype, whole(parameter))
        for name, parameter in module.named_parameters()
    }
    saved = module.state_dict(keep_vars=True).keys()
    return tensors | {name: TensorSource.of(buffer) for name, buffer in module.named_buffers() if name in saved}


Publish = Callable[[str, Tensor], dict[str, Tensor]]
"""What a file holds of a tensor, by name."""


def as_it_is(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return {name: tensor}


def publisher(causal_lm: PreTrainedModel) -> Publish:
    """How the tensors of a model are written: each expert of a mixture by itself, under the names that its family was
    published with, as transformers 5 alone has them stacked in memory."""
    if not expert_layers(causal_lm, full_shape):
        return as_it_is
    return lambda name, tensor: revert_weight_conversion(causal_lm, {name: tensor})


def write_sharded(
    tensors: dict[str, TensorSource], folder: Path, is_writer: bool = True, publish: Publish = as_it_is
) -> None:
    """Write tensors into model.safetensors, or into numbered files with an index when they exceed MAX_SHARD_BYTES.

    Args:
        is_writer: False on ranks that only take part in opening the tensors.

    Raises:
        ModelError: a file cannot be written, or what is read back from the disk is not what was written.
    """
    plan = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda source: source.num_bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_SHARD_BYTES,
    )
    weight_map: dict[str, str] = {}
    for file_name, members in plan.filename_to_tensors.items():
        written = write_tensors({name: tensors[name] for name in members}, folder / file_name, is_writer, publish)
        weight_map |= dict.fromkeys(written, file_name)
    if is_writer and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_tensors(
    tensors: dict[str, TensorSource], file: Path, is_writer: bool = True, publish: Publish = as_it_is
) -> list[str]:
    """Write one file and read it back; one tensor is open at a time. Arguments and errors as for `write_sharded`.

    Returns:
        The names in the file, on the rank that writes.
    """
    held: dict[str, Tensor] = {}
    for name, source in tensors.items():
        with source.open() as tensor:
            if not is_writer:
                continue
            if tuple(tensor.shape) != source.shape or tensor.dtype != source.dtype:
                raise RuntimeError(
                    f"{name} has the shape {tuple(tensor.shape)} instead of {source.shape} ({tensor.dtype}, "
                    f"{source.dtype}): not gathered"
                )
            # A copy: what is gathered goes again, and parameters may be views of one buffer, which the format refuses.
            copied = publish(name, tensor.detach().to("cpu", copy=True))
            held |= {published: part.contiguous() for published, part in copied.items()}
    names = list(held)
    if is_writer:
        try:
            file.touch()
            mode = file.stat().st_mode
            save_file(held, file, metadata={"format": "pt"})
            file.chmod(mode)  # safetensors lets nobody but the owner read it
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} cannot be written: {error}") from error
        checksums = {name: checksum(tensor) for name, tensor in held.items()}
        held.clear()  # before the file is mapped: one of the two stands in memory at a time
        check_file(file, checksums)
    return names


def checksum(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype, int]:
    """Shape, dtype and CRC-32 of the bytes of a tensor on the CPU."""
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return tuple(tensor.shape), tensor.dtype, zlib.crc32(content)


def check_file(file: Path, expected: dict[str, tuple[tuple[int, ...], torch.dtype, int]]) -> None:
    """Compare a file on disk with the tensors that went into it: names, shapes, dtypes and every byte.

    Args:
        expected: name -> `checksum`.

    Raises:
        ModelError: naming the file and the tensor.
    """
    try:
        with safe_open(file, framework="pt") as content:
            names = set(content.keys())
            if names != expected.keys():
                wrong = sorted(names ^ expected.keys())
                raise ModelError(f"{file} holds other tensors than were written: {', '.join(wrong[:5])}")
            for name in names:  # mapped into memory one by one
                if checksum(content.get_tensor(name)) != expected[name]:
                    raise ModelError(f"{file}: {name} reads back otherwise than it was written; is the disk sound?")
    except SafetensorError as error:
        raise ModelError(f"{file} was written but cannot be read back: {error}") from error
