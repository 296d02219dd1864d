"""FlashAttention 4, in the versions that the image pins, compiles the kernels of this project's calls for sm_90a and
sm_100a, and keeps them on disk. Installs 330 MB for the time of the test."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.without_gpu.package_index import ROOT, environment

pytestmark = [pytest.mark.index, pytest.mark.slow]

PACKAGES = (
    *("flash-attn-4", "nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-base", "nvidia-cutlass-dsl-libs-core"),
    *("nvidia-cutlass-dsl-libs-cu13", "quack-kernels", "apache-tvm-ffi", "torch_c_dlpack_ext", "einops"),
    *("cuda-bindings", "cuda-pathfinder"),
)
AT_ONCE = "64:0"
VARIANTS = {"sm_90": ("128:50", "256:0"), "sm_100": ("128:0", "64:50")}
"""Heads and windows, beside the variant of sm_90 that two ranks compile at once; sm_100 has no heads of 256 here."""
MULTIPROCESSORS = {"sm_90": 132, "sm_100": 148}


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    constraints = ("--constraint", ROOT / "docker" / "constraints.txt")
    return environment(tmp_path_factory.mktemp("flash_attention_4"), "--no-deps", *constraints, *PACKAGES)


def start(python: Path, architecture: str, cache: Path, *variants: str) -> subprocess.Popen:
    """Compile variants, with what an entry file of this project sets for the cache on disk."""
    script = (
        "import sys; from hafrm_ds.processes.ranks import keep_compiled_kernels; keep_compiled_kernels()\n"
        "from tests.without_gpu.compile_flash_attention_4 import main; main(sys.argv[1:])"
    )
    variables = {name: text for name, text in os.environ.items() if not name.startswith("FLASH_ATTENTION")} | {
        "CUTE_DSL_ARCH": f"{architecture}a",
        "FLASH_ATTENTION_ARCH": architecture,
        "FLASH_ATTENTION_NUM_SMS": str(MULTIPROCESSORS[architecture]),
        "XDG_CACHE_HOME": str(cache),
        "PYTHONPATH": str(ROOT),
    }
    command = [python, "-W", "ignore", "-c", script, *variants]
    return subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def seconds(process: subprocess.Popen) -> list[float]:
    """Of forward and backward of each variant."""
    output, _ = process.communicate()
    print(output)
    assert process.returncode == 0, output[-3000:]
    return [float(each) for each in re.findall(r"ward ([\d.]+) s", output)]


def kept(cache: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in cache.rglob("*.o")}


@pytest.mark.parametrize("architecture", VARIANTS)
def test_kernels_compile(python, tmp_path, architecture):
    found = seconds(start(python, architecture, tmp_path, *VARIANTS[architecture]))
    assert len(found) == 2 * len(VARIANTS[architecture])
    assert len(kept(tmp_path)) >= len(found)


def test_ranks_that_compile_at_once_leave_kernels_that_the_next_run_only_loads(python, tmp_path):
    for rank in [start(python, "sm_90", tmp_path, AT_ONCE) for _ in range(2)]:
        assert sum(seconds(rank)) > 0
    before = kept(tmp_path)
    assert len(before) >= 2
    again = seconds(start(python, "sm_90", tmp_path, AT_ONCE))
    assert kept(tmp_path) == before
    assert len(again) == 2
