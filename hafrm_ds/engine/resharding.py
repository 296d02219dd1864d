"""Resuming with another number of processes, another ZeRO stage or other settings of it: the shards of a checkpoint,
dealt out anew, each rank reading only what it takes.

DeepSpeed splits fp32 weights and Adam's moments into flat pieces, one a rank and group: under stage 3 each parameter is
split, under stages 1 and 2 (and 1 in bfloat16, by another optimizer) the concatenation of all. DeepSpeed's universal
checkpoints are such shards merged by a conversion on disk; loading one overwrites the options of parameter groups,
shares one step count between them, and does not lead from stage 3 to 2 or back. Here the files are mapped into memory
and the part of each parameter that a rank takes is copied out of the pieces that hold it. So nothing is converted, no
rank joins a whole parameter, and any of the stages 1 to 3 follows any other.

Frozen parameters and buffers have not changed since the model was loaded: they are left as they are.
"""

import math
import os
import pickle
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hafrm_ds.engine.checkpoint import CheckpointError

MODEL_FILE = "mp_rank_00_model_states.pt"
"""The file of what is equal on all ranks under the stages 0 to 2."""
MOMENTS = ("exp_avg", "exp_avg_sq")
KEYS = ("fp32", *MOMENTS)
ROUND_ROBIN = (
    "with zero_optimization.round_robin_gradients DeepSpeed notes wrong places of what its shards hold, so that a "
    "checkpoint can be resumed only under the DeepSpeed JSON and on the number of processes that have written it"
)


@dataclass(frozen=True)
class Piece:
    """A part of one parameter, in the flat tensors that one rank has of one group: `numel` numbers from `start`, which
    are those of the parameter from `begin`."""

    rank: int
    group: int
    start: int
    numel: int
    begin: int


