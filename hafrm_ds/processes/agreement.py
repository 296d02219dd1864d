"""What all hosts of a run must have in common, and the message when they do not.

Rank 0 tells its facts, every rank compares them with its own, and only what differs comes back.
"""

import hashlib
import importlib.metadata
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch

PACKAGES = ("hafrm_ds", "torch", "transformers", "deepspeed", "datasets", "tokenizers", "numpy", "pyarrow")
HOSTS_NAMED = 5
HASH = re.compile("[0-9a-f]{64}")


def versions() -> dict[str, str | None]:
    """Package -> its version, None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def software() -> dict[str, str | None]:
    """Versions of Python and of the packages, and a hash of the code of hafrm_ds: checkouts change between versions."""
    return {"python": platform.python_version(), **versions(), "code of hafrm_ds": code_hash()}


def environment(world_size: int, device: torch.device) -> dict:
    """Versions, hardware and command of a run, for environment.json."""
    cuda = torch.cuda.is_available()
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "world_size": world_size,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or "cpu",
        "cuda": torch.version.cuda if cuda else None,
        "cores": os.cpu_count(),
        "packages": versions(),
    }


@cache
def code_hash() -> str:
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def differences(expected: Mapping[str, str | None], own: Mapping[str, str | None]) -> dict[str, list[str | None]]:
    """Name -> [value of rank 0, value here], where they are not the same; None stands for what is not there."""
    names = dict.fromkeys([*expected, *own])
    return {name: [expected.get(name), own.get(name)] for name in names if expected.get(name) != own.get(name)}


def disagreement(subject: str, first_host: str, found: Sequence[tuple[str, dict[str, list[str | None]]]]) -> str | None:
    """The message for the differences that all ranks have found; None if there are none.

    Args:
        found: host of each rank, and what `differences` gave there.
    """
    hosts_of: dict[str, dict[str, None]] = {}
    for host, different in found:
        for name, (theirs, own) in different.items():
            hosts_of.setdefault(f"{name} is {shown(own)}, and {shown(theirs)} on {first_host}", {})[host] = None
    if not hosts_of:
        return None
    lines = "".join(f"\n  - {listed(list(hosts))}: {line}" for line, hosts in hosts_of.items())
    return f"the hosts of this run differ from {first_host}, where rank 0 runs, in {subject}:{lines}"


def shown(value: str | None) -> str:
    """A fact as the message shows it: of a hash, its first digits."""
    if value is None:
        return "not there"
    return value[:12] if HASH.fullmatch(value) else value


def listed(hosts: Sequence[str]) -> str:
    named = ", ".join(hosts[:HOSTS_NAMED])
    return named if len(hosts) <= HOSTS_NAMED else f"{named} and {len(hosts) - HOSTS_NAMED} more"
