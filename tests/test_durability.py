"""Files and folders are there whole or not at all, whatever happens in between."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hafrm_ds import durability
from hafrm_ds.durability import replaced, whole_file, whole_folder, write_whole
from hafrm_ds.errors import DataError

PARTS = 20
REPLACES_FOR_EVER = f"""
import itertools, sys
from pathlib import Path
from hafrm_ds import durability
if sys.argv[2] == "no exchange":
    def refused(one, other):
        raise OSError(22, "Invalid argument")
    durability.exchange = refused
for version in itertools.count():
    with durability.whole_folder(Path(sys.argv[1])) as draft:
        for part in range({PARTS}):
            (draft / str(part)).write_text(str(version))
    print(version, flush=True)
"""


def write(folder: Path, text: str) -> None:
    with whole_folder(folder) as draft:
        (draft / "inner").mkdir()
        (draft / "inner/file").write_text(text)


def test_a_folder_takes_the_place_of_another(tmp_path):
    for text in ("old", "new"):
        write(tmp_path / "final", text)
        assert (tmp_path / "final/inner/file").read_text() == text
    assert os.listdir(tmp_path) == ["final"]


def test_a_folder_takes_the_place_of_another_where_names_cannot_be_exchanged(tmp_path, monkeypatch):
    def refused(one, other):
        raise OSError(errno.EINVAL, "Invalid argument")

    write(tmp_path / "final", "old")
    monkeypatch.setattr(durability, "exchange", refused)
    write(tmp_path / "final", "new")
    assert (tmp_path / "final/inner/file").read_text() == "new"
    assert os.listdir(tmp_path) == ["final"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_fails_inside_leaves_the_old_one(tmp_path, error):
    write(tmp_path / "final", "old")
    write_whole(tmp_path / "file", b"old")
    with pytest.raises(error), whole_folder(tmp_path / "final") as draft:
        (draft / "half").touch()
        raise error
    with pytest.raises(error), whole_file(tmp_path / "file") as handle:
        handle.write(b"half")
        raise error
    assert sorted(os.listdir(tmp_path)) == ["file", "final"]
    assert (tmp_path / "final/inner/file").read_text() == "old"
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_folder_that_was_killed_between_two_names_has_its_own_again(tmp_path):
    write(tmp_path / "final", "old")
    (tmp_path / "final").rename(replaced(tmp_path / "final"))
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "final"):
        raise RuntimeError
    assert (tmp_path / "final/inner/file").read_text() == "old"


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(DataError, match="file cannot be written: "):
        write_whole(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("how", ["exchange", "no exchange"])
def test_old_or_new_is_whole_after_every_kill(tmp_path, how):
    """Without an exchange of names the old one may stand under the name that the next start gives back."""
    folder = tmp_path / "final"
    for kill in range(20):
        command = [sys.executable, "-c", REPLACES_FOR_EVER, str(folder), how]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            process.stdout.readline()  # the first one is there
            time.sleep(random.Random(f"{how} {kill}").uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
        if how == "no exchange":
            durability.restore_replaced(folder)
        versions = {(folder / str(part)).read_text() for part in range(PARTS)}
        assert len(versions) == 1, f"kill {kill}: {versions}"
