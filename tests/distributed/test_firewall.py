"""A run whose hosts filter the ports between them, in a network namespace with a firewall of its own."""

import os
import shutil
import subprocess

import pytest

from tests.clusters.tiny_run import options, steps, write_setting
from tests.distributed.launching import LAUNCHER, REPOSITORY, free_port

pytestmark = pytest.mark.distributed

ENTER = ["unshare", "--net", "bash", "-c"]
CLOSE = "ip link set lo up && iptables -A INPUT -p tcp --syn ! --dport {port} -j DROP"
OPEN = "iptables -F INPUT"
SAID = "does not reach the watch of rank 0"


def can_filter() -> bool:
    """Whether a namespace with a firewall can be made here: it takes root, iproute2 and iptables."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "ip", "iptables"))):
        return False
    return subprocess.run([*ENTER, CLOSE.format(port=1)], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_filter(), reason="needs root, iproute2 and iptables")
def test_a_run_whose_watch_is_filtered_trains_and_says_so(tmp_path):
    """Only the rendezvous port is open until the ranks have given the watch up; then gloo needs the others."""
    write_setting(tmp_path)
    port, log = free_port(), tmp_path / "log"
    run = [LAUNCHER, "--num_gpus", 2, "--master_port", port, "launch/train.py", *options(tmp_path, 2)]
    words = " ".join(f"'{word}'" for word in [*run, "--output_dir", tmp_path / "run"])
    script = f"""{CLOSE.format(port=port)} || exit 9
(until grep -q '{SAID}' {log}; do sleep 0.2; done; {OPEN}) &
{words} > {log} 2>&1"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([*ENTER, script], cwd=REPOSITORY, env=environment, timeout=300)
    printed = log.read_text()
    assert result.returncode == 0, printed[-3000:]
    assert printed.count(SAID) == 1, printed[-3000:]
    assert "timed out" in next(line for line in printed.splitlines() if SAID in line)
    assert steps(tmp_path / "run") == 2
