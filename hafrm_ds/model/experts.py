"""Mixtures of experts: how a router spreads the tokens of groups over the experts, and the loss that keeps it even.

Legend: T positions of the micro-batch, G groups, L layers with experts, E experts, k of them for a token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hafrm_ds.data.packing import PackedBatch
from hafrm_ds.errors import ModelError
from hafrm_ds.hardware.flops import Shape, experts_of_a_token, holds_experts, own_shape
from hafrm_ds.objective import RouterUse


def expert_layers(causal_lm: nn.Module, shape_of: Shape = own_shape) -> list[nn.Module]:
    """The modules that hold a router and its experts: which of the latter run depends on the tokens.

    Args:
        shape_of: as `ForwardCost.of` takes it.
    """

    def are_experts(name: str, module: nn.Module) -> bool:
        return holds_experts(module, shape_of) or (name == "experts" and isinstance(module, nn.ModuleList))

    return [
        module
        for module in causal_lm.modules()
        if any(are_experts(name, child) for name, child in module.named_children())
    ]


def gives_router_logits(causal_lm: PreTrainedModel) -> bool:
    return "router_logits" in (getattr(causal_lm.get_decoder(), "_can_record_outputs", None) or {})


def router_loss_coefficient(causal_lm: PreTrainedModel, kind: str | None, shape_of: Shape = own_shape) -> float:
    """What the router's loss is weighted by, under model.router_aux_loss; 0 where it is not trained.

    Raises:
        ModelError: the model has no experts, or gives no logits of its router, or its configuration has no weight.
    """
    if kind is None:
        return 0.0
    weight = getattr(causal_lm.config.get_text_config(), "router_aux_loss_coef", None)
    reason = None
    if not expert_layers(causal_lm, shape_of):
        reason = "has no experts"
    elif not gives_router_logits(causal_lm):
        reason = "does not give the logits of its router"
    elif not weight:
        reason = f"has no weight for it: router_aux_loss_coef is {weight} in its configuration"
    if reason:
        raise ModelError(
            f"model.router_aux_loss is {kind}, but {type(causal_lm).__name__} {reason}; leave the option out"
        )
    return float(weight or 0.0)


def router_use(router_logits: Sequence[Tensor], causal_lm: PreTrainedModel, batch: PackedBatch) -> RouterUse:
    """Loss and load of the routers over a micro-batch of groups.

    Each group has a loss of its own, so that it does not depend on how a batch is partitioned: the load-balancing loss
    of Fedus et al. 2021 (arXiv 2101.03961, equations 4 to 6), as transformers has it, over the tokens of the group in
    all layers. A prompt counts once, also in layouts that compute it for each of its answers, and padding not at all.

    Args:
        router_logits: [T, E] of each of the L layers.
    """
    top_k = experts_of_a_token(causal_lm.config)
    assert top_k is not None
    group, weight = tokens_of_groups(batch)
    num_groups, num_experts = batch.num_groups, router_logits[0].shape[1]
    tokens = weight.new_zeros(num_groups).index_add(0, group, weight)
    probabilities, loads = weight.new_zeros(num_groups, num_experts), []
    for logits in router_logits:
        weighted = logits.float().softmax(-1) * weight[:, None]
        probabilities = probabilities.index_add(0, group, weighted)
        chosen = torch.zeros_like(weighted).scatter(
            1, logits.topk(top_k, -1).indices, weight[:, None].expand(-1, top_k)
        )
        loads.append(weight.new_zeros(num_groups, num_experts).index_add(0, group, chosen.detach()))
    load = torch.stack(loads, dim=1)
    rows = len(router_logits) * tokens[:, None]
    return RouterUse(num_experts * (load.sum(1) / rows * probabilities / rows).sum(1), load)


def tokens_of_groups(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """[T] group of each position, and [T] fp32 how often it counts: a prompt's tokens once in all of its copies."""
    ones = torch.ones_like(batch.group, dtype=torch.float32)
    once = 1 / ones.new_zeros(batch.num_groups).index_add(0, batch.group, ones)[batch.group]  # [N]
    if batch.attention_mask is not None:
        mask = batch.attention_mask
        prompt_lengths = mask.sum(1) - batch.num_tokens
        is_prompt = batch.position_ids < prompt_lengths[:, None]
        weight = torch.where(is_prompt, once[:, None], 1.0) * mask
        return batch.group[:, None].expand_as(mask).flatten(), weight.flatten().float()
    assert batch.segments is not None
    ends = batch.segments.cu_seqlens_q[1:].long()
    place = torch.arange(batch.num_positions, device=ends.device)
    response = torch.searchsorted(ends, place, right=True)
    is_prompt = place < (ends - batch.num_tokens)[response]
    is_copied = batch.segments.key_index is None
    return batch.group[response], torch.where(is_prompt & is_copied, once[response], 1.0)
