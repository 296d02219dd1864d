"""A script that runs in namespaces of its own, in which it may give out addresses and replace files."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

from tests.distributed.launching import REPOSITORY


def enter_namespaces(module: str, *needed: str) -> None:
    """Start this script again in a network and a file namespace; refused without root or a command that is needed."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = [name for name in ("unshare", "ip", *needed) if not shutil.which(name)]
    if missing or os.geteuid() != 0:
        sys.exit(f"python -m {module} needs root, and these commands, which are missing: {' '.join(missing) or 'none'}")
    if "--inside" not in sys.argv:
        command = ["unshare", "--mount", "--net", "--propagation", "private", sys.executable, "-m", module]
        os.execvp("unshare", [*command, *sys.argv[1:], "--inside"])


def call(*words) -> str:
    """What a command prints; it must succeed."""
    result = subprocess.run([str(word) for word in words], cwd=REPOSITORY, text=True, capture_output=True)
    if result.returncode:
        sys.exit(f"FAILED: {' '.join(map(str, words))}: status {result.returncode}\n{result.stdout}{result.stderr}")
    return result.stdout.strip()


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            sys.exit(f"FAILED: after {seconds:.0f} s still waiting for {what}")
        time.sleep(0.2)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)
