"""Checkpoints on disk: folders that exist whole or not at all.

    OUTPUT_DIR/checkpoints/step-000040/manifest.json     size and checksum of every other file
    OUTPUT_DIR/checkpoints/step-000040/state.json        TrainingState
    OUTPUT_DIR/checkpoints/step-000040/random-00000.json states of the random number generators of a rank
    OUTPUT_DIR/checkpoints/step-000040/deepspeed/        what DeepSpeed saves
    OUTPUT_DIR/checkpoints/latest                        symbolic link to the newest
    OUTPUT_DIR/checkpoints/set_aside/                    checkpoints that were passed over or left behind

A checkpoint is written under a name that begins with a dot, synced, and renamed when every rank has written its part.
Nothing here knows DeepSpeed or the other ranks. DeepSpeed's files are pickles: resume your own checkpoints only.
"""

import errno
import json
import math
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from hafrm_ds.durability import publish, publish_link, remove_folder, restore_replaced, whole_file
from hafrm_ds.errors import UserError

MANIFEST, STATE, LATEST, SET_ASIDE = "manifest.json", "state.json", "latest", "set_aside"
DEEPSPEED_FOLDER = "deepspeed"
NAME = re.compile(r"step-(\d{6,})")
FORMAT = 1
BLOCK_BYTES = 16 * 2**20
"""Part of a larger file that has a checksum of its own, so that many ranks share the check of few files. Belongs to the
format."""
READ_BYTES = 2**20


class CheckpointError(UserError):
    """A checkpoint cannot be written or resumed."""


class UnreadableError(CheckpointError):
    """A file of a checkpoint is not there, or cannot be read from this host: it need not be damaged."""


@dataclass(frozen=True)
class FileFacts:
    """What the manifest says of a file: size in bytes, and its XXH3 (128 bits) in hex digits, which finds damage at a
    tenth of the time of a cryptographic hash and less.

    blocks: the same of each BLOCK_BYTES of a larger file; checkpoints of before 2026-12 have none.
    """

    bytes: int
    xxh3: str
    blocks: list[str] = field(default_factory=list)


class Checksums:
    """The facts of a file that is being written."""

    def __init__(self) -> None:
        self.bytes, self.whole, self.block = 0, xxhash.xxh3_128(), xxhash.xxh3_128()
        self.blocks: list[str] = []

    def update(self, data) -> None:
        """Take note of the next bytes: any object that is a contiguous buffer."""
        left = memoryview(data).cast("B")
        self.whole.update(left)
        while len(left):
            part = left[: BLOCK_BYTES - self.bytes % BLOCK_BYTES]
            self.block.update(part)
            self.bytes += len(part)
            if self.bytes % BLOCK_BYTES == 0:
                self.end_block()
            left = left[len(part) :]

    def end_block(self) -> None:
        self.blocks.append(self.block.hexdigest())
        self.block = xxhash.xxh3_128()

    def facts(self) -> FileFacts:
        """Called once, after the last byte."""
        if self.bytes % BLOCK_BYTES:
            self.end_block()
        return FileFacts(self.bytes, self.whole.hexdigest(), self.blocks if len(self.blocks) > 1 else [])


@dataclass(frozen=True)
class TrainingState:
    """What a run needs besides the weights and the optimizer to be resumed.

    step: optimizer steps done.
    world_size, zero_stage: of the processes that saved.
    config: the resolved configuration, with the layout and token budget in use.
    data: name of each set -> fingerprint of its pairs.
    reference: name of the namespace of the start weights, on which reference log-probs and frozen weights rest.
    metric: value of the best metric at this step, None where it was not evaluated.
    best_step, best_value: the best evaluation so far.
    evaluations_since_best: how many have followed it.
    evaluation_is_due: the evaluation after this step was not made.
    last_evaluation: set -> its metrics at the last evaluation.
    uses_stock_logits: of the model (`HybridModel`), as the run has found at its start.
    alpha: the weight of the policy loss that objective.policy_share has led to; None without a share.
    judge: what either head counts in the combined judge, as the last evaluation has fitted it; None where it has not.
    """

    step: int
    world_size: int
    zero_stage: int
    config: dict
    data: dict[str, str]
    reference: str
    metric: float | None
    best_step: int | None
    best_value: float | None
    evaluation_is_due: bool
    last_evaluation: dict[str, dict[str, float]]
    uses_stock_logits: bool = False
    evaluations_since_best: int = 0
    alpha: float | None = None
    judge: dict[str, Any] | None = None

    @property
    def evaluation_of_step(self) -> dict[str, dict[str, float]]:
        """Set -> its metrics after this very step; {} if it was not evaluated."""
        return {} if self.metric is None else self.last_evaluation

    @property
    def judge_of_step(self) -> dict[str, Any] | None:
        """The judge that was fitted after this very step, if any was."""
        return None if self.metric is None else self.judge


