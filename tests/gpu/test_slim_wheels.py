"""What tests/gpu/first_run.sh needs is in its slim list of wheels, or comes with torch and transformers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.without_gpu.package_index import last_line, requirements, unreachable

FOLDER = Path(__file__).parent
FIRST_MINUTES = (
    "first_step",
    "test_kernels",
    "test_token_logprobs",
    "test_models",
    "benchmark",
    "stages",
    "tell_at_once",
)
WITH_TORCH_AND_TRANSFORMERS = {
    *("torch", "transformers", "numpy", "safetensors"),
    *("huggingface-hub", "pyyaml", "h11", "filelock"),
}
SCRIPT = """
import importlib, importlib.metadata, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
import deepspeed
known = importlib.metadata.packages_distributions()
found = {name.partition(".")[0] for name in sys.modules} & known.keys()
print("loaded:", *(f"{name}={known[name][0]}" for name in sorted(found)))
"""


def canonical(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def test_the_first_minutes_import_nothing_beyond_the_list():
    lines = (FOLDER / "slim_wheels.txt").read_text().splitlines()
    slim = {canonical(line.partition("==")[0]) for line in lines if not line.startswith("#")}
    modules = [f"tests.gpu.{name}" for name in FIRST_MINUTES]
    result = subprocess.run([sys.executable, "-c", SCRIPT, *modules], capture_output=True, text=True)
    assert "loaded:" in result.stdout, result.stderr[-2000:]
    loaded = dict(each.split("=") for each in result.stdout.partition("loaded:")[2].split())
    assert {"torch", "deepspeed", "hypothesis"} <= loaded.keys()
    required = {canonical(name) for name in requirements("lora", "qlora", "wandb", "gpu-test", "test")}
    assert {"pyarrow", "datasets", "trl", "matplotlib"} <= required
    # transformers loads more of what happens to be installed, and does without.
    beyond = required & {canonical(each) for each in loaded.values()} - slim - WITH_TORCH_AND_TRANSFORMERS
    assert beyond == set()


@pytest.mark.index
@pytest.mark.slow
def test_the_list_stays_under_its_limit(tmp_path):
    if reason := unreachable():
        pytest.skip(f"no package index answers: {reason}")
    result = subprocess.run(["bash", FOLDER / "slim_wheels.sh", tmp_path], capture_output=True, text=True)
    if "MiB of at most" not in result.stdout:
        pytest.skip(f"a wheel cannot be had here: {last_line(result.stderr)}")
    assert result.returncode == 0, result.stdout
