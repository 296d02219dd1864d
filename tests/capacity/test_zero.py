"""Bytes of weights, gradients and optimizer, and what is sent, by hand."""

from pathlib import Path

import pytest

from hafrm_ds.capacity.traffic import step_traffic
from hafrm_ds.capacity.zero import Parameters, ZeroSettings, state_bytes

REPOSITORY = Path(__file__).parents[2]
BILLION = 10**9
LLAMA_7B = Parameters(
    trained=7 * BILLION, frozen=0, frozen_bytes=0.0, sizes=(10**8,) * 70, weight_bytes=2, largest=10**8
)


def states(stage: int, num_processes: int, parameters: Parameters = LLAMA_7B, accumulates: bool = True, **settings):
    zero = ZeroSettings(stage=stage, **settings)
    return state_bytes(parameters, zero, num_processes, accumulates=accumulates, touched_only=False)


def gigabytes(num_bytes: float) -> float:
    return num_bytes / 1e9


def test_the_16_bytes_of_the_zero_paper():
    """Weights, gradients and Adam of a parameter: 16 bytes under stage 0, a share of the last under the others."""
    whole = states(0, 64)
    assert gigabytes(whole.weights + whole.gradients + whole.optimizer) == pytest.approx(16 * 7)
    for stage in (1, 2, 3):
        assert gigabytes(states(stage, 64).optimizer) == pytest.approx(12 * 7 / 64)


def test_what_each_stage_splits():
    # Stage 1 sums all gradients in fp32 beside those in bfloat16; stages 2 and 3 keep their part, in fp32.
    assert gigabytes(states(1, 8).gradients) == pytest.approx(6 * 7)
    assert gigabytes(states(2, 8).gradients) == pytest.approx(4 * 7 / 8)
    assert gigabytes(states(3, 8).gradients) == pytest.approx(4 * 7 / 8)
    assert [gigabytes(states(stage, 8).weights) for stage in range(4)] == pytest.approx([14, 14, 14, 14 / 8])


def test_gathered_parameters_end_at_the_limit_of_live_ones():
    # A billion, what is fetched ahead, and the largest: 1.15 billion at a time.
    assert gigabytes(states(3, 8).gathered) == pytest.approx(2 * (1.05 + 0.1))
    small = Parameters(trained=10**8, frozen=0, frozen_bytes=0.0, sizes=(10**7,) * 10, weight_bytes=2, largest=10**7)
    assert gigabytes(states(3, 4, small).gathered) == pytest.approx(2 * 0.1)
    assert states(3, 1, small).gathered == 0


def test_offload_moves_the_optimizer_and_the_weights_to_the_host():
    without, optimizer, both = (
        states(3, 8),
        states(3, 8, offloads_optimizer=True),
        states(3, 8, offloads_optimizer=True, offloads_parameters=True),
    )
    assert optimizer.optimizer == optimizer.gradients == 0
    assert gigabytes(optimizer.host) == pytest.approx((12 + 8) * 7 / 8)
    assert optimizer.weights == without.weights
    assert both.weights == 0
    assert gigabytes(both.host) == pytest.approx((12 + 8 + 2) * 7 / 8)


def test_frozen_weights_have_neither_gradients_nor_optimizer():
    adapters = Parameters(
        trained=10**8,
        frozen=7 * BILLION,
        frozen_bytes=0.5625 * 7e9,
        sizes=(10**8,) * 71,
        weight_bytes=2,
        largest=10**8,
    )
    held = states(2, 8, adapters)
    assert gigabytes(held.weights) == pytest.approx(0.5625 * 7 + 0.2)
    assert gigabytes(held.gradients + held.optimizer) == pytest.approx((4 + 12) * 0.1 / 8)


def test_fp32_weights_are_their_own_masters_under_stage_0():
    fp32 = Parameters(trained=BILLION, frozen=0, frozen_bytes=0.0, sizes=(10**8,) * 10, weight_bytes=4, largest=10**8)
    held = states(0, 1, fp32)
    assert gigabytes(held.weights + held.gradients + held.optimizer) == pytest.approx(16)
    assert gigabytes(states(2, 4, fp32).optimizer) == pytest.approx(12 / 4)


def test_settings_are_read_from_a_deepspeed_configuration():
    content = {
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "none"},
            "reduce_bucket_size": 5e7,
            "zero_hpz_partition_size": 8,
        }
    }
    assert ZeroSettings.of(content) == ZeroSettings(
        stage=3, offloads_optimizer=True, reduce_bucket=50_000_000, secondary_shards=8, overlaps=True
    )
    assert ZeroSettings.of({}) == ZeroSettings()


