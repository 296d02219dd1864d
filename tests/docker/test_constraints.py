"""The versions that the images pin."""

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
IN_THE_IMAGES = ("cuda", "liger", "lora", "qlora", "serve")


def canonical(requirement: str) -> str:
    """Name of a package, from a requirement or a constraint."""
    return re.sub("[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def test_everything_that_the_package_needs_is_pinned_to_a_version_that_it_takes(monkeypatch):
    given = {}
    stub = SimpleNamespace(setup=given.update, find_packages=lambda **options: [])
    monkeypatch.setitem(sys.modules, "setuptools", stub)
    runpy.run_path(str(ROOT / "setup.py"))
    needed = [*given["install_requires"], *(each for extra in IN_THE_IMAGES for each in given["extras_require"][extra])]
    assert {"torch", "matplotlib", "peft", "flash-attn-4"} <= set(map(canonical, needed))
    lines = (ROOT / "docker/constraints.txt").read_text().splitlines()
    pinned = {canonical(line): line.partition("==")[2] for line in lines if not line.startswith("#")}
    assert [each for each in needed if canonical(each) not in pinned] == []
    wanted = {canonical(each): Requirement(each).specifier for each in needed}
    assert [name for name, versions in wanted.items() if not versions.contains(pinned[name], prereleases=True)] == []
