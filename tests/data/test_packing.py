"""The layouts against what they promise, index by index."""

import numpy as np
import pytest
import torch

from hafrm_ds.data.comparisons import Comparisons
from hafrm_ds.data.micro_batches import make_micro_batch
from hafrm_ds.data.packing import ALIGNMENT, lay_out, padded_rows, tensors_of
from hafrm_ds.data.pairs import Comparison
from hafrm_ds.data.planning import DUMMY, partition_by_length
from hafrm_ds.data.tokenization import PromptWithResponses, TokenizedGroup
from tests.tiny_models import random_items

ITEM = PromptWithResponses([10, 11, 12], ([20, 21], [30, 31, 32]))


def test_shared_prefix_of_one_pair_by_hand():
    batch = lay_out([ITEM], "shared_prefix")
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 30, 31, 32]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert batch.segments.cu_seqlens_q.tolist() == [0, 5, 8]
    assert batch.segments.cu_seqlens_k.tolist() == [0, 5, 11]
    assert batch.segments.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7]
    assert batch.readout_index.tolist() == [4, 7]
    assert batch.predict_index.tolist() == [2, 3, 2, 5, 6]
    assert batch.target_ids.tolist() == [20, 21, 30, 31, 32]
    assert batch.num_tokens.tolist() == [2, 3]


def test_packed_repeats_the_prompt_and_needs_no_key_index():
    batch = lay_out([ITEM], "packed")
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 10, 11, 12, 30, 31, 32]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]]
    assert batch.segments.key_index is None
    assert batch.readout_index.tolist() == [4, 10]
    assert batch.predict_index.tolist() == [2, 3, 7, 8, 9]


def test_padded_rows_are_padded_on_the_right():
    batch = lay_out([ITEM], "padded")
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 0], [10, 11, 12, 30, 31, 32]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert batch.readout_index.tolist() == [4, 11]
    assert batch.predict_index.tolist() == [2, 3, 8, 9, 10]


@pytest.mark.parametrize("layout", ["shared_prefix", "packed", "padded"])
@pytest.mark.parametrize("num_responses", [1, 2, 5])
def test_every_layout_says_the_same(layout, num_responses):
    items = random_items(seed=num_responses, num_items=6, num_responses=num_responses)
    batch = lay_out(items, layout)
    flat = batch.input_ids.flatten()
    responses = [response for item in items for response in item.responses]
    assert batch.target_ids.tolist() == [token for response in responses for token in response]
    assert [flat[index].item() for index in batch.readout_index] == [response[-1] for response in responses]
    assert batch.num_tokens.tolist() == [len(response) for response in responses]
    # What stands at a predicting position comes right before its target in the item's own sequence.
    sequences = [[*item.prompt, *response] for item in items for response in item.responses]
    previous = [
        token
        for sequence, response in zip(sequences, responses, strict=True)
        for token in sequence[-len(response) - 1 : -1]
    ]
    assert flat[batch.predict_index].tolist() == previous


def test_responses_know_their_items():
    for layout in ("shared_prefix", "packed", "padded"):
        batch = lay_out([ITEM, PromptWithResponses([1], ([2],)), ITEM._replace(responses=([1], [2], [3]))], layout)
        assert batch.group.tolist() == [0, 0, 1, 2, 2, 2]
        assert batch.num_groups == 3


def test_a_micro_batch_of_groups_by_hand():
    """A whole group of three, a dummy, and a part that has a quarter of its group's comparisons."""
    three = TokenizedGroup([1, 2], ([3], [4, 5], [6]), (Comparison(2, 0, 0.5), Comparison(1, 0, weight=2.0)), "", "a")
    part = TokenizedGroup([7], ([8], [9]), (Comparison(1, 0, target=0.75, weight=0.5),), "", "b", share=0.25)
    micro_batch = make_micro_batch([three, part], [0, DUMMY, 1], "shared_prefix")
    expected = Comparisons.of([(3, three.comparisons), (2, [Comparison(0, 1)]), (2, part.comparisons)])
    assert all(map(torch.equal, tensors_of(micro_batch.comparisons), tensors_of(expected)))
    assert micro_batch.index.tolist() == [0, DUMMY, 1]
    assert micro_batch.weight.tolist() == [1, 0, 0.25]
    assert micro_batch.batch.num_tokens.tolist() == [1, 2, 1, 1, 1, 1, 1]
    by_comparison = make_micro_batch([three, part], [0, DUMMY, 1], "shared_prefix", normalize_by="comparison")
    assert by_comparison.weight.tolist() == [3, 0, 0.5]


def test_a_padded_pass_over_many_texts_is_hardly_padding():
    """Counted in the rows that are laid out."""
    lengths = np.random.default_rng(0).lognormal(5, 0.7, size=1000).astype(int) + 2
    items = [PromptWithResponses([1], ([2] * (length - 1),)) for length in lengths]
    ranks = partition_by_length(lengths, 2, 4096, padded_rows("padded", len(items), 1))
    batches = [lay_out([items[i] for i in part], "padded") for own in ranks for part in own if part != [DUMMY]]
    padding, tokens = (sum(getattr(batch, name) for batch in batches) for name in ("num_padding", "num_positions"))
    assert max(batch.num_positions for batch in batches) <= 4096
    assert padding == tokens - lengths.sum() < 0.05 * tokens
    assert len(batches) < 1.1 * lengths.sum() / 4096 + 1


@pytest.mark.parametrize("layout", ["shared_prefix", "packed", "padded"])
def test_a_micro_batch_is_moved_by_one_copy_from_pinned_memory(monkeypatch, layout):
    pinned, sent = [], []

    def to(tensor: torch.Tensor, device: torch.device, non_blocking: bool) -> torch.Tensor:
        sent.append((id(tensor), non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    monkeypatch.setattr(torch.Tensor, "to", to)
    pair = TokenizedGroup([1, 2], ([3], [4, 5]), (Comparison(0, 1, 0.5),), source="", id="")
    micro_batch = make_micro_batch([pair], [0, -1], layout, torch.arange(4.0))
    moved = micro_batch.to(torch.device("cuda"))
    assert sent == [(id(tensor), True) for tensor in pinned]
    assert len(sent) == 1
    own, theirs = list(tensors_of(micro_batch)), list(tensors_of(moved))
    # weight, reference; comparisons; ids, positions, three indices or targets, numbers of tokens, group; a mask, or
    # segments
    assert len(own) == 2 + 6 + 7 + {"padded": 1, "packed": 2, "shared_prefix": 3}[layout]
    for ours, there in zip(own, theirs, strict=True):
        assert (there.dtype, there.shape, there.tolist()) == (ours.dtype, ours.shape, ours.tolist())
        assert there.is_contiguous() and there.data_ptr() % ALIGNMENT == 0
        assert there.untyped_storage().data_ptr() == theirs[0].untyped_storage().data_ptr()
    assert moved.index is micro_batch.index
    assert moved.batch.row_lengths == micro_batch.batch.row_lengths


def test_what_is_there_is_not_moved():
    batch = lay_out([ITEM], "shared_prefix")
    assert batch.to(torch.device("cpu")) is batch


def test_to_moves_every_tensor():
    batch = lay_out([ITEM], "shared_prefix").to(torch.device("meta"))
    assert batch.input_ids.device.type == batch.num_tokens.device.type == "meta"
    assert batch.segments.cu_seqlens_q.device.type == batch.segments.key_index.device.type == "meta"
    assert batch.segments.q_lengths == (5, 3)
