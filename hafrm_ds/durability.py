"""Files and folders that exist whole or not at all, whenever a process is killed or the power goes.

write_whole(FILE, bytes)         a small file at once
with whole_file(FILE) as file    a file written as a stream
with whole_folder(FOLDER) as draft
                                 a folder; one that is there is replaced without a moment in which neither is
publish(DRAFT, PLACE)            the last step of these, for drafts that are written in ways of their own
publish_link, remove_folder      a symbolic link, and the end of a folder
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
        publish(draft, file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


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
    publish(draft, folder)


def publish(draft: Path, place: Path) -> None:
    """Bring a file or folder to the disk, and give it the place of another, which goes."""
    for path in [*draft.rglob("*"), draft]:
        sync(path)
    if draft.is_dir():
        put_in_place(draft, place)
    else:
        draft.replace(place)
    sync(place.parent)
    for old in (draft, replaced(place)):
        shutil.rmtree(old, ignore_errors=True)


def publish_link(link: Path, target: str) -> None:
    """Let a symbolic link point to `target`, from one moment to the next."""
    draft = link.with_name(f".{link.name}")
    draft.unlink(missing_ok=True)
    draft.symlink_to(target)
    draft.replace(link)
    sync(link.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder. It is renamed first: one that is deleted in part must not look whole. What a killed process has
    left of such a one goes too."""
    gone = folder.with_name(f".{folder.name}.removed")
    if gone.exists():
        shutil.rmtree(gone)
    shutil.rmtree(folder.rename(gone))


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


def sync(path: Path) -> None:
    """Make what was renamed inside a folder, or written into a file, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
