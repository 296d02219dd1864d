"""The learning-rate schedule: a pure function of the step, so that resuming needs no state."""

import math

from hafrm_ds.config import OptimizerConfig


def learning_rate_factor(step: int, num_steps: int, config: OptimizerConfig) -> float:
    """Factor on every peak learning rate at `step` (from 0) of `num_steps`.

    Linear warm-up over the first warmup_share of the steps, of which the last has factor 1; then the decay, which
    would reach min_learning_rate_share at step `num_steps`, one after the last.
    """
    warmup = math.ceil(round(config.warmup_share * num_steps, 6))  # 0.07 of 100 is 7.000000000000001
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, num_steps - warmup)
    decay = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.min_learning_rate_share + (1 - config.min_learning_rate_share) * decay
