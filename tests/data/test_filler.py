"""Filler against the batch that it is put behind."""

import pytest
import torch

from hafrm_ds.data.filler import rounded_up, with_filler
from hafrm_ds.data.packing import lay_out
from tests.tiny_models import random_items


def test_sizes_are_few_and_little_larger():
    sizes = [rounded_up(number) for number in range(1, 8193)]
    assert all(number <= size < number + 16 or size <= number * 17 / 16 for number, size in enumerate(sizes, start=1))
    assert sizes == sorted(sizes)
    assert len(set(sizes)) <= 96
    assert rounded_up(0) == 0


@pytest.mark.parametrize("layout", ["shared_prefix", "packed"])
@pytest.mark.parametrize("num_responses", [1, 2, 5])
def test_what_was_there_stays(layout, num_responses):
    batch = lay_out(random_items(seed=num_responses, num_items=6, num_responses=num_responses), layout)
    filled = with_filler(batch)
    size, num_targets = rounded_up(batch.num_positions), rounded_up(len(batch.target_ids))
    filler = size - batch.num_positions
    assert filler, "the draw has to leave room"
    assert filled.input_ids.shape == filled.position_ids.shape == (1, size)
    assert len(filled.predict_index) == len(filled.target_ids) == num_targets
    for name in ("input_ids", "position_ids", "readout_index", "predict_index", "target_ids", "num_tokens"):
        before, after = getattr(batch, name), getattr(filled, name)
        torch.testing.assert_close(after[..., : before.shape[-1]], before, rtol=0, atol=0)
    segments, continued = batch.segments, filled.segments
    assert continued.q_lengths == (*segments.q_lengths, filler)
    assert continued.k_lengths == (*segments.k_lengths, filler)
    assert continued.cu_seqlens_q.tolist() == [*segments.cu_seqlens_q.tolist(), size]
    assert continued.cu_seqlens_k.dtype == segments.cu_seqlens_k.dtype
    if segments.key_index is None:
        assert continued.key_index is None
    else:
        keys = [*segments.key_index.tolist(), *range(batch.num_positions, size)]
        assert continued.key_index.tolist() == keys


def test_a_batch_of_such_a_size_gets_no_segment():
    filled = with_filler(lay_out(random_items(seed=0, num_items=6), "packed"))
    assert with_filler(filled).segments is filled.segments
