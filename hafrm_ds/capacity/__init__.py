"""Memory and time of a run: what a model costs and the hardware reaches, and the plan of a run before it is paid for.

Training needs `flops` and `measurement` alone, whose names stand here; the plan is `hafrm_ds.capacity.plan`.
"""

from hafrm_ds.capacity.flops import ForwardCost, full_numel, full_shape
from hafrm_ds.capacity.measurement import (
    free_memory_bytes,
    measure_matmul_peak,
    peak_growth_bytes,
    peak_memory_bytes,
    synchronize,
)

__all__ = [
    "ForwardCost",
    "free_memory_bytes",
    "full_numel",
    "full_shape",
    "measure_matmul_peak",
    "peak_growth_bytes",
    "peak_memory_bytes",
    "synchronize",
]
