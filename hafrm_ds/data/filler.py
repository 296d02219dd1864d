"""Filler: positions that nobody reads, behind a micro-batch, so that its shapes come again.

A CPU's products in bfloat16 and float16 are oneDNN's, which compiles one for each shape that it meets, in some tens of
milliseconds, and keeps the last thousand, most of a megabyte each. Of the micro-batches of a run no two have the same
number of tokens.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from hafrm_ds.data.packing import AttentionSegments, PackedBatch


def rounded_up(number: int) -> int:
    """The next of the sizes that are used: 16 of them between a power of 2 and the next, so at most 1/16 is filler,
    but for steps of 16 below 512."""
    step = 2 ** max(4, number.bit_length() - 5)
    return -(-number // step) * step


def with_filler(batch: PackedBatch) -> PackedBatch:
    """A batch in a layout with segments, with filler behind its T tokens and behind its M response tokens.

    The filler is a segment of its own: no other token attends to it. All indices stay what they are, and of what is
    computed for each of the tokens the first T or M are those of the batch.
    """
    assert batch.segments is not None
    tokens = rounded_up(batch.num_positions) - batch.num_positions
    responses = rounded_up(len(batch.target_ids)) - len(batch.target_ids)
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, tokens)),
        position_ids=F.pad(batch.position_ids, (0, tokens)),  # 0, which every model knows
        segments=with_segment(batch.segments, batch.num_positions, tokens) if tokens else batch.segments,
        predict_index=F.pad(batch.predict_index, (0, responses)),
        target_ids=F.pad(batch.target_ids, (0, responses)),
    )


def with_segment(segments: AttentionSegments, start: int, length: int) -> AttentionSegments:
    """Segments and one more, of the tokens from `start` on, each of which sees those of its own before it."""

    def continued(ends: torch.Tensor) -> torch.Tensor:
        return torch.cat([ends, ends[-1:] + length])

    keys = segments.key_index
    return AttentionSegments(
        cu_seqlens_q=continued(segments.cu_seqlens_q),
        cu_seqlens_k=continued(segments.cu_seqlens_k),
        key_index=None if keys is None else torch.cat([keys, torch.arange(start, start + length)]),
        q_lengths=(*segments.q_lengths, length),
        k_lengths=(*segments.k_lengths, length),
        max_q=max(segments.max_q, length),
        max_k=max(segments.max_k, length),
    )
