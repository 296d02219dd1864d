"""Peaks by the names that CUDA reports."""

import pytest

from hafrm_ds.hardware.devices import DEVICES, published_peak


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_the_peak_of_a_known_gpu_is_that_of_its_data_sheet(name, device):
    assert published_peak(name, 2) == DEVICES[device].peak_flops


@pytest.mark.parametrize(
    ("name", "dtype_bytes"),
    [
        ("NVIDIA H200", 4),
        ("NVIDIA H200 MIG 1g.18gb", 2),
        ("NVIDIA H100 PCIe", 2),
        ("NVIDIA H200 NVL", 2),
        ("NVIDIA GB200", 2),
        ("NVIDIA GeForce RTX 4090 D", 2),
    ],
)
def test_of_others_no_peak_is_guessed(name, dtype_bytes):
    assert published_peak(name, dtype_bytes) is None
