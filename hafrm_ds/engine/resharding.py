"""Resuming with another number of processes or another ZeRO stage: the shards of a checkpoint, read parameter by
parameter and dealt out anew.

DeepSpeed splits fp32 weights and Adam's moments into flat pieces, one a rank and group: under stage 3 each parameter is
split, under stages 1 and 2 (and 1 in bfloat16, by another optimizer) the concatenation of all. DeepSpeed's universal
checkpoints are such shards merged by a conversion on disk; loading one overwrites the options of parameter groups,
shares one step count between them, and does not lead from stage 3 to 2 or back. Here the pieces are mapped into memory
and joined one parameter at a time, so nothing is converted, and any of the stages 1 to 3 follows any other.

Frozen parameters and buffers have not changed since the model was loaded: they are left as they are.
"""

import math
import pickle
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hafrm_ds.engine.checkpoint import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Piece:
    """A part of one parameter in the flat tensors of one rank."""

    tensors: dict[str, Tensor]
    """fp32, exp_avg, exp_avg_sq: flat, mapped."""
    step: float
    start: int
    numel: int


class Shards:
    """The pieces of every trained parameter in a checkpoint of stage 1, 2 or 3.

    Args:
        folder: where DeepSpeed has saved.
        zero_stage, world_size: of the processes that saved.
    """

    def __init__(self, folder: Path, zero_stage: int, world_size: int):
        self.pieces: dict[str, list[Piece]] = defaultdict(list)
        """Parameter -> its pieces in order."""
        for rank in range(world_size):
            for name, piece in (pieces_of_stage_3 if zero_stage == 3 else pieces_of_stages_1_and_2)(
                folder, rank, world_size
            ):
                self.pieces[name].append(piece)

    def whole(self, name: str, key: str) -> Tensor:
        """[numel] fp32, the flat parameter or one of its moments."""
        return torch.cat([piece.tensors[key].narrow(0, piece.start, piece.numel) for piece in self.pieces[name]])

    def step(self, name: str) -> float:
        """How many times Adam has updated the parameter."""
        return self.pieces[name][0].step


def trained_weights(folder: Path, zero_stage: int, world_size: int) -> dict[str, Tensor]:
    """Every trained parameter of a checkpoint: in the dtype of the model, whole; under stage 3 in fp32, flat.

    Args: as for `Shards`; here the stage may also be 0.
    """
    if zero_stage < 3:  # each rank has all of them, and rank 0 has saved them
        return read(folder, "mp_rank_00_model_states.pt")["module"]
    shards = Shards(folder, zero_stage, world_size)
    return {name: shards.whole(name, "fp32") for name in shards.pieces}


def read(folder: Path, pattern: str) -> dict:
    """Content of the file that a pattern names, mapped. Of what a pickle may hold only tensors, plain containers and
    the classes that DeepSpeed's optimizers put beside them are made.

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

    (path,) = folder.glob(pattern)
    known = [LossScaler, ZeroStageEnum, fragment_address, (stage_by_name, "builtins.getattr")]
    try:
        with torch.serialization.safe_globals(known):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds something that DeepSpeed does not write: {error}") from error


def read_shard(folder: Path, rank: int, kind: str) -> dict:
    return read(folder, f"*zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt")


def flat_tensors(weights: Tensor, state: dict) -> tuple[dict[str, Tensor], float]:
    """(what there is of fp32 and Adam's moments, Adam's count of steps); another optimizer has none of the latter."""
    moments = {key: state[key] for key in MOMENTS if key in state}
    return {"fp32": weights.detach(), **moments}, float(state.get("step", math.nan))


def pieces_of_stages_1_and_2(folder: Path, rank: int, world_size: int) -> Iterator[tuple[str, Piece]]:
    saved = read_shard(folder, rank, "optim")["optimizer_state_dict"]
    states = saved["base_optimizer_state"]["state"]
    for group, addresses in enumerate(saved["param_slice_mappings"]):
        tensors, step = flat_tensors(saved["single_partition_of_fp32_groups"][group], states[group])
        for name, address in addresses.items():
            yield name, Piece(tensors, step, address.start, address.numel)


def pieces_of_stage_3(folder: Path, rank: int, world_size: int) -> Iterator[tuple[str, Piece]]:
    saved = read_shard(folder, rank, "optim")["optimizer_state_dict"]
    states = saved["optimizer_state_dict"]["state"]
    for group, shapes in enumerate(read_shard(folder, rank, "model")["param_shapes"]):
        tensors, step = flat_tensors(saved["fp32_flat_groups"][group], states[group])
        start = 0
        for name, shape in shapes.items():
            numel = math.prod(shape)
            share = math.ceil(numel / world_size)  # the last ranks' shares are padded
            yield name, Piece(tensors, step, start, max(0, min(share, numel - rank * share)))
            start += share


def deal_out(shards: Shards, model: nn.Module, optimizer, zero_stage: int, rank: int) -> None:
    """Put the weights and moments of a checkpoint into a fresh engine. All ranks call this together.

    Args:
        model: the module under the engine.
        optimizer: DeepSpeed's, of stage 1, 2 or 3, around torch's AdamW or DeepSpeed's own for the CPU.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trained.keys() != shards.pieces.keys():
        named = ", ".join(sorted(trained.keys() ^ shards.pieces.keys())[:3])
        raise CheckpointError(f"the checkpoint and this run do not train the same parameters: {named}")
    if any(not {*MOMENTS} <= piece.tensors.keys() for pieces in shards.pieces.values() for piece in pieces):
        raise CheckpointError(
            "the checkpoint was not written by Adam: it can be resumed under the same ZeRO stage and number of "
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
            part = shards.whole(name, key).narrow(0, whole.start, whole.numel)
            target.narrow(0, own.start, own.numel).copy_(part)
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
        for key in ("fp32", *MOMENTS):
            whole = shards.whole(name, key)
            part = torch.zeros(share, dtype=whole.dtype)
            own = whole[rank * share : (rank + 1) * share]
            part[: len(own)] = own
            if key == "fp32":
                safe_set_local_fp32_param(parameter, part)
                parameter.ds_tensor.data.copy_(part)
            else:
                safe_set_local_optimizer_state(parameter, part, key)
    optimizer.checkpoint_event_epilogue()
