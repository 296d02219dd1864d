"""The nevers of the house that import-linter does not hold, and that its contract is really held."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hafrm_ds"
NO_NAMES = ("utils", "helpers", "misc", "common", "base")
PRIVATE = re.compile(r"ds_\w+|_hp_mapping")
"""What DeepSpeed hangs on parameters."""
LONGEST_ENTRY_FILE = 100


def trees(*folders: str) -> Iterator[tuple[Path, ast.Module]]:
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            yield file.relative_to(ROOT), ast.parse(file.read_text())


def test_private_fields_of_deepspeed_are_read_in_engine_alone():
    found = [
        f"{file}:{node.lineno}"
        for file, tree in trees("hafrm_ds")
        if "engine" not in file.parts
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr))
        or (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr" and private_name(node))
    ]
    assert found == []


def private_name(call: ast.Call) -> bool:
    name = call.args[1]
    return isinstance(name, ast.Constant) and PRIVATE.fullmatch(str(name.value)) is not None


def test_no_file_or_function_is_called_after_nothing():
    found = [str(file) for file, _ in trees("hafrm_ds", "launch", "tests") if file.stem in NO_NAMES]
    for file, tree in trees("hafrm_ds", "launch"):
        found += [
            f"{file}: {node.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in NO_NAMES
        ]
    assert found == []


def test_no_state_at_module_level():
    """Constants and types have capital letters; a lower-case name would be a variable."""
    found = []
    for file, tree in trees("hafrm_ds"):
        found += [f"{file}:{node.lineno}: global" for node in ast.walk(tree) if isinstance(node, ast.Global)]
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            found += [
                f"{file}:{node.lineno}: {name}"
                for name in names
                if name.islower() and not name.startswith("__") and not isinstance(node, ast.For)
            ]
    assert found == []


def test_what_a_text_points_at_is_there():
    """A name of ours in backquotes, as `room.module.function`, leads to something, also after a move."""
    rooms = {path.stem for path in PACKAGE.iterdir()}
    missing = []
    for file, tree in trees("hafrm_ds", "launch"):
        documented = (node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))
        text = "\n".join(ast.get_docstring(node) or "" for node in documented)
        for name in re.findall(r"`([a-z_]+(?:\.\w+)+)`", text):
            first = name.removeprefix("hafrm_ds.").split(".")[0]
            if (first in rooms or name.startswith("hafrm_ds.")) and not leads_somewhere(name.removeprefix("hafrm_ds.")):
                missing.append(f"{file}: {name}")
    assert missing == []


def leads_somewhere(name: str) -> bool:
    """Whether a dotted name is a file or folder of the package, or is defined at the top of a file of it."""
    path = PACKAGE / name.replace(".", "/")
    if path.is_dir() or path.with_suffix(".py").is_file():
        return True
    file = path.parent.with_suffix(".py")
    return (
        file.is_file() and re.search(rf"^(def|class) {path.name}\b|^{path.name}\b", file.read_text(), re.M) is not None
    )


def test_entry_files_are_short():
    long = {
        file.name: lines
        for file in (ROOT / "launch").glob("*.py")
        if (lines := len(file.read_text().splitlines())) > LONGEST_ENTRY_FILE
    }
    assert long == {}


def test_what_is_imported_is_declared():
    """Directly, not by way of what another package needs."""
    setup = (ROOT / "setup.py").read_text()
    imported = {
        name.partition(".")[0]
        for _, tree in trees("hafrm_ds", "launch")
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and node.level == 0
            else []
        )
    }
    known = packages_distributions()
    foreign = imported - set(sys.stdlib_module_names) - {"hafrm_ds", "launch", "setuptools"}
    missing = [name for name in sorted(foreign) if not any(is_in(setup, each) for each in known.get(name, []))]
    # Those that are not installed here belong to extras.
    assert [name for name in missing if name in known] == []


def is_in(setup: str, distribution: str) -> bool:
    pattern = re.sub("[-_.]+", "[-_.]", re.escape(distribution).replace(r"\-", "-"))
    return re.search(rf'"{pattern}["><=]', setup, re.IGNORECASE) is not None


@pytest.mark.parametrize(
    "file, line",
    [
        ("hafrm_ds/model/hybrid.py", "from hafrm_ds.training import run"),
        ("hafrm_ds/data/packing.py", "from hafrm_ds.config import TrainConfig"),
        ("hafrm_ds/reference/store.py", "from hafrm_ds.scoring import rows"),
        ("hafrm_ds/training/loop.py", "import deepspeed"),
    ],
)
def test_an_import_that_is_turned_round_is_found(file, line, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "hafrm_ds", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".importlinter", tmp_path)
    target = tmp_path / file
    target.write_text(f"{target.read_text()}\n\n{line}\n")
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 1
    assert "BROKEN" in result.stdout


def test_a_wheel_holds_every_file_of_the_package(tmp_path):
    """What is no Python is named in setup.py; documents for whoever reads the source stay behind."""
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    built = {file.relative_to(tmp_path / "hafrm_ds") for file in (tmp_path / "hafrm_ds").rglob("*") if file.is_file()}
    there = {file.relative_to(PACKAGE) for file in PACKAGE.rglob("*") if file.is_file() and file.suffix != ".pyc"}
    assert built == {file for file in there if file.name != "README.md"}
