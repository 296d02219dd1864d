"""What makes files whole or not there, whenever a process is killed or the power goes."""

import os
from pathlib import Path

from hafrm_ds.errors import DataError


def write_whole(file: Path, content: bytes) -> None:
    """Write a file under another name, sync and rename it.

    Raises:
        DataError: the disk is full or read-only; no half of the file is left.
    """
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with draft.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        draft.rename(file)
        sync_folder(file.parent)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise DataError(f"{file} cannot be written: {error.strerror}") from error


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
