"""The versions that the images pin."""

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[2]
IN_THE_IMAGES = ("cuda", "lora", "qlora")


def canonical(requirement: str) -> str:
    """Name of a package, from a requirement or a constraint."""
    return re.sub("[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def test_everything_that_the_package_needs_is_pinned(monkeypatch):
    given = {}
    stub = SimpleNamespace(setup=given.update, find_packages=lambda **options: [])
    monkeypatch.setitem(sys.modules, "setuptools", stub)
    runpy.run_path(str(ROOT / "setup.py"))
    needed = [canonical(each) for each in given["install_requires"]]
    needed += [canonical(each) for extra in IN_THE_IMAGES for each in given["extras_require"][extra]]
    assert {"torch", "matplotlib", "peft", "flash-attn-4"} <= set(needed)
    lines = (ROOT / "docker/constraints.txt").read_text().splitlines()
    pinned = {canonical(line) for line in lines if not line.startswith("#")}
    assert [name for name in needed if name not in pinned] == []
