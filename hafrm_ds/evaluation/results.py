"""The results of a job that is done in parts: written once, and shown again where they are there already."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.markup import escape

from hafrm_ds.durability import write_whole
from hafrm_ds.errors import DataError
from hafrm_ds.evaluation.report.writing import leave_report
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.parts import claim_folder, leave_together, remove_parts
from hafrm_ds.processes.ranks import Processes

PARTS_FOLDER = "parts"


def leave_results(
    file: Path,
    render: Callable[[dict[str, Any]], RenderableType],
    identity: Callable[[], dict[str, Any]],
    results: Callable[[Path], dict[str, Any] | None],
    processes: Processes,
    log: Console,
    *,
    replaces: bool = False,
) -> None:
    """Leave a file of results and a report beside it, or show them where they are there already. All processes call
    this together.

    Args:
        file: JSON in the output folder.
        render: the results as tables for the terminal.
        identity: called by the first process; what the results depend on.
        results: called by all processes with a folder, where they keep what a job that is killed need not do again;
            gives what the file says on the first process.
        replaces: whether results of another job make room for these, as where the folder is not the user's to choose.

    Raises:
        DataError: the file holds the results of another job, and they are not replaced.
    """
    output_dir, folder = file.parent, file.parent / PARTS_FOLDER
    if processes.from_first("state", lambda: claim_output(file, folder, identity(), replaces)):
        log.print(f"{escape(str(file))} is there already, of the same models and data")
    elif found := results(folder):
        write_whole(file, json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False).encode())
    if processes.is_first:
        remove_parts(folder)
        log.print(render(json.loads(file.read_text())))
        log.print(f"the results are in {escape(str(output_dir))}")
        leave_report(output_dir, log)
    leave_together(processes)


def claim_output(file: Path, folder: Path, identity: dict[str, Any], replaces: bool) -> bool:
    """Whether the job is finished; raises DataError if the file is of another one that is not replaced."""
    if file.exists() and is_of(file, identity):
        return True
    if file.exists() and not replaces:
        raise DataError(f"{file} holds the results of another job; choose another --output_dir")
    claim_folder(folder, identity, replaces=replaces, is_removed=True)
    return False


def is_of(file: Path, identity: dict[str, Any]) -> bool:
    """Whether a file of results is of this job."""
    try:
        return bool(json.loads(file.read_text())["job"] == identity)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def hash_of(content: Any) -> str:
    """SHA-256 of a JSON-serialisable value."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
