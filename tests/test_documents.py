"""What documents say is there: links, headings, paths, options, the rooms of the map."""

import importlib.util
import inspect
import itertools
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from hafrm_ds.config import TrainConfig, option_names
from hafrm_ds.training.rounds.options import RoundsOptions

ROOT = Path(__file__).parents[1]
FOLDERS = ("launch", "docker", "ds_configs", "hafrm_ds", "tests")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.md"))])
LONGEST_README = 210

LINK = re.compile(r"\]\(([^)\s]+)\)")
PATH = re.compile(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./*-]*")
PLACEHOLDER = re.compile(r"\b[A-Z]{2,}\b")
"""NAME in launch/recipes/NAME.yaml."""
SCRIPT = re.compile(r"(?:launch|tests/benchmarks)/[a-z_]+\.py\b|launch/slurm/[a-z_]+\.(?:sbatch|sh)\b")
OPTION = re.compile(r"(?<![\w-])--([a-z][\w.-]*\w)")
FOREIGN = {
    "deepspeed": "log_level num_gpus module hostfile no_ssh node_rank master_addr",
    "torchrun": "nnodes nproc_per_node node_rank master_addr",
    "srun, sbatch": "nodes ntasks-per-node gpus-per-node gpus-per-task array signal",
    "vllm, sglang": "runner convert enforce-eager return-hidden-states-mode",
    "OpenRLHF, slime, ms-swift": "reward.remote_url rm-type rm-url external_plugins reward_funcs",
    "squeue": "Format",
    "docker, apptainer, enroot": "rm gpus shm-size ulimit user stop-timeout name network nv bind pwd output",
}
"""Options of other programs that documents name."""

GONE = {"reference.per_token"}
"""Options that the changelog names as gone."""

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))


def slugs(document: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@documents
def test_links_lead_somewhere(document):
    dead = []
    for link in LINK.findall(document.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in slugs(target)):
            dead.append(link)
    assert dead == []


@documents
def test_paths_are_there(document):
    named = {path.rstrip(".") for path in PATH.findall(document.read_text()) if not PLACEHOLDER.search(path)}
    assert [path for path in sorted(named) if not any(ROOT.glob(path.rstrip("/")))] == []


@documents
def test_options_are_there(document):
    """After the name of a script those that it takes, elsewhere those of any script or of another known program."""
    anywhere = set(option_names(TrainConfig)) | set(" ".join(FOREIGN.values()).split())
    scripts = ("launch/*.py", "tests/benchmarks/*.py", "hafrm_ds/quickstart.py")
    for script in itertools.chain.from_iterable(map(ROOT.glob, scripts)):
        anywhere |= options_of_script(script.relative_to(ROOT).as_posix())
    unknown = []
    for code in pieces_of_code(document.read_text()):
        script = SCRIPT.search(code)
        before, after = (code[: script.start()], code[script.end() :]) if script else (code, "")
        unknown += [f"--{name}: {code}" for name in OPTION.findall(before) if name not in anywhere]
        known = options_of_script(script.group()) if script else set()
        unknown += [f"--{name}: {code}" for name in OPTION.findall(after) if name not in known]
    assert unknown == []


@documents
def test_options_that_are_named_by_their_section_are_there(document):
    known = {".".join(name.split(".")[:2]) for name in option_names(RoundsOptions) if "." in name}
    sections = "|".join({name.partition(".")[0] for name in known})
    # What follows such a name is nothing, a value or a part of it; `model.safetensors` and the like are files.
    named = re.compile(rf"(?:{sections})\.(?!safetensors|json|py\b)[a-z_]+(?=$|[ =:.])")
    found = [match.group() for code in pieces_of_code(document.read_text()) if (match := named.match(code))]
    assert [name for name in found if name not in known | GONE] == []


def pieces_of_code(text: str) -> Iterator[str]:
    """Commands of indented blocks, their continued lines joined, and code between backticks."""
    prose = []
    for block in re.split(r"\n(?: *\n)+", text):
        lines = block.splitlines()
        if all(line.startswith("    ") for line in lines):
            yield from re.sub(r"\\\n\s*", " ", block).splitlines()
        else:
            prose.append(block)
    yield from re.findall(r"`([^`]+)`", "\n\n".join(prose))


@cache
def options_of_script(script: str) -> set[str]:
    if script.startswith("launch/slurm/"):  # passes its options on
        text = (ROOT / script).read_text()
        return {name for each in re.findall(r"launch/\w+\.py", text) for name in options_of_script(each)} | set(
            option_names(TrainConfig) if "train.sbatch" in text else ()
        ) | {"config"}  # fmt: skip
    if script.startswith(("tests/", "hafrm_ds/")):
        return set(option_names(TrainConfig)) | {"config"} | set(re.findall(r'"--(\w+)"', (ROOT / script).read_text()))
    return set(OPTION.findall(help_of(script)))


def help_of(script: str) -> str:
    """What an entry file prints for --help."""
    spec = importlib.util.spec_from_file_location(f"documented_{Path(script).stem}", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        patch.setattr(
            "argparse.ArgumentParser._print_message", lambda self, message, file=None: printed.append(message)
        )
        patch.setattr("sys.argv", [script, "--help"])
        patch.delenv("RANK", raising=False)
        with pytest.raises(SystemExit):
            module.main(*([["--help"], None] if inspect.signature(module.main).parameters else []))
    return "\n".join(printed)


def test_the_map_shows_every_room():
    section = (ROOT / "README.md").read_text().split("## The map of the house")[1].split("\n## ")[0]
    shown = re.findall(r"^ {6}(\S+)|;\s+(\S+(?:\.py|/)):", section, re.MULTILINE)
    inside = {first or second for first, second in shown}
    there = {
        file.name + "/" * file.is_dir()
        for file in (ROOT / "hafrm_ds").iterdir()
        if file.suffix == ".py" or (file / "__init__.py").exists()
    }
    assert inside == there - {"__init__.py"}
    outside = re.findall(r"^ {4}(\w+/)", section, re.MULTILINE)
    assert sorted(outside) == sorted(f"{folder}/" for folder in FOLDERS)


def test_the_first_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= LONGEST_README
