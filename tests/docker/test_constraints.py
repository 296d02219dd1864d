"""The versions that the images pin."""

import re
from importlib.metadata import requires
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[2] / "docker/constraints.txt"
IN_THE_IMAGES = ("cuda", "lora", "qlora")


def canonical(requirement: str) -> str:
    """Name of a package, from a requirement or a constraint."""
    return re.sub("[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def test_everything_that_the_package_needs_is_pinned():
    needed = [
        canonical(each)
        for each in requires("hafrm_ds")
        if "extra ==" not in each or any(f'extra == "{extra}"' in each for extra in IN_THE_IMAGES)
    ]
    assert {"torch", "matplotlib", "peft", "flash-attn-4"} <= set(needed)
    pinned = {canonical(line) for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")}
    assert [name for name in needed if name not in pinned] == []
