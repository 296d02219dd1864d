"""Checkpoint folders: whole or not at all, the faults that are found, and what is kept."""

import errno
import json
import operator
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from hafrm_ds import durability
from hafrm_ds.durability import replaced
from hafrm_ds.engine import checkpoint as module
from hafrm_ds.engine.checkpoint import (
    DEEPSPEED_FOLDER,
    MANIFEST,
    CheckpointError,
    FileFacts,
    TrainingState,
    checkpoint_name,
    complete,
    damaged_file,
    prune,
    random_state,
    read_manifest,
    read_state,
    restore_random_state,
    restore_replaced_steps,
    saved_steps,
    set_aside,
    start_draft,
    write_json,
)


def state_at(step: int, metric: float | None = None) -> TrainingState:
    return TrainingState(
        step=step,
        world_size=2,
        zero_stage=3,
        config={"seed": 0},
        data={"train": "a"},
        reference="start",
        metric=metric,
        best_step=None,
        best_value=None,
        last_evaluation={"held_out": {"accuracy/reward": 0.5}},
        evaluation_is_due=False,
    )


def save(root: Path, step: int, metric: float | None = None) -> Path:
    draft = start_draft(root, step, expected_bytes=0)
    name = f"{DEEPSPEED_FOLDER}/part.pt"
    files = {name: write_json(draft / name, {"weights of": step})}
    return complete(draft, root, state_at(step, metric), files)


def problem_of(folder: Path) -> str | None:
    try:
        return damaged_file(folder, read_manifest(folder).items())
    except CheckpointError as error:
        return str(error)


def test_a_saved_checkpoint_is_whole(tmp_path):
    folder = save(tmp_path, 40)
    assert folder == tmp_path / "step-000040"
    assert problem_of(folder) is None
    assert read_state(folder) == state_at(40)
    assert (tmp_path / "latest").resolve() == folder.resolve()
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_the_pointer_follows_the_newest(tmp_path):
    for step in (5, 10, 1_000_000):
        folder = save(tmp_path, step)
        assert (tmp_path / "latest").resolve() == folder.resolve()
    assert list(saved_steps(tmp_path)) == [1_000_000, 10, 5]


def test_one_that_was_killed_while_it_was_saved_again_is_given_back(tmp_path, monkeypatch):
    """On a disk that cannot exchange two names, where for a moment neither the old nor the new one is there."""
    save(tmp_path, 5)

    def killed(draft: Path, folder: Path) -> None:
        folder.rename(replaced(folder))
        raise KeyboardInterrupt

    monkeypatch.setattr(durability, "put_in_place", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 5, metric=0.5)
    monkeypatch.undo()
    assert list(saved_steps(tmp_path)) == []
    restore_replaced_steps(tmp_path)
    assert problem_of(tmp_path / "step-000005") is None
    assert read_state(save(tmp_path, 5, metric=0.5)).metric == 0.5
    assert not list(tmp_path.glob(".*"))


def test_a_draft_is_no_checkpoint_and_the_next_save_clears_it_away(tmp_path):
    save(tmp_path, 5)
    draft = start_draft(tmp_path, 10, 0)
    (draft / "half").write_text("a save that was killed")
    assert list(saved_steps(tmp_path)) == [5]
    save(tmp_path, 15)
    assert not draft.exists()
    assert list(saved_steps(tmp_path)) == [15, 5]


def test_ranks_share_the_check_of_one_large_file_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 1000)
    draft = start_draft(tmp_path, 5, expected_bytes=0)
    name, content = f"{DEEPSPEED_FOLDER}/part.pt", random.Random(0).randbytes(7500)
    checksums = module.Checksums()
    for start in range(0, len(content), 700):
        checksums.update(content[start : start + 700])
    (draft / name).write_bytes(content)
    folder = complete(draft, tmp_path, state_at(5), {name: checksums.facts()})
    files = read_manifest(folder)
    assert len(files[name].blocks) == 8
    assert files[name].xxh3 == xxhash.xxh3_128_hexdigest(content)
    sizes = [stop - start for which, start, stop, _ in module.checked_parts(files.items()) if which == name]
    assert sizes == [1000] * 7 + [500]
    assert [damaged_file(folder, files.items(), rank, 3) for rank in range(3)] == [None] * 3
    (folder / name).write_bytes(content[:6200] + bytes([content[6200] ^ 1]) + content[6201:])
    found = [damaged_file(folder, files.items(), rank, 3) for rank in range(3)]
    assert [bool(each) for each in found] == [True, False, False]  # the seventh block is that of the first rank
    assert f"{name} does not have the checksum" in found[0]


def truncate(folder: Path) -> None:
    file = folder / DEEPSPEED_FOLDER / "part.pt"
    file.write_bytes(file.read_bytes()[:-3])


def lose_a_file(folder: Path) -> None:
    (folder / DEEPSPEED_FOLDER / "part.pt").unlink()


def flip_a_byte(folder: Path) -> None:
    file = folder / DEEPSPEED_FOLDER / "part.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def take_the_manifest_of_another_step(folder: Path) -> None:
    other = save(folder.parent / "other", 7)
    shutil.copy(other / MANIFEST, folder / MANIFEST)


def take_the_manifest_of_another_run(folder: Path) -> None:
    draft = start_draft(folder.parent / "other", 5, 0)
    name = f"{DEEPSPEED_FOLDER}/part.pt"
    other = complete(draft, draft.parent, state_at(5), {name: write_json(draft / name, {"weights of": 6})})
    shutil.copy(other / MANIFEST, folder / MANIFEST)


