"""Micro-batches: groups laid out for one forward pass.

Legend: T tokens of the micro-batch, N responses, S attention segments, K keys, M predicted response tokens,
B rows and L columns of the padded layout.

shared_prefix: a prompt P with responses C and R stands as [P C R]. As queries these are two segments, [P C] and [R];
their keys are [P C] and [P R], gathered by `key_index`. Every token attends exactly to what it would see in its own
sequence, while projections, MLPs and norms run once for the prompt.
packed: [P C] [P R], each its own segment. padded: rows [P C] and [P R] with padding on the right, under the model's
stock attention: works with every model and is the yardstick of the other two.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from hafrm_ds.data.tokenization import PromptWithResponses

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

IGNORED_PADDING_ID = 0
"""Fills padded rows. Which id it is never matters: positions come from lengths, and padding is masked."""
ALIGNMENT = 16
"""Bytes that each tensor in a buffer begins at a multiple of: kernels read so many at once."""


@dataclass(frozen=True)
class AttentionSegments:
    """Variable-length attention of a micro-batch: segment s has queries q and keys k, causal from the bottom right.

    cu_seqlens_q, cu_seqlens_k: [S + 1] int32, where segments begin in queries and in keys.
    key_index: [K] int64, position in the T tokens of each key; None when keys are the tokens themselves.
    q_lengths, k_lengths: the same lengths as Python numbers, so that no device has to be asked.
    max_q, max_k: the largest of each. torch.compile takes a number for a variable; of a tuple it would make another
        graph for each number of segments.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    key_index: Tensor | None
    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    max_q: int
    max_k: int

    def to(self, device: torch.device) -> "AttentionSegments":
        return move(self, device)


