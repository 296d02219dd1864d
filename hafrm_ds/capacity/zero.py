"""Bytes of weights, gradients and optimizer under each ZeRO stage.

Rajbhandari et al. 2020 (arXiv 1910.02054), section 3 and 7: mixed precision with Adam holds 2 bytes a parameter for
weights, 2 for gradients and 12 for the optimizer (fp32 weights and two moments), of which stage 1 splits the last over
the processes, stage 2 also the gradients, stage 3 all. What DeepSpeed 0.19 does beyond the paper, read in its source
(`deepspeed/runtime`), is said at each line: gradients summed in fp32, buckets, and parameters that stay gathered.

Legend: P parameters, N processes, b bytes of a weight.
"""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field

from hafrm_ds.engine.deepspeed_config import is_offloaded

FP32 = 4
MOMENTS = 8
"""Bytes of Adam's two moments of a parameter, in fp32."""
ALLREDUCE_BUCKET = 500_000_000
"""Elements that DeepSpeed's engine reduces at a time where no ZeRO optimizer does (MEMORY_OPT_ALLREDUCE_SIZE)."""


class ZeroSettings(BaseModel):
    """What a DeepSpeed configuration says of ZeRO, with DeepSpeed's defaults. Sizes are in parameters."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    stage: int = 0
    offloads_optimizer: bool = False
    offloads_parameters: bool = False
    secondary_shards: int = Field(1, alias="zero_hpz_partition_size")
    reduce_bucket: int = Field(500_000_000, alias="reduce_bucket_size")
    prefetch_bucket: int = Field(50_000_000, alias="stage3_prefetch_bucket_size")
    persistence_threshold: int = Field(100_000, alias="stage3_param_persistence_threshold")
    max_live: int = Field(1_000_000_000, alias="stage3_max_live_parameters")
    sub_group: int = Field(1_000_000_000, alias="sub_group_size")
    overlaps: bool = Field(False, alias="overlap_comm")
    reduces_in_fp32: bool = False

    @classmethod
    def of(cls, deepspeed_config: dict) -> "ZeroSettings":
        """From what `resolve_deepspeed_config` returns."""
        section = deepspeed_config.get("zero_optimization") or {}
        zero = {name: value for name, value in section.items() if value is not None}
        beside = {
            "offloads_optimizer": is_offloaded(deepspeed_config, "offload_optimizer"),
            "offloads_parameters": is_offloaded(deepspeed_config, "offload_param"),
            "reduces_in_fp32": deepspeed_config.get("communication_data_type") == "fp32",
        }
        return cls.model_validate({"overlap_comm": zero.get("stage", 0) == 3} | zero | beside)


@dataclass(frozen=True)
class Parameters:
    """What a model's parameters amount to.

    trained, frozen: numbers of them. frozen_bytes: of the frozen ones, quantised or not. sizes: of every tensor.
    weight_bytes: of a trained weight in forward. largest: of what ZeRO-3 gathers at a time, a tensor or a layer's
    experts.
    """

    trained: int
    frozen: int
    frozen_bytes: float
    sizes: tuple[int, ...]
    weight_bytes: int
    largest: int

    @property
    def all(self) -> int:
        return self.trained + self.frozen

    def persistent(self, threshold: int) -> int:
        """Parameters in tensors so small that ZeRO-3 leaves them whole."""
        return sum(size for size in self.sizes if size <= threshold)


@dataclass(frozen=True)
class StateBytes:
    """Bytes of one process, on its device but for `host`.

    weights, gradients, optimizer: held through forward and backward. gathered: parameters that ZeRO-3 has whole.
    buckets: buffers of communication. in_step: what the optimizer step takes besides weights, gradients and optimizer,
    when no activation is there. host: in the memory of the machine, under offload.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    buckets: float
    in_step: float
    host: float = 0.0

    @property
    def held(self) -> float:
        """Beside the activations."""
        return self.weights + self.gradients + self.optimizer + self.gathered + self.buckets

    @property
    def in_optimizer_step(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.in_step


def state_bytes(
    parameters: Parameters, zero: ZeroSettings, num_processes: int, *, accumulates: bool, touched_only: bool
) -> StateBytes:
    """What a process holds in training.

    Args:
        accumulates: a step has more than one micro-batch.
        touched_only: count the part of a buffer that is written, as a CPU's resident memory does, not all of it.
    """
    trained, b, n = parameters.trained, parameters.weight_bytes, num_processes
    is_mixed = b < FP32
    share = trained / n
    whole_weights = b * trained + parameters.frozen_bytes
    masters = FP32 * share if is_mixed else 0.0
    becomes_fp32 = is_mixed and zero.reduces_in_fp32  # gradients, on their way to the other processes

    if zero.stage == 0:
        # FP16_UnfusedOptimizer: gradients in the dtype of the weights; in its step all of them in fp32 besides.
        return StateBytes(
            weights=whole_weights,
            gradients=b * trained if accumulates else 0.0,
            optimizer=(MOMENTS + (FP32 if is_mixed else 0)) * trained,
            gathered=0.0,
            buckets=0.0,
            in_step=(0.0 if accumulates else b * trained)
            + max(
                FP32 * trained if is_mixed else 0,
                (b + (FP32 if becomes_fp32 else 0)) * min(ALLREDUCE_BUCKET, trained),
            ),
        )
    if zero.stage == 1 and is_mixed and not zero.offloads_optimizer:
        # BF16_Optimizer: every process sums all gradients in fp32, beside those of the last micro-batch. They are
        # reduced in the dtype of the weights, by way of a copy in one piece where a bucket holds them all.
        flattened = FP32 * trained if trained <= ALLREDUCE_BUCKET else 0.0
        return StateBytes(
            weights=whole_weights,
            gradients=(FP32 + (b if accumulates else 0)) * trained,
            optimizer=masters + MOMENTS * share,
            gathered=0.0,
            buckets=0.0,
            in_step=(0 if accumulates else b) * trained + (0 if becomes_fp32 else b) * trained + flattened,
        )

    # DeepSpeedZeroOptimizer and its Stage3 keep fp32 weights of their own even beside fp32 ones. A bucket that is full
    # is reduced by way of a copy: during backward, or when it is over where all gradients go into one. In fp32 there
    # are two: stage 2 casts the flat one, stage 3 casts each gradient and makes those flat.
    optimizer = (FP32 + MOMENTS) * share
    full = b * min(zero.reduce_bucket, trained)
    copy = full if not becomes_fp32 else (FP32 + (FP32 if zero.stage == 3 else b)) * min(zero.reduce_bucket, trained)
    copied_in_backward = copy if zero.reduce_bucket < trained else 0.0
    host = gathered = 0.0
    if zero.stage < 3:
        weights = whole_weights
        # Stage 1 keeps all gradients, stage 2 its part of them, in fp32, from the end of the first micro-batch on. Its
        # buckets are allocated anew for each, so that nothing is written in them when backward begins.
        summed = FP32 * (trained if zero.stage == 1 else share)
        gradients = summed if accumulates else 0.0
        buffers = 2 if zero.overlaps else 1
        buckets = (0.0 if touched_only else buffers * b * zero.reduce_bucket) + copied_in_backward
        in_step = summed - gradients + max(full + copy, FP32 * share if zero.stage == 1 else 0.0)
    else:
        weights, gradients = whole_weights / n, FP32 * share
        bucket = b * (min(zero.reduce_bucket, trained) if touched_only else zero.reduce_bucket)
        # What is left of a bucket for this process becomes fp32.
        scattered = FP32 * min(zero.reduce_bucket, trained) / n if is_mixed and not becomes_fp32 else 0.0
        buckets = bucket + (copied_in_backward + scattered if copied_in_backward else 0.0)
        live = min(parameters.all, zero.max_live + zero.prefetch_bucket + parameters.largest)
        # They come into buffers of their own; a single process uses its weights as they are.
        gathered = b * max(live, parameters.persistent(zero.persistence_threshold)) if n > 1 else 0.0
        # The step flattens the gradients of a sub-group.
        in_step = bucket + max(copy + scattered, FP32 * min(share, zero.sub_group))
        if zero.secondary_shards > 1:
            weights += b * parameters.all / zero.secondary_shards
        if zero.offloads_parameters:
            host, weights, gathered = weights, 0.0, b * live
    if zero.offloads_optimizer:
        # DeepSpeedCPUAdam's part; its gradients, and the sums of micro-batches beside them.
        host += optimizer + 2 * FP32 * share
        optimizer = gradients = 0.0
        in_step = full + copy
    return StateBytes(weights, gradients, optimizer, gathered, buckets, in_step, host)
