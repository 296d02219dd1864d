"""Environments in which published versions of packages stand before those that are installed.

Tests that use them are marked `index`. Where no index answers, or it lacks a package, they are skipped, and say so.
"""

import ast
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "--timeout", "20", "--retries", "1")


def requirements(*extras: str) -> dict[str, Requirement]:
    """By name, those of setup.py, with these of its extras."""
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)]
    (call,) = (each for each in calls if isinstance(each.func, ast.Name) and each.func.id == "setup")
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    of_extras = ast.literal_eval(given["extras_require"])
    lines = [*ast.literal_eval(given["install_requires"]), *(line for extra in extras for line in of_extras[extra])]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def floors(*extras: str) -> dict[str, str]:
    """By name, the lowest version that setup.py takes, where it says one."""
    lowest = {
        name: [each.version for each in requirement.specifier if each.operator == ">="]
        for name, requirement in requirements(*extras).items()
    }
    return {name: versions[0] for name, versions in lowest.items() if versions}


@cache
def unreachable() -> str | None:
    """Why no package index answers here; None when one does."""
    with TemporaryDirectory() as folder:
        command = [*PIP, "download", "--no-deps", "--no-cache-dir", "--dest", folder, "iniconfig"]
        result = subprocess.run(command, capture_output=True, text=True)
    return None if result.returncode == 0 else last_line(result.stderr)


def last_line(output: str) -> str:
    return (output.strip().splitlines() or ["pip said nothing"])[-1]


def pip(*arguments: str | Path) -> None:
    """Run pip. Skips where there is no index, or the index lacks the package or this version of it, as mirrors may."""
    if reason := unreachable():
        pytest.skip(f"no package index answers: {reason}")
    variables = os.environ | {"FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}  # its source asks for nvcc before its name
    result = subprocess.run([*PIP, *arguments], capture_output=True, text=True, env=variables)
    if result.returncode == 0:
        return
    pytest.skip(f"cannot be installed here: {last_line(result.stderr)}")


def environment(folder: Path, *arguments: str | Path) -> Path:
    """The python of an environment that sees all that is installed here, but first what pip installs by `arguments`."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    found = {sysconfig.get_path("purelib"), str(Path(torch.__file__).parents[1])}
    (own / "found.pth").write_text("\n".join(sorted(found)) + "\n")
    # Without its local part (+cu130), which an index need not have; the installed one satisfies this all the same.
    (folder / "constraint.txt").write_text(f"torch=={Version(torch.__version__).public}\n")
    options = ("--no-compile", "--no-build-isolation", "--constraint", folder / "constraint.txt")
    pip("--python", python, "install", *options, *arguments)
    return python


def published(folder: Path, requirement: str, path: str, *, is_source: bool = False) -> str:
    """The text of a file in a package, of its wheel or of its source, whose first folder does not count. The package
    stays in `folder`, where the next call finds it."""
    form = ("--no-binary", ":all:") if is_source else ("--only-binary", ":all:")
    own = folder / requirement
    if not list(own.glob("*")):
        pip("download", "--no-deps", "--no-build-isolation", *form, "--dest", own, requirement)
    (archive,) = own.iterdir()
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(path).decode()
    with tarfile.open(archive) as source:
        first = source.next()
        assert first is not None, f"{archive} is empty"
        file = source.extractfile(f"{first.name.partition('/')[0]}/{path}")
        assert file is not None, f"{path} is no file"
        return file.read().decode()
