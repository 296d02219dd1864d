"""Work in parts, done by any number of processes, that may be killed at any time.

A part is written under another name, synced and renamed, so it exists whole or not at all; a job that was killed
resumes with the parts that are missing. Which work makes a part must depend on the job alone, and what is computed
together must lie within a part: then the results depend neither on kills nor on the number of processes, unless a model
is sharded over them.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from hafrm_ds.durability import remove_folder, write_whole
from hafrm_ds.errors import DataError
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.ranks import Processes


def claim_folder(
    folder: Path,
    identity: dict[str, Any],
    *,
    replaces: bool = False,
    is_removed: bool = False,
    makes: Iterable[Path] = (),
) -> None:
    """Make the folder of a job's parts, or resume in it.

    Args:
        identity: what the parts depend on, for JSON.
        replaces: whether parts of another job are removed.
        is_removed: whether the folder is, when the job is done.
        makes: files that the job makes. One that is there before the job would be lost, or taken for the job's own.

    Raises:
        DataError: it holds parts of another job, which are not replaced, or files that would be lost with it, or cannot
            be written; or a file that the job makes is there, and no job has claimed the folder.
    """
    text, file = json.dumps(identity, indent=2), folder / "job.json"
    if not file.exists() and (there := [each for each in makes if each.exists()]):
        raise DataError(
            f"{there[0]} is there already, and not of this job, which would write it; move it away, or choose another "
            "output_dir"
        )
    try:
        if replaces and file.exists() and file.read_text() != text:
            remove_parts(folder)
        folder.mkdir(parents=True, exist_ok=True)
        others = sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
        if is_removed and others and not file.exists():
            raise DataError(
                f"{folder} is needed for parts, is removed when the job is done, and holds files of something else "
                f"({others[0]}); rename it, or choose another output"
            )
        if file.exists() and file.read_text() != text:
            raise DataError(
                f"{folder} holds parts of a job with another model, input or setting ({file}); remove it to start anew"
            )
        write_whole(file, text.encode())
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror}") from error


def remove_parts(folder: Path) -> None:
    """Remove the folder of a job's parts; one of something else stays, and so does what cannot be deleted."""
    if (folder / "job.json").exists():
        with suppress(OSError):
            remove_folder(folder)


def stamp(file: Path) -> list[Any]:
    """What tells whether a file has changed, without reading it: its path, size and time of change."""
    facts = file.stat()
    return [str(file.resolve()), facts.st_size, facts.st_mtime_ns]


def work_through(
    name: str,
    parts: dict[Path, int],
    start: Callable[[], Callable[[Path], bytes]],
    processes: Processes,
    log: Console,
    *,
    unit: str,
    together: bool,
    what: str = "parts",
) -> None:
    """Make those of the parts that are not there yet, all processes at once; returns when all are there.

    Args:
        name: of the work, for the progress and for what the processes tell each other; each only once in a job.
        parts: file -> the units of work in it, the same on all processes.
        start: called once by each process, and only where a part is missing (as when it has to load a model for it);
            returns what makes the content of a file.
        together: all processes make every file together, as a sharded model needs; else each takes the next that no
            other has taken.
        what: parts of what these are, for the message that says how many are there: "parts of the candidates".
    """
    # Told by the first: a part that it has seen may be there for the others, or not, on a slow shared disk.
    missing = processes.from_first(f"{name}: missing", lambda: [str(file) for file in parts if not file.exists()])
    files = list(map(Path, missing))
    if len(files) < len(parts):
        log.print(f"{len(parts) - len(files):,} of {len(parts):,} {what} are there already")
    if not files:
        return
    make, total = start(), sum(parts[file] for file in files)
    mine = iter(files) if together else claimed(files, f"{name}: taken", processes)
    with log.progress(name, total, unit) as progress:

        def done(count: int) -> int:
            so_far = processes.store.add(f"{name}: done", count)
            if processes.is_first:
                progress.advance(so_far - progress.done)
            return so_far

        for file in mine:
            content = make(file)
            if processes.is_first or not together:
                write_whole(file, content)
                done(parts[file])
        if processes.is_first:
            processes.wait(lambda: done(0) == total)


def claimed(files: list[Path], key: str, processes: Processes) -> Iterator[Path]:
    """The files that this process takes: each the next that no other has taken."""
    while (place := processes.store.add(key, 1) - 1) < len(files):
        yield files[place]


def leave_together(processes: Processes) -> None:
    """The first process keeps the store that the others still ask: it leaves last."""
    processes.store.add("left", 1)
    if processes.is_first:
        processes.wait(lambda: processes.store.add("left", 0) == processes.world_size)
