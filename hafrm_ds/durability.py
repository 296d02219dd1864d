"""Files and folders that exist whole or not at all, whenever a process is killed or the power goes.

write_whole(FILE, bytes)         a small file at once
with whole_file(FILE) as file    a file written as a stream
with whole_folder(FOLDER) as draft
                                 a folder; one that is there is replaced without a moment in which neither is
"""

import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from hafrm_ds.errors import DataError

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Arguments of Linux' renameat2: paths as the process sees them, and two names that change places in one step."""
NOT_THERE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
"""What renameat2 says where the kernel, or the file system (NFS), cannot exchange."""


def write_whole(file: Path, content: bytes) -> None:
    """Write a file under another name, sync and rename it.

    Raises:
        DataError: the disk is full or read-only; no half of the file is left.
    """
    try:
        with whole_file(file) as draft:
            draft.write(content)
    except OSError as error:
        raise DataError(f"{file} cannot be written: {error.strerror}") from error


@contextmanager
def whole_file(file: Path) -> Iterator[IO[bytes]]:
    """A file to write into, which takes the place of `file` if nothing is raised inside; else nothing of it is left."""
    draft = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        with draft.open("wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        draft.replace(file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A draft to write into, which takes the place of `folder` if nothing is raised inside; else nothing of it is left.

    What a killed process has left of a draft is cleared away by the next.
    """
    draft = folder.with_name(f".{folder.name}.draft")
    restore_replaced(folder)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        yield draft
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    for path in [*draft.rglob("*"), draft]:
        sync_folder(path)  # files as well
    put_in_place(draft, folder)
    sync_folder(folder.parent)
    for old in (draft, replaced(folder)):
        shutil.rmtree(old, ignore_errors=True)


def put_in_place(draft: Path, folder: Path) -> None:
    """Give a draft the name of a folder. One that is there is then the draft, or has the name that `replaced` gives."""
    if not folder.exists():
        draft.rename(folder)
        return
    try:
        exchange(draft, folder)
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise
        # Between these two lines only the old one is there, under another name: `restore_replaced` gives it back.
        folder.rename(replaced(folder))
        draft.rename(folder)


def exchange(one: Path, other: Path) -> None:
    """Let two paths of one file system change places in one step. Raises OSError where that cannot be done."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(other))


def replaced(folder: Path) -> Path:
    """Where a folder stands while another takes its place, on file systems that cannot exchange two names."""
    return folder.with_name(f".{folder.name}.replaced")


def restore_replaced(folder: Path) -> None:
    """Give a folder back its name if a process was killed while it replaced it."""
    if replaced(folder).exists() and not folder.exists():
        replaced(folder).rename(folder)


def sync_folder(folder: Path) -> None:
    """Make what was renamed inside a folder, or written into a file, survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