@dataclass(frozen=True)
class PackedBatch:
    """N responses laid out for one forward pass.

    input_ids, position_ids: [1, T] int64, or [B, L] in the padded layout.
    attention_mask: [B, L] int64 in the padded layout, else None.
    segments: how tokens attend; None in the padded layout.
    row_lengths: tokens of each row in the padded layout, as Python numbers, else None.
    readout_index: [N] int64, flat position of each response's last token, where its reward is read.
    predict_index: [M] int64, flat position whose hidden state predicts each response token.
    target_ids: [M] int64, the response tokens.
    num_tokens: [N] int64, tokens of each response; the M response tokens stand response after response.
    group: [N] int64, which of the items each response belongs to. num_groups: the number of items.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    segments: AttentionSegments | None
    row_lengths: tuple[int, ...] | None
    readout_index: Tensor
    predict_index: Tensor
    target_ids: Tensor
    num_tokens: Tensor
    group: Tensor
    num_groups: int

    @property
    def num_responses(self) -> int:
        return len(self.num_tokens)

    @property
    def num_positions(self) -> int:
        """Positions that the body computes, padding among them."""
        return self.input_ids.numel()

    @property
    def num_padding(self) -> int:
        return 0 if self.row_lengths is None else self.num_positions - sum(self.row_lengths)

    def to(self, device: torch.device) -> "PackedBatch":
        return move(self, device)


B = TypeVar("B", bound="DataclassInstance")


def move(batch: B, device: torch.device) -> B:
    """A copy of a dataclass with its tensors, and those of dataclasses in it, on `device`: by one copy of them all.

    A GPU fetches it from pinned memory when it comes to that. For a copy from any other memory the host would wait
    until the GPU has done all that it was given before.
    """
    tensors = list(tensors_of(batch))
    if all(tensor.device == device for tensor in tensors):
        return batch
    places, size = [], 0
    for tensor in tensors:
        places.append(slice(size, size + tensor.nbytes))
        size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    buffer = torch.empty(size, dtype=torch.uint8)
    for tensor, place in zip(tensors, places, strict=True):
        buffer[place].view(tensor.dtype).copy_(tensor.reshape(-1))
    moved = move_tensor(buffer, device)
    views = (moved[place].view(tensor.dtype).view(tensor.shape) for tensor, place in zip(tensors, places, strict=True))
    return with_tensors(batch, views)


def tensors_of(batch: "DataclassInstance") -> Iterator[Tensor]:
    """The tensors of a dataclass and of dataclasses in it, in the order of the fields."""
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value) and not isinstance(value, type):
            yield from tensors_of(value)


def with_tensors(batch: B, tensors: Iterator[Tensor]) -> B:
    """A copy of a dataclass with other tensors, given in the order of `tensors_of`."""
    changed: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = next(tensors)
        elif is_dataclass(value) and not isinstance(value, type):
            changed[field.name] = with_tensors(value, tensors)
    return replace(batch, **changed)


def move_tensor(value: Tensor, device: torch.device) -> Tensor:
    """A tensor on `device`, for a GPU by way of pinned memory."""
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def padded_rows(layout: str, num_items: int, num_responses: np.ndarray | int = 2) -> np.ndarray | None:
    """Rows of each item [items], as `planning` takes them; None in a layout that pads nothing.

    Args:
        num_responses: of each item, [items] or the same of all. Pairs have two.
    """
    return np.broadcast_to(num_responses, num_items) if layout == "padded" else None


def share_prompts(
    conversations: Sequence[PromptWithResponses],
) -> tuple[list[PromptWithResponses], list[int]]:
    """Put free conversations with the same prompt together. Pairs and questions are groups already and need no search.

    Args:
        conversations: groups of one response.

    Returns:
        (groups, for each of their responses in order its position among the conversations).
    """
    members: dict[tuple[int, ...], list[int]] = {}
    for position, (prompt, _) in enumerate(conversations):
        members.setdefault(tuple(prompt), []).append(position)
    groups = [
        PromptWithResponses(
            conversations[places[0]].prompt, tuple(conversations[place].responses[0] for place in places)
        )
        for places in members.values()
    ]
    return groups, [place for places in members.values() for place in places]


def split_groups(groups: Iterable[PromptWithResponses], layout: str, max_tokens: int) -> list[PromptWithResponses]:
    """Groups as the items of micro-batches, which keep the order of all responses.

    In the layout that shares prompts an item has as many responses as fit in `max_tokens`; further ones have their
    prompt once more. Elsewhere nothing is shared, and each response is an item by itself.
    """
    items = []
    for prompt, responses in groups:
        part: list[Sequence[int]] = []
        tokens = len(prompt)
        for response in responses:
            if part and (layout != "shared_prefix" or tokens + len(response) > max_tokens):
                items.append(PromptWithResponses(prompt, tuple(part)))
                part, tokens = [], len(prompt)
            part.append(response)
            tokens += len(response)
        items.append(PromptWithResponses(prompt, tuple(part)))
    return items


def lay_out(items: Sequence[PromptWithResponses], layout: str) -> PackedBatch:
    """Lay prompts and responses out for one forward pass; responses keep their order over all items."""
    if layout == "padded":
        return lay_out_padded(items)
    return lay_out_segments(items, shared_prefix=layout == "shared_prefix")


def lay_out_segments(items: Sequence[PromptWithResponses], shared_prefix: bool) -> PackedBatch:
    """The shared_prefix and packed layouts: one row of T tokens, no padding."""
    ids, positions, keys, q_lengths, k_lengths = [], [], [], [], []
    readout, predict, num_tokens = [], [], []
    start = 0  # of the next token among the T
    for item in items:
        prompt = np.asarray(item.prompt, dtype=np.int64)
        prompt_start = start
        for number, given in enumerate(item.responses):
            response = np.asarray(given, dtype=np.int64)
            length = len(response)
            if number == 0 or not shared_prefix:
                prompt_start = start
                ids.append(prompt)
                positions.append(np.arange(len(prompt)))
                start += len(prompt)
            response_positions = np.arange(start, start + length)
            ids.append(response)
            positions.append(np.arange(len(prompt), len(prompt) + length))
            keys += [np.arange(prompt_start, prompt_start + len(prompt)), response_positions]
            k_lengths.append(len(prompt) + length)
            q_lengths.append(length if shared_prefix and number > 0 else len(prompt) + length)
            # The first response token is predicted by the last prompt token, each later one by its predecessor.
            predict += [[prompt_start + len(prompt) - 1], response_positions[:-1]]
            start += length
            readout.append(start - 1)
            num_tokens.append(length)
    segments = AttentionSegments(
        cu_seqlens_q=cumulative(q_lengths),
        cu_seqlens_k=cumulative(k_lengths),
        key_index=tensor(np.concatenate(keys)) if sum(k_lengths) != sum(q_lengths) else None,
        q_lengths=tuple(q_lengths),
        k_lengths=tuple(k_lengths),
        max_q=max(q_lengths),
        max_k=max(k_lengths),
    )
    return PackedBatch(
        input_ids=tensor(np.concatenate(ids))[None],
        position_ids=tensor(np.concatenate(positions))[None],
        attention_mask=None,
        segments=segments,
        row_lengths=None,
        **response_fields(items, readout, predict, num_tokens),
    )


def lay_out_padded(items: Sequence[PromptWithResponses]) -> PackedBatch:
    """The padded layout: a row for each response, padded on the right to the longest."""
    rows = [
        (len(item.prompt), np.concatenate([item.prompt, response]).astype(np.int64))
        for item in items
        for response in item.responses
    ]
    width = max(len(row) for _, row in rows)
    input_ids = np.full((len(rows), width), IGNORED_PADDING_ID, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    readout, predict, num_tokens = [], [], []
    for number, (prompt_length, row) in enumerate(rows):
        input_ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
        start = number * width
        readout.append(start + len(row) - 1)
        predict.append(np.arange(start + prompt_length - 1, start + len(row) - 1))
        num_tokens.append(len(row) - prompt_length)
    return PackedBatch(
        input_ids=tensor(input_ids),
        position_ids=tensor(np.tile(np.arange(width), (len(rows), 1))),
        attention_mask=tensor(mask),
        segments=None,
        row_lengths=tuple(len(row) for _, row in rows),
        **response_fields(items, readout, predict, num_tokens),
    )


def response_fields(items: Sequence[PromptWithResponses], readout, predict, num_tokens) -> dict[str, Any]:
    """The fields of a batch that say where responses are read and predicted, the same in every layout."""
    responses = [response for item in items for response in item.responses]
    return {
        "readout_index": tensor(readout),
        "predict_index": tensor(np.concatenate(predict)),
        "target_ids": tensor(np.concatenate(responses)),
        "num_tokens": tensor(num_tokens),
        "group": tensor(np.repeat(np.arange(len(items)), [len(item.responses) for item in items])),
        "num_groups": len(items),
    }


def cumulative(lengths: list[int]) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))


def tensor(values) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.int64))
