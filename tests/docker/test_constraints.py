"""The versions that the images pin."""

import re
import runpy
from pathlib import Path

import setuptools

ROOT = Path(__file__).parents[2]


def canonical(name: str) -> str:
    return re.sub("[-_.]+", "-", name).lower()


def test_everything_that_the_package_needs_is_pinned(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    lines = (ROOT / "docker/constraints.txt").read_text().splitlines()
    pinned = {canonical(line.split("==")[0]) for line in lines if not line.startswith("#")}
    needed = [*given["install_requires"], *(package for extra in ("cuda", "lora", "qlora")
                                            for package in given["extras_require"][extra])]  # fmt: skip
    assert len(needed) > 20
    assert [package for package in needed if canonical(re.match(r"[\w.-]+", package)[0]) not in pinned] == []
