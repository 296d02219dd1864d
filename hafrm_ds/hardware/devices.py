"""Devices that are rented by the hour, by their vendor's data sheets, and those that nothing is known of."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from hafrm_ds.errors import ConfigError, UserError


@dataclass(frozen=True)
class Device:
    """One GPU, and the links of a machine that holds several.

    peak_flops: dense bfloat16 products with fp32 sums, a second (data sheets often print twice that, for sparse ones).
    memory_gib: of its own. memory_bandwidth, link_bandwidth, host_bandwidth, network_bandwidth: bytes a second of its
        own memory; to another GPU of the machine and to the machine's memory, in one direction; and to another machine,
        for each GPU, as such machines are usually built.
    """

    name: str
    peak_flops: float
    memory_gib: float
    memory_bandwidth: float
    link_bandwidth: float
    host_bandwidth: float
    network_bandwidth: float


GIGA, TERA = 1e9, 1e12
PCIE_4, PCIE_5 = 32 * GIGA, 64 * GIGA
"""16 lanes, one direction (PCI-SIG: 16 and 32 GT/s a lane)."""
HDR, NDR = 25 * GIGA, 50 * GIGA
"""InfiniBand of 200 and 400 Gbit/s, one adapter for each GPU (NVIDIA's DGX A100 and DGX H100 user guides)."""
ETHERNET_100 = 12.5 * GIGA
"""100 Gbit/s for each GPU: what servers with PCIe cards come with varies most; give --network_gbs."""

DEVICES = {
    device.name: device
    for device in (
        # NVIDIA A100 Tensor Core GPU data sheet: 312 TFLOPS, 1,555 and 2,039 GB/s, NVLink 600 GB/s in both directions.
        Device("a100-40", 312 * TERA, 40, 1555 * GIGA, 300 * GIGA, PCIE_4, HDR),
        Device("a100-80", 312 * TERA, 80, 2039 * GIGA, 300 * GIGA, PCIE_4, HDR),
        # NVIDIA H100 Tensor Core GPU data sheet, SXM: 1,979 TFLOPS sparse, 3.35 TB/s, NVLink 900 GB/s.
        Device("h100", 989.5 * TERA, 80, 3350 * GIGA, 450 * GIGA, PCIE_5, NDR),
        # NVIDIA H200 Tensor Core GPU data sheet, SXM: as H100, with 141 GB at 4.8 TB/s.
        Device("h200", 989.5 * TERA, 141, 4800 * GIGA, 450 * GIGA, PCIE_5, NDR),
        # NVIDIA HGX B200 data sheet: 36 PFLOPS sparse and 1.44 TB for eight, 8 TB/s, NVLink 1.8 TB/s.
        Device("b200", 2250 * TERA, 180, 8000 * GIGA, 900 * GIGA, PCIE_5, NDR),
        # NVIDIA L40S data sheet: 362.05 TFLOPS, 864 GB/s, PCIe 4. Error correction takes about 3 of the 48 GB.
        Device("l40s", 362.05 * TERA, 45, 864 * GIGA, PCIE_4, PCIE_4, ETHERNET_100),
        # NVIDIA Ada GPU architecture white paper, GeForce RTX 4090: 165.2 TFLOPS with fp32 sums, 1,008 GB/s, PCIe 4.
        Device("rtx4090", 165.2 * TERA, 24, 1008 * GIGA, PCIE_4, PCIE_4, ETHERNET_100),
    )
}

NUMBERS = {
    "peak_tflops": ("peak_flops", TERA),
    "memory_gib": ("memory_gib", 1),
    "memory_gbs": ("memory_bandwidth", GIGA),
    "link_gbs": ("link_bandwidth", GIGA),
    "host_gbs": ("host_bandwidth", GIGA),
    "network_gbs": ("network_bandwidth", GIGA),
}
"""Option -> (field of Device, its unit)."""


def find_device(name: str, numbers: dict[str, float | None]) -> Device:
    """A known device, or one by its numbers, which also correct those of a known one.

    Args:
        numbers: options of NUMBERS; None: not given.

    Raises:
        ConfigError: it is not known, and not all of its numbers are given.
    """
    given = {field: number * unit for option, (field, unit) in NUMBERS.items() if (number := numbers.get(option))}
    known: dict[str, Any] = vars(DEVICES[name]) if name in DEVICES else {}
    if missing := [f"--{option}" for option, (field, _) in NUMBERS.items() if field not in known | given]:
        known_names = ", ".join(DEVICES)
        raise ConfigError([f"--device {name} is not known ({known_names}), so it needs {', '.join(missing)}"])
    return Device(**known | {"name": name} | given)


PUBLISHED = (
    ("H200", "h200"),
    ("H100 80GB HBM3", "h100"),
    ("B200", "b200"),
    ("L40S", "l40s"),
    ("GeForce RTX 4090", "rtx4090"),
    ("A100", "a100-80"),
)
"""Part of a name that CUDA reports -> the device whose data sheet has its peak. Both A100 have the same; other H100
(PCIe, NVL) have lower ones that are not here."""
OTHERS = ("MIG", "NVL", "GB200", "4090 D", "Laptop")
"""Parts of names of slices, and of GPUs of a like name with another peak."""


def published_peak(name: str, dtype_bytes: int) -> float | None:
    """FLOP/s of dense bfloat16 products by the data sheet of a GPU, None where it is not known or is sliced.

    Args:
        name: as CUDA reports it; a slice (MIG) has only a part of its GPU's peak.
        dtype_bytes: of the weights; data sheets give the peak of two bytes.
    """
    if dtype_bytes != 2 or any(part in name for part in OTHERS):
        return None
    return next((DEVICES[device].peak_flops for part, device in PUBLISHED if part in name), None)


TRY_ROCM = "HAFRM_TRY_ROCM"


def refuse_untried(device: torch.device) -> None:
    """Raises UserError for an AMD GPU, which torch calls cuda as well, unless the environment says to try it."""
    if device.type == "cuda" and torch.version.hip and os.environ.get(TRY_ROCM) != "1":
        raise UserError(
            f"this torch is built for AMD GPUs (ROCm {torch.version.hip}), on which hafrm_ds has never run. To try it "
            f"all the same, with attention by torch's scaled_dot_product_attention alone, set {TRY_ROCM}=1; to run on "
            "CPUs, hide the GPUs: HIP_VISIBLE_DEVICES=-1"
        )
