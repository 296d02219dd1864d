"""Runs through the real launcher, which costs seconds (`forked_ranks` does without it), and what runs are made of."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
LAUNCHER = Path(sys.executable).parent / "deepspeed"
COMMAND = [LAUNCHER] if LAUNCHER.exists() else [sys.executable, "-m", "deepspeed.launcher.runner"]
"""Where packages are only unpacked (tests/gpu/first_run.sh) there is no command."""


def write_stages(folder: Path) -> None:
    """Write zero0.json to zero3.json, under the last of which every parameter is partitioned, small ones too."""
    for stage in range(4):
        zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
        (folder / f"zero{stage}.json").write_text(json.dumps({"zero_optimization": zero}))


def free_port() -> int:
    """One that the system gives to nobody else for the next minute, as its last connection was closed just now."""
    with socket.create_server(("127.0.0.1", 0)) as probe, socket.create_connection(probe.getsockname()):
        probe.accept()[0].close()
        return probe.getsockname()[1]


def launch(num_ranks: int, script: str, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess:
    """`deepspeed --num_gpus N script arguments`, with stdout and stderr captured together."""
    command = [*COMMAND, "--num_gpus", num_ranks, "--master_port", free_port(), script, *arguments]
    return subprocess.run(
        [str(word) for word in command],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


TINY_RUN = {
    "model.dtype": "float32",
    "data.max_length": 120,
    "batch.global_batch_size": 8,
    "batch.max_tokens_per_micro_batch": 150,
    "logging.tensorboard": "false",
    "logging.report": "false",
    "resume": "auto",
}
"""Options of runs of a tiny model on `write_pairs` that are resumed, beside those that name files."""


def as_options(values: dict, **changes: object) -> list[str]:
    """{"section.key": value} -> command-line words. Of changes, whose names have __ for the dot, each replaces or adds
    one."""
    values = values | {key.replace("__", "."): value for key, value in changes.items()}
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def rows(run: Path, kind: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()  # the last may be half written
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def write_pairs(path: Path, num_pairs: int, seed: int = 0) -> Path:
    """Short pairs of uneven lengths: the chosen answer has more vowels."""
    source = random.Random(seed)

    def text(letters: str, low: int, high: int) -> str:
        return "".join(source.choice(letters) for _ in range(source.randrange(low, high)))

    with path.open("w") as file:
        for _ in range(num_pairs):
            row = {"prompt": text("abcdefg ", 1, 30), "chosen": text("aeiou", 1, 20), "rejected": text("bcdfg", 1, 20)}
            file.write(json.dumps(row) + "\n")
    return path


def write_groups(path: Path, num_groups: int, seed: int = 0) -> Path:
    """Groups of three to six scored answers, some of them equal: an answer's score is its number of vowels. They have
    attributes besides, of which every third answer lacks one."""
    source = random.Random(seed)

    def text(letters: str, low: int, high: int) -> str:
        return "".join(source.choice(letters) for _ in range(source.randrange(low, high)))

    with path.open("w") as file:
        for _ in range(num_groups):
            answers = [text("aeioubcdfg", 1, 20) for _ in range(source.randrange(2, 6))] + [text("aeiou", 20, 25)]
            scores = [sum(letter in "aeiou" for letter in answer) for answer in answers]
            row = {"prompt": text("abcdefg ", 1, 30), "responses": answers, "scores": scores}
            lengths = [None if place % 3 == 2 else len(answer) for place, answer in enumerate(answers)]
            row["attributes"] = [{"vowels": a, "length": b} for a, b in zip(scores, lengths)]
            file.write(json.dumps(row) + "\n")
    return path
