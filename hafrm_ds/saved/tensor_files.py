"""Safetensors files written as a stream: the header first, then one tensor after another.

A file is 8 bytes with the length of its header (little-endian), the header in JSON (name -> dtype, shape and where its
bytes lie) and the raw bytes. Shapes are known before any value is at hand, so no file is ever collected in memory.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hafrm_ds.engine.shapes import full_shape
from hafrm_ds.errors import ModelError

MAX_SHARD_BYTES = 2 * 2**30
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
READ_CHUNK = 2**22

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


def tensors_of(
    module: nn.Module, gathered: Gather = lambda parameters: nullcontext(), prefix: str = ""
) -> dict[str, TensorSource]:
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
        prefix + name: TensorSource(full_shape(parameter), parameter.dtype, whole(parameter))
        for name, parameter in module.named_parameters()
    }
    saved = module.state_dict(keep_vars=True).keys()
    return tensors | {
        prefix + name: TensorSource.of(buffer) for name, buffer in module.named_buffers() if name in saved
    }


def write_sharded(tensors: dict[str, TensorSource], folder: Path, is_writer: bool = True) -> None:
    """Write tensors into model.safetensors, or into numbered files with an index when they exceed MAX_SHARD_BYTES.

    Args:
        is_writer: False on ranks that only take part in opening the tensors.

    Raises:
        ModelError: what is read back from the disk is not what was written.
    """
    shards = plan_shards({name: source.num_bytes for name, source in tensors.items()})
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file_name, members in zip(names, shards, strict=True):
        write_tensors({name: tensors[name] for name in members}, folder / file_name, is_writer)
    if is_writer and len(shards) > 1:
        weight_map = {name: file for file, members in zip(names, shards, strict=True) for name in members}
        total_size = sum(source.num_bytes for source in tensors.values())
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
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


def write_tensors(tensors: dict[str, TensorSource], file: Path, is_writer: bool = True) -> None:
    """Write one file, a tensor at a time, and read it back. Arguments and errors as for `write_sharded`."""
    # Wide types first, as readers map tensors where they lie: each then begins at a multiple of its item size.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    checksums = {}
    with file.open("wb") if is_writer else nullcontext() as output:
        if is_writer:
            output.write(header_of(tensors))
        for name, source in tensors.items():
            with source.open() as tensor:
                if not is_writer:
                    continue
                if tuple(tensor.shape) != source.shape or tensor.dtype != source.dtype:
                    raise RuntimeError(
                        f"{name} has the shape {tuple(tensor.shape)} instead of {source.shape} ({tensor.dtype}, "
                        f"{source.dtype}): not gathered"
                    )
                content = raw_bytes(tensor)
                checksums[name] = zlib.crc32(content)
                output.write(content)
        if is_writer:
            output.flush()
            os.fsync(output.fileno())
    if is_writer:
        check_file(file, tensors, checksums)


def header_of(tensors: dict[str, TensorSource]) -> bytes:
    content: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, source in tensors.items():
        end = start + source.num_bytes
        content[name] = {
            "dtype": DTYPE_NAMES[source.dtype],
            "shape": list(source.shape),
            "data_offsets": [start, end],
        }
        start = end
    header = json.dumps(content, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def raw_bytes(tensor: Tensor) -> np.ndarray:
    """[bytes] uint8; a view of the tensor's memory where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def check_file(file: Path, tensors: dict[str, TensorSource], checksums: dict[str, int]) -> None:
    """Compare a file on disk with the tensors that went into it: names, shapes, dtypes and every byte.

    The bytes are read in pieces, not mapped: the file never stands in memory as a whole.

    Raises:
        ModelError: naming the file and the tensor.
    """
    try:
        with safe_open(file, framework="pt") as content:  # the format's own library checks the header
            slices = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118 (no mapping)
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except SafetensorError as error:
        raise ModelError(f"{file} was written but cannot be read back: {error}") from error
    expected = {name: (source.shape, DTYPE_NAMES[source.dtype]) for name, source in tensors.items()}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ModelError(f"{file} holds other tensors than were written: {', '.join(wrong[:5])}")
    with file.open("rb") as handle:
        header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        for name in tensors:  # in the order in which they lie
            start, end = header[name]["data_offsets"]
            checksum, left = 0, end - start
            while left and (part := handle.read(min(left, READ_CHUNK))):
                checksum, left = zlib.crc32(part, checksum), left - len(part)
            if left or checksum != checksums[name]:
                raise ModelError(f"{file}: {name} reads back otherwise than it was written; is the disk sound?")
