"""Gradients between backward and step: this rank's part of them, read or thrown away.

After the backward with the last micro-batch of a step DeepSpeed has averaged the gradients over the ranks. Where they
lie is told by each kind of its optimizers: under stage 0 whole on every rank in `grad`; under stages 1 and 2, and 1 in
bfloat16 by another optimizer, as the fragment that a rank's optimizer updates; under stage 3 as its share of each
parameter. DeepSpeed's safe_get_full_grad would gather each parameter's on every rank, which no sum over them needs.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

CHUNK = 2**24
"""Elements that are multiplied at once: in fp64, two of them take 256 MiB."""


def own_parts(parameters: Iterable[nn.Parameter], zero_stage: int) -> Iterator[Tensor]:
    """This rank's part of each parameter's averaged gradient, flat, as it lies or copied from where it is offloaded to.
    Under stages 1 to 3 the parts of all ranks are the whole; under stage 0 every rank has the whole."""
    return (own_part(parameter, zero_stage) for parameter in parameters)


def own_part(parameter: Any, zero_stage: int) -> Tensor:
    if zero_stage == 0:  # an expert that no token was sent to has none
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return gradient.detach().flatten()
    if zero_stage == 3:
        from deepspeed.utils import safe_get_local_grad

        return safe_get_local_grad(parameter).flatten()
    place = parameter._hp_mapping
    if place is None:  # no part of it belongs to this rank
        return parameter.new_empty(0)
    part = place.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
    if part.numel() == parameter.numel():  # the optimizer of stage 1 in bfloat16 keeps all of it
        return part.narrow(0, place.lp_fragment_address.start, place.lp_fragment_address.numel)
    return part


def inner_products(
    first: Iterable[Tensor], second: Iterable[Tensor], zero_stage: int, device: torch.device
) -> tuple[float, float, float]:
    """first·first, first·second and second·second in fp64, over the parts of all ranks, which call this together.

    Args:
        first, second: as `own_parts` gives them, wherever they lie.
        device: where to compute.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one.split(CHUNK), other.split(CHUNK), strict=True):
            a, b = a.to(device).double(), b.to(device).double()
            sums += torch.stack([a @ a, a @ b, b @ b])
    if zero_stage > 0:
        dist.all_reduce(sums)
    own, both, other_own = sums.tolist()
    return own, both, other_own


def discard(engine: Any, zero_stage: int) -> None:
    """Throw the gradients of a DeepSpeed engine away, after a backward with a last micro-batch: what its step does
    besides updating."""
    if zero_stage == 0:
        engine.zero_grad()
        return
    optimizer = engine.optimizer
    optimizer.zero_grad()
    if zero_stage < 3 and hasattr(optimizer, "averaged_gradients"):  # not so the one of stage 1 in bfloat16
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None
        optimizer.micro_step_id = -1  # with an offloaded optimizer: the next micro-batch is a first one again
        optimizer.reset_cpu_buffers()