@dataclass(frozen=True)
class Layout:
    """Where the trained parameters of a checkpoint lie.

    pieces: parameter -> its pieces in order.
    """

    pieces: dict[str, list[Piece]]

    @classmethod
    def of_stage_3(cls, groups: Sequence[Mapping[str, Sequence[int]]], world_size: int) -> "Layout":
        """Each parameter lies on all ranks, which have equal shares of it; those of the last ranks are padded.

        Args:
            groups: the optimizer's groups: parameter -> shape.
        """
        pieces = {}
        for group, shapes in enumerate(groups):
            start = 0
            for name, shape in shapes.items():
                numel = math.prod(shape)
                share = math.ceil(numel / world_size)
                begins = [min(rank * share, numel) for rank in range(world_size)]
                pieces[name] = [
                    Piece(rank, group, start, min(share, numel - begin), begin) for rank, begin in enumerate(begins)
                ]
                start += share
        return cls(pieces)

    @classmethod
    def of_stages_1_and_2(cls, ranks: Sequence[Sequence[Mapping[str, Any]]]) -> "Layout":
        """Ranks have parts of all parameters laid end to end.

        Args:
            ranks: what each rank has of each group: parameter -> address, an object with `start` and `numel`.
        """
        layout = cls({})
        for rank, groups in enumerate(ranks):
            for group, addresses in enumerate(groups):
                for name, address in addresses.items():
                    begin = layout.numel(name) if name in layout.pieces else 0
                    piece = Piece(rank, group, address.start, address.numel, begin)
                    layout.pieces.setdefault(name, []).append(piece)
        return layout

    def numel(self, name: str) -> int:
        last = self.pieces[name][-1]
        return last.begin + last.numel

    def place(self, name: str) -> tuple[int, int, int]:
        """Say where the numbers of a parameter begin: (group, rank, start)."""
        first = self.pieces[name][0]
        return first.group, first.rank, first.start

    def parts(self, name: str, start: int, numel: int) -> Iterator[tuple[int, Piece]]:
        """Where `numel` numbers of a flat parameter from `start` lie: the part of each piece that holds some of them,
        with its place among them. There are none beyond the end of the parameter."""
        pieces = self.pieces[name]
        for place in range(max(0, bisect_right(pieces, start, key=attrgetter("begin")) - 1), len(pieces)):
            piece = pieces[place]
            first, last = max(start, piece.begin), min(start + numel, piece.begin + piece.numel)
            if first < last:
                part = replace(piece, start=piece.start + first - piece.begin, numel=last - first, begin=first)
                yield first - start, part
            elif piece.begin >= start + numel:
                return


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, of which parts are read.

    tensor: mapped. offset: of its first number in the file; None where the system does not tell.
    """

    path: Path
    tensor: Tensor
    offset: int | None

    @classmethod
    def of(cls, path: Path, tensor: Tensor) -> "StoredTensor":
        return cls(path, tensor.detach(), offset_in_file(path, tensor))

    def part(self, start: int, numel: int) -> Tensor:
        """A copy of `numel` numbers of the flat tensor from `start`. They are read from the file: a look into mapped
        memory reads what lies around as well, megabytes on some file systems, and page by page on others."""
        if self.offset is None:
            return self.tensor.view(-1)[start : start + numel].clone()
        found = torch.empty(numel, dtype=self.tensor.dtype)
        left = found.view(torch.uint8).numpy().data
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start * found.itemsize)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # nothing ahead of what is asked for
            while len(left):
                if not (size := file.readinto(left)):
                    raise CheckpointError(f"{self.path} has become shorter while it was read")
                left = left[size:]
        return found


def offset_in_file(path: Path, tensor: Tensor) -> int | None:
    """Where a tensor that torch.load has mapped lies in its file, in bytes; None if it is mapped from elsewhere."""
    address, inode = tensor.data_ptr(), path.stat().st_ino
    with open("/proc/self/maps") as mappings:
        for line in mappings:  # FIRST-LAST permissions offset device inode path
            bounds, _, offset, _, of_file, *_ = line.split()
            first, last = (int(bound, 16) for bound in bounds.split("-"))
            if first <= address < last:
                return address - first + int(offset, 16) if int(of_file) == inode else None
    return None


class Shards:
    """The trained parameters in a checkpoint of stage 1, 2 or 3, with Adam's moments. A file is opened when something
    of it is asked for, and only what is asked for is read.

    Args:
        folder: where DeepSpeed has saved.
        zero_stage, world_size: of the processes that saved.
    """

    def __init__(self, folder: Path, zero_stage: int, world_size: int):
        # Of functions and not of methods, which would hold this object, and with it the mapped files, in a circle.
        self.saved = cache(partial(saved_state, folder))
        self.flat = cache(partial(flat_tensors, self.saved, folder, zero_stage))
        if zero_stage == 3:
            self.layout = Layout.of_stage_3(read(file_of(folder, 0, "model"))["param_shapes"], world_size)
        else:
            saved = map(self.saved, range(world_size))
            self.layout = Layout.of_stages_1_and_2([each["param_slice_mappings"] for each in saved])
            names = [name for group in read(folder / MODEL_FILE)["param_shapes"] for name in group]  # as they lie
            if names != sorted(names, key=self.layout.place):
                raise CheckpointError(ROUND_ROBIN)

    def copy_into(self, target: Tensor, name: str, key: str, start: int) -> None:
        """Fill `target` with the numbers of a flat parameter, or one of its moments, from `start`; what lies beyond its
        end is left as it is."""
        for place, part in self.layout.parts(name, start, len(target)):
            numbers = self.flat(part.rank, part.group)[key].part(part.start, part.numel)
            target.narrow(0, place, part.numel).copy_(numbers)

    def first(self, name: str) -> dict[str, StoredTensor]:
        """The flat tensors in which a parameter begins."""
        piece = self.layout.pieces[name][0]
        return self.flat(piece.rank, piece.group)

    def step(self, name: str) -> float:
        """How many times Adam has updated the parameter."""
        return self.first(name)["step"].part(0, 1).item()


def saved_state(folder: Path, rank: int) -> dict:
    """Read the state that the optimizer of a rank has saved."""
    return read(file_of(folder, rank, "optim"))["optimizer_state_dict"]


def flat_tensors(
    saved_of: Callable[[int], dict], folder: Path, zero_stage: int, rank: int, group: int
) -> dict[str, StoredTensor]:
    """The flat tensors of a rank and group: what there is of fp32, Adam's moments and its count of steps, "step";
    another optimizer has none of the latter.

    Args:
        saved_of: rank -> `saved_state`.
    """
    saved, path = saved_of(rank), file_of(folder, rank, "optim")
    if zero_stage == 3:
        weights, states = saved["fp32_flat_groups"], saved["optimizer_state_dict"]["state"]
    else:
        weights, states = saved["single_partition_of_fp32_groups"], saved["base_optimizer_state"]["state"]
    state = {key: torch.as_tensor(states[group][key]) for key in (*MOMENTS, "step") if key in states[group]}
    return {key: StoredTensor.of(path, tensor) for key, tensor in ({"fp32": weights[group]} | state).items()}


def trained_weights(folder: Path, zero_stage: int, world_size: int) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every trained parameter of a checkpoint, one after another: in the dtype of the model, mapped;
    under stage 3 in fp32, flat.

    Args: as for `Shards`; here the stage may also be 0.
    """
    if zero_stage < 3:  # each rank has all of them, and rank 0 has saved them
        yield from read(folder / MODEL_FILE)["module"].items()
        return
    shards = Shards(folder, zero_stage, world_size)
    for name in shards.layout.pieces:
        whole = torch.empty(shards.layout.numel(name))
        shards.copy_into(whole, name, "fp32", 0)
        yield name, whole