def damage_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).write_text('{"format": 1, "files": ')


def lose_the_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def come_from_the_future(folder: Path) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(content | {"format": 99}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "part.pt has 19 bytes instead of 22"),
        (lose_a_file, "part.pt cannot be read: No such file"),
        (flip_a_byte, "part.pt does not have the checksum in manifest.json"),
        (take_the_manifest_of_another_step, "manifest.json belongs to step-000007"),
        (take_the_manifest_of_another_run, "part.pt does not have the checksum in manifest.json"),
        (damage_the_manifest, "manifest.json is damaged"),
        (lose_the_manifest, "manifest.json cannot be read"),
        (come_from_the_future, "its format is 99"),
    ],
)
def test_every_fault_is_found_and_named(tmp_path, damage, said):
    folder = save(tmp_path, 5)
    damage(folder)
    assert said in problem_of(folder)


def test_too_little_space_is_said_before_anything_is_written(tmp_path):
    save(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r"needs about 1,000,000,000,000,000,000 bytes.*free"):
        start_draft(tmp_path, 10, 10**18)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000005"]


def test_a_folder_that_cannot_be_made_is_an_error_of_the_user(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot be written to .*file/checkpoints: Not a directory"):
        start_draft(tmp_path / "file/checkpoints", 10, 0)


@pytest.mark.parametrize(("is_better", "best"), [(operator.gt, 20), (operator.lt, 50)])
def test_the_last_ones_and_the_best_are_kept(tmp_path, is_better, best):
    metrics = {10: 0.6, 20: 0.8, 30: None, 40: 0.8, 50: 0.5, 60: None, 70: 0.7, 80: 0.5}
    for step, metric in metrics.items():
        save(tmp_path, step, metric)
        prune(tmp_path, 2, None, is_better)
        assert step in saved_steps(tmp_path)
    assert list(saved_steps(tmp_path)) == [80, 70, best]  # of two equal ones the earlier


def test_the_step_of_the_best_evaluation_is_kept_although_it_was_saved_before_it(tmp_path):
    for step, metric in {10: 0.6, 20: None, 30: 0.5, 40: None}.items():
        save(tmp_path, step, metric)
    prune(tmp_path, 1, 20, operator.gt)
    assert list(saved_steps(tmp_path)) == [40, 20]


def test_damaged_ones_do_not_count_and_the_only_good_one_stays(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    for step in (20, 30):
        truncate(tmp_path / checkpoint_name(step))
    prune(tmp_path, 1, None, operator.gt)
    assert list(saved_steps(tmp_path)) == [30, 20, 10]


def test_one_that_is_killed_while_it_is_deleted_is_no_checkpoint(tmp_path, monkeypatch):
    for step in (10, 20):
        save(tmp_path, step)

    def killed(folder: Path) -> None:
        (folder / MANIFEST).unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(module.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, 1, None, operator.gt)
    monkeypatch.undo()
    assert list(saved_steps(tmp_path)) == [20]
    save(tmp_path, 30)
    assert not list(tmp_path.glob(".*"))


def test_what_cannot_be_deleted_of_another_step_does_not_stop_a_save(tmp_path, monkeypatch):
    for left in (".step-000010", ".other"):
        (tmp_path / left / "held").mkdir(parents=True)
    (tmp_path / ".latest").symlink_to(".other")
    (tmp_path / ".nfs0001").touch()

    def busy(path: object, *arguments: object, **options: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    monkeypatch.setattr(os, "rmdir", busy)
    monkeypatch.setattr(os, "unlink", busy)
    start_draft(tmp_path, 30, 0)
    monkeypatch.undo()
    assert (tmp_path / ".step-000010/held").is_dir()
    save(tmp_path, 40)
    assert not list(tmp_path.glob(".*"))


def test_what_lies_after_a_step_is_set_aside_and_nothing_is_lost(tmp_path):
    for _ in range(2):
        for step in (10, 20, 30):
            if not (tmp_path / checkpoint_name(step)).exists():
                save(tmp_path, step)
        set_aside(tmp_path, 10)
        assert list(saved_steps(tmp_path)) == [10]
    assert len(list((tmp_path / "set_aside").iterdir())) == 4


def test_a_full_disk_is_called_so():
    assert module.reason_of(OSError(errno.ENOSPC, "No space left on device")) == "the disk is full"
    assert module.reason_of(OSError(errno.EACCES, os.strerror(errno.EACCES))) == "Permission denied"


def test_random_numbers_go_on_where_they_were():
    def draw() -> list:
        return [random.random(), np.random.rand(), torch.rand(1).item()]

    random.gauss(0, 1)  # leaves a second value behind
    state = json.loads(json.dumps(random_state()))
    expected = [draw(), draw(), random.gauss(0, 1)]
    draw()
    restore_random_state(state)
    assert [draw(), draw(), random.gauss(0, 1)] == expected


def test_a_part_that_cannot_be_seen_makes_no_checkpoint(tmp_path):
    """As when nodes write to disks of their own: each would think that all is well."""
    draft = start_draft(tmp_path, 5, 0)
    elsewhere = {"deepspeed/part.pt": FileFacts(3, "0" * 32)}
    with pytest.raises(CheckpointError, match=r"part.pt, which a rank has written, .* one folder that all nodes see"):
        complete(draft, tmp_path, state_at(5), elsewhere)
    assert not saved_steps(tmp_path)