def test_stage_2_that_overlaps_reduces_one_bucket_while_it_fills_another():
    zero = ZeroSettings.of({"zero_optimization": {"stage": 2, "overlap_comm": True}})
    assert zero == ZeroSettings(stage=2, overlaps=True)
    # 500 million gradients in bfloat16, twice, and the copy that is sent.
    assert gigabytes(states(2, 8, overlaps=True).buckets) == pytest.approx(3)
    assert gigabytes(states(2, 8).buckets) == pytest.approx(2)


def test_defaults_are_those_of_deepspeed():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs, ours = DeepSpeedZeroConfig(stage=3), ZeroSettings.of({"zero_optimization": {"stage": 3}})
    assert (ours.reduce_bucket, ours.prefetch_bucket) == (theirs.reduce_bucket_size, theirs.prefetch_bucket_size)
    assert ours.persistence_threshold == theirs.param_persistence_threshold
    assert (ours.max_live, ours.sub_group) == (theirs.max_live_parameters, theirs.sub_group_size)
    assert (ours.secondary_shards, ours.overlaps) == (theirs.zero_hpz_partition_size, theirs.overlap_comm)


@pytest.mark.parametrize(
    ("zero", "gigabytes_sent"),
    [
        # 14 GB of weights, as many of gradients, 4 micro-batches, 15/16 of each leave a process.
        (ZeroSettings(stage=0), 2 * 14),
        (ZeroSettings(stage=1), 3 * 14),
        (ZeroSettings(stage=2), (2 * 4 + 1) * 14),
        # Gathered twice but for a seventh that stays from forward to backward.
        (ZeroSettings(stage=3), 4 * (1 + 6 / 7 + 1) * 14),
        (ZeroSettings(stage=3, secondary_shards=8), 4 * (1 + 1) * 14),
    ],
)
def test_bytes_that_a_process_sends(zero, gigabytes_sent):
    traffic = step_traffic(LLAMA_7B, zero, 16, 8, micro_batches=4)
    assert gigabytes(traffic.among_all) == pytest.approx(gigabytes_sent * 15 / 16)
    inside = 4 * 6 / 7 * 14 * 7 / 8 if zero.secondary_shards > 1 else 0
    assert gigabytes(traffic.within_machine) == pytest.approx(inside)


@pytest.mark.parametrize(
    ("stage", "gigabytes_sent"), [(0, 2 * 28), (1, 2 * 28 + 14), (2, 2 * 4 * 28 + 14), (3, 4 * ((1 + 6 / 7) * 14 + 28))]
)
def test_gradients_in_fp32_are_twice_the_bytes(stage, gigabytes_sent):
    zero = ZeroSettings.of({"zero_optimization": {"stage": stage}, "communication_data_type": "fp32"})
    traffic = step_traffic(LLAMA_7B, zero, 16, 8, micro_batches=4)
    assert gigabytes(traffic.among_all) == pytest.approx(gigabytes_sent * 15 / 16)


def test_what_reducing_in_fp32_takes_beside_a_bucket():
    """A bucket has 500 million gradients: 1 GB in bfloat16, 2 GB in fp32."""

    def buckets(stage: int, is_fp32: bool) -> float:
        return gigabytes(states(stage, 8, reduces_in_fp32=is_fp32).buckets)

    assert buckets(2, True) - buckets(2, False) == pytest.approx(2)  # the flat copy, once more
    # Each gradient in fp32 and all of them flat, not flat in bfloat16; the own eighth need not become fp32.
    assert buckets(3, True) - buckets(3, False) == pytest.approx(2 + 2 - 1 - 2 / 8)
    # Stage 1 has summed in fp32: nothing becomes bfloat16.
    steps = [gigabytes(states(1, 8, reduces_in_fp32=is_fp32).in_step) for is_fp32 in (True, False)]
    assert steps[0] - steps[1] == pytest.approx(-14)
    fp32_model = Parameters(
        trained=BILLION, frozen=0, frozen_bytes=0.0, sizes=(10**8,) * 10, weight_bytes=4, largest=10**8
    )
    assert states(3, 8, fp32_model, reduces_in_fp32=True) == states(3, 8, fp32_model)


def test_one_process_sends_nothing():
    assert step_traffic(LLAMA_7B, ZeroSettings(stage=3), 1, 1, micro_batches=4).total == 0