def checkpoint_name(step: int) -> str:
    return f"step-{step:06}"


def saved_steps(root: Path) -> dict[int, Path]:
    """Step -> folder of everything that has the name of a checkpoint, the newest first."""
    found = {}
    for path in root.iterdir() if root.is_dir() else ():
        if (match := NAME.fullmatch(path.name)) and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items(), reverse=True))


def restore_replaced_steps(root: Path) -> None:
    """Give checkpoints back their names if a process was killed while it saved them again."""
    for left in root.glob(".step-*.replaced"):
        restore_replaced(root / left.stem.removeprefix("."))


# ---- reading -------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, FileFacts]:
    """File name -> facts, after a look at what costs no reading: names and sizes.

    Raises:
        CheckpointError: says what is wrong with the folder.
        UnreadableError: a file cannot be read from here.
    """
    try:
        content = json.loads((folder / MANIFEST).read_text())
        files = {name: FileFacts(**facts) for name, facts in content["files"].items()}
        step = content["step"]
    except OSError as error:
        raise UnreadableError(f"its {MANIFEST} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"its {MANIFEST} is damaged") from error
    if content.get("format") != FORMAT:
        raise CheckpointError(f"its format is {content.get('format')}; this version reads {FORMAT}")
    if checkpoint_name(step) != folder.name:
        raise CheckpointError(f"its {MANIFEST} belongs to {checkpoint_name(step)}")
    for name, facts in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise UnreadableError(f"{name} cannot be read: {error.strerror}") from error
        if size != facts.bytes:
            raise CheckpointError(f"{name} has {size:,} bytes instead of {facts.bytes:,}")
    return files


def damaged_file(
    folder: Path, files: Iterable[tuple[str, FileFacts]], rank: int = 0, world_size: int = 1
) -> str | None:
    """What is wrong with the first file whose content has not the checksum of the manifest.

    Args:
        rank, world_size: each of so many callers reads its share of the bytes, and sees the faults that are in it.

    Raises:
        UnreadableError: a file cannot be read from here.
    """

    def problem(part: tuple[str, int, int, str]) -> str | None:
        name, start, stop, expected = part
        found = xxhash.xxh3_128()
        try:
            with (folder / name).open("rb", buffering=0) as handle:
                handle.seek(start)
                while start < stop and (data := handle.read(min(READ_BYTES, stop - start))):
                    found.update(data)
                    start += len(data)
        except OSError as error:
            raise UnreadableError(f"{name} cannot be read: {error.strerror}") from error
        return None if found.hexdigest() == expected else f"{name} does not have the checksum in {MANIFEST}"

    with ThreadPoolExecutor() as pool:
        return next(filter(None, pool.map(problem, [*checked_parts(files)][rank::world_size])), None)


def checked_parts(files: Iterable[tuple[str, FileFacts]]) -> Iterator[tuple[str, int, int, str]]:
    """(file name, where it begins, where it ends, checksum) of whatever has one: blocks, or a whole file."""
    for name, facts in files:
        whole = (0, facts.bytes, facts.xxh3)
        starts = range(0, facts.bytes, BLOCK_BYTES)
        blocks = [(start, min(start + BLOCK_BYTES, facts.bytes), each) for start, each in zip(starts, facts.blocks)]
        for start, stop, checksum in blocks or [whole]:
            yield name, start, stop, checksum


def read_state(folder: Path) -> TrainingState:
    return TrainingState(**json.loads((folder / STATE).read_text()))


# ---- writing -------------------------------------------------------------------------------------------------------


def start_draft(root: Path, step: int, expected_bytes: int) -> Path:
    """Make the folder that a checkpoint is written in, and clear away what earlier, killed saves have left. What cannot
    be deleted, such as a file on NFS that is still open, stays.

    Raises:
        CheckpointError: there is too little space, or the folder cannot be made.
    """
    try:
        for left in root.glob(".*"):
            with suppress(OSError):
                shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink()
        draft = root / f".{checkpoint_name(step)}"
        (draft / DEEPSPEED_FOLDER).mkdir(parents=True)
        free = shutil.disk_usage(root).free
    except OSError as error:
        raise CheckpointError(f"checkpoints cannot be written to {root}: {reason_of(error)}") from error
    if free < expected_bytes:
        shutil.rmtree(draft)
        raise CheckpointError(
            f"a checkpoint needs about {expected_bytes:,} bytes, and {root} has {free:,} free: make room, or set "
            "--checkpoint.keep_last lower"
        )
    return draft


def complete(draft: Path, root: Path, state: TrainingState, files: dict[str, FileFacts]) -> Path:
    """Complete a draft and give it its name.

    Raises:
        CheckpointError: a file that another rank has written is not seen from here.
    """
    for name, facts in files.items():
        if not (draft / name).is_file() or (draft / name).stat().st_size != facts.bytes:
            raise CheckpointError(
                f"{name}, which a rank has written, is not whole in {draft}: output_dir must be one folder that all "
                "nodes see"
            )
    files = files | {STATE: write_json(draft / STATE, asdict(state))}
    listed = {name: asdict(files[name]) for name in sorted(files)}
    for entry in listed.values():
        if not entry["blocks"]:
            del entry["blocks"]
    content = {"format": FORMAT, "step": state.step, "files": listed}
    write_json(draft / MANIFEST, content)
    folder = root / checkpoint_name(state.step)
    publish(draft, folder)
    publish_link(root / LATEST, folder.name)
    return folder


def write_json(path: Path, content: dict) -> FileFacts:
    """Write JSON to disk, not only to the page cache."""
    data = json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"
    with whole_file(path) as file:
        file.write(data)
    return FileFacts(len(data), xxhash.xxh3_128_hexdigest(data))


def prune(root: Path, keep_last: int, best_step: int | None, is_better: Callable[[float, float], bool]) -> None:
    """Delete all but the newest `keep_last` checkpoints and the best evaluated one. Damaged ones count as none.

    Args:
        best_step: of the best evaluation. If it was not saved, the best that was is kept, of equal ones the older.
        is_better: whether the first of two values of the best metric is the better one.
    """
    good: list[tuple[Path, float | None]] = []
    for folder in saved_steps(root).values():
        try:
            read_manifest(folder)
            good.append((folder, read_state(folder).metric))
        except (CheckpointError, OSError, ValueError, TypeError):
            continue
    best: Path | None = None
    best_value = math.nan
    for folder, value in reversed(good):
        if best_step is not None and folder.name == checkpoint_name(best_step):
            best = folder
            break
        if value is not None and not math.isnan(value) and (best is None or is_better(value, best_value)):
            best, best_value = folder, value
    for folder, _ in good[keep_last:]:
        if folder != best:
            remove_folder(folder)


def set_aside(root: Path, after_step: int) -> list[Path]:
    """Move checkpoints after a step out of the way, before a run resumes from it; returns their new places."""
    places = []
    for step, folder in saved_steps(root).items():
        if step > after_step:
            place, number = root / SET_ASIDE / folder.name, 1
            while place.exists():
                number += 1
                place = place.with_name(f"{folder.name}-{number}")
            place.parent.mkdir(exist_ok=True)
            places.append(folder.rename(place))
    latest = root / LATEST
    if latest.is_symlink() and not latest.exists():
        latest.unlink()
    return places


def reason_of(error: OSError) -> str:
    return "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)


# ---- random numbers ------------------------------------------------------------------------------------------------


def random_file(rank: int) -> str:
    return f"random-{rank:05}.json"


def random_state() -> dict:
    """States of the generators of python, numpy and torch in this process, as JSON can hold them."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": bytes(torch.get_rng_state().tolist()).hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = bytes(torch.cuda.get_rng_state().tolist()).hex()
    return state


def restore_random_state(state: dict) -> None:
    def tensor(digits: str) -> torch.Tensor:
        return torch.frombuffer(bytearray.fromhex(digits), dtype=torch.uint8)

    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensor(state["cuda"]))
