"""Attention over the segments of a micro-batch, registered with transformers' AttentionInterface.

A model loaded with `attn_implementation=SEGMENT_ATTENTION` calls `segment_attention` in every layer; the segments
travel as the keyword argument `segments` of the model's forward, so there is no global state and no forked modelling
code. Under a registered name without a mask function transformers builds no mask at all, which is what segments need.

Legend: T tokens, K keys, Q and G query and key-value heads, D head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from hafrm_ds.data.packing import AttentionSegments
from hafrm_ds.errors import ModelError

SEGMENT_ATTENTION = "hafrm_segments"

HARMLESS = ("position_ids", "cache_position")
"""Tensors that some models pass to their attention function and that change nothing in it."""


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: AttentionSegments,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention function for AttentionInterface.

    Args:
        query: [1, Q, T, D]; key, value: [1, G, T, D].
        attention_mask: must be None: the segments are the mask.

    Returns:
        ([1, T, Q, D], None)

    Raises:
        ModelError: the model passes a tensor that is not known here, as attention sinks or position biases: it would
            change the scores, so it is not ignored.
    """
    if attention_mask is not None:
        raise ValueError("segment attention takes no mask; transformers passed one")
    if unknown := [name for name, value in kwargs.items() if isinstance(value, Tensor) and name not in HARMLESS]:
        raise ModelError(
            f"{type(module).__name__} gives {', '.join(unknown)} to its attention, which the layouts shared_prefix and "
            "packed do not know; set --batch.layout padded"
        )
    if segments.key_index is not None:
        key, value = key[:, :, segments.key_index], value[:, :, segments.key_index]
    outputs = [
        segment_sdpa(q, k, v, scaling, sliding_window, softcap)
        for q, k, v in zip(
            query.split(segments.q_lengths, dim=2),
            key.split(segments.k_lengths, dim=2),
            value.split(segments.k_lengths, dim=2),
            strict=True,
        )
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def segment_sdpa(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, sliding_window: int | None, softcap: float | None
) -> Tensor:
    """Attention of one segment, causal from the bottom right: query i of q sees keys up to k - q + i.

    query [1, Q, q, D], key and value [1, G, k, D] -> [1, Q, q, D]
    """
    q_length, k_length = query.shape[2], key.shape[2]
    has_window = sliding_window is not None and sliding_window < k_length
    is_grouped = query.shape[1] != key.shape[1]
    if softcap is None and not has_window and q_length == k_length:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=is_grouped)

    query_position = torch.arange(k_length - q_length, k_length, device=query.device)[:, None]
    key_position = torch.arange(k_length, device=query.device)[None]
    visible = key_position <= query_position
    if has_window:
        visible &= key_position > query_position - sliding_window
    if softcap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, scale=scaling, enable_gqa=is_grouped
        )

    # No fused kernel on CPU has the soft cap of Gemma 2, so its scores are formed, in fp32 for the softmax.
    if is_grouped:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value


AttentionInterface.register(SEGMENT_ATTENTION, segment_attention)