def read(path: Path) -> dict:
    """Content of a file, mapped. Of what a pickle may hold only tensors, plain containers and the classes that
    DeepSpeed's optimizers put beside them are made.

    Raises:
        CheckpointError: it holds something else.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def stage_by_name(kind: Any, name: str) -> ZeroStageEnum:
        """In place of getattr, by which Python 3.11.0 to 3.11.3 pickle a member of an enum."""
        if kind is not ZeroStageEnum:
            raise pickle.UnpicklingError(f"an attribute {name} of {kind}")
        return ZeroStageEnum[name]

    known = [LossScaler, ZeroStageEnum, fragment_address, (stage_by_name, "builtins.getattr")]
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds something that DeepSpeed does not write: {error}") from error


def file_of(folder: Path, rank: int, kind: str) -> Path:
    (path,) = folder.glob(f"*zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt")
    return path


def is_laid_out_as(folder: Path, engine, zero_stage: int, rank: int) -> bool:
    """Whether a rank's numbers lie in a checkpoint of this stage and number of ranks as they do in DeepSpeed's engine.
    Settings of the stage (round_robin_gradients, parameter_alignment, sub_group_size) change that."""
    shapes = read(file_of(folder, 0, "model") if zero_stage == 3 else folder / MODEL_FILE)["param_shapes"]
    if shapes != engine._get_zero_param_shapes():  # their order is that of the numbers
        return False
    if zero_stage == 3:
        return True
    return saved_state(folder, rank)["param_slice_mappings"] == engine.optimizer._param_slice_mappings


def deal_out(shards: Shards, model: nn.Module, optimizer, zero_stage: int, rank: int) -> None:
    """Put the weights and moments of a checkpoint into the engine. All ranks call this together.

    Args:
        model: the module under the engine.
        optimizer: DeepSpeed's, of stage 1, 2 or 3, around torch's AdamW or DeepSpeed's own for the CPU.
    """
    if getattr(optimizer, "round_robin_gradients", False):
        raise CheckpointError(ROUND_ROBIN)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    pieces = shards.layout.pieces
    if trained.keys() != pieces.keys():
        named = ", ".join(sorted(trained.keys() ^ pieces.keys())[:3])
        raise CheckpointError(f"the checkpoint and this run do not train the same parameters: {named}")
    if any(not {*KEYS, "step"} <= shards.first(name).keys() for name in pieces):
        raise CheckpointError(
            "the checkpoint was not written by Adam: it can be resumed under the same DeepSpeed JSON and number of "
            "processes only"
        )
    if zero_stage == 3:
        deal_out_stage_3(shards, trained, optimizer, rank)
    else:
        deal_out_stages_1_and_2(shards, trained, optimizer)


def fresh_state(optimizer: torch.optim.Optimizer, flat: Tensor, step: float) -> dict:
    """Adam's state of a flat tensor, with moments to be filled. Before its first step the optimizer has none."""
    count = torch.tensor(step, device=flat.device) if isinstance(optimizer, torch.optim.AdamW) else int(step)
    return {"step": count, **{key: torch.zeros_like(flat) for key in MOMENTS}}


def deal_out_stages_1_and_2(shards: Shards, trained: dict[str, Any], optimizer) -> None:
    adam = optimizer.optimizer
    for name, parameter in trained.items():
        place = parameter._hp_mapping
        if place is None:  # no part of it belongs to this rank
            continue
        flat = adam.param_groups[place.param_group_index]["params"][0]
        if flat not in adam.state or "exp_avg" not in adam.state[flat]:
            adam.state[flat] = fresh_state(adam, flat, shards.step(name))
        own, whole = place.hp_fragment_address, place.lp_fragment_address
        targets = {"fp32": flat.data, **{key: adam.state[flat][key] for key in MOMENTS}}
        for key, target in targets.items():
            shards.copy_into(target.narrow(0, own.start, own.numel), name, key, whole.start)
    optimizer.update_lp_params()


def deal_out_stage_3(shards: Shards, trained: dict[str, Any], optimizer, rank: int) -> None:
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    adam = optimizer.optimizer
    optimizer.checkpoint_event_prologue()
    for flat, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        names = {id(parameter): name for name, parameter in trained.items()}
        adam.state[flat] = fresh_state(adam, flat, shards.step(names[id(group[0])]))
    for name, parameter in trained.items():
        share = parameter.ds_tensor.numel()
        for key in KEYS:
            part = torch.zeros(share)  # padded with zeros, as DeepSpeed does
            shards.copy_into(part, name, key, rank * share)
            if key == "fp32":
                safe_set_local_fp32_param(parameter, part)
                parameter.ds_tensor.data.copy_(part)
            else:
                safe_set_local_optimizer_state(parameter, part, key)
    optimizer.checkpoint_event_epilogue()
