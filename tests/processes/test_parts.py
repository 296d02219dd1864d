"""Work in parts: only what is missing is made, and nothing is loaded where nothing is."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from hafrm_ds import durability
from hafrm_ds.errors import DataError
from hafrm_ds.evaluation import results
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.parts import claim_folder, remove_parts, work_through
from hafrm_ds.processes.ranks import Processes


@pytest.mark.parametrize("there", [0, 2, 3])
def test_parts_that_are_there_are_not_made_again(tmp_path, capsys, there):
    processes = Processes(rank=0, local_rank=0, world_size=1, store=dist.HashStore())
    parts = {tmp_path / f"part-{number}": number for number in range(1, 4)}
    for file in list(parts)[:there]:
        file.write_bytes(b"before")
    started = []

    def start():
        started.append(None)
        return lambda file: file.name.encode()

    work_through("work", parts, start, processes, Console(processes), unit="rows", together=False, what="parts of it")
    contents = [file.read_bytes() for file in parts]
    assert contents == [b"before"] * there + [file.name.encode() for file in list(parts)[there:]]
    assert len(started) == (there < 3)
    said = capsys.readouterr().out
    assert (f"{there} of 3 parts of it are there already" in said) == (there > 0)


def test_a_folder_of_other_files_is_not_taken_for_parts_that_are_removed_at_the_end(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "engine.txt").write_text("mine")
    with pytest.raises(DataError, match=r"parts is needed .* files of something else \(engine\.txt\)"):
        claim_folder(tmp_path / "parts", {"job": 1}, is_removed=True)
    assert [file.name for file in (tmp_path / "parts").iterdir()] == ["engine.txt"]
    (tmp_path / "parts" / "engine.txt").rename(tmp_path / "engine.txt")
    for _ in range(2):  # a draft of job.json that a kill has left does no harm, nor do the job's own parts
        (tmp_path / "parts" / ".job.json.1a2b").write_text("{")
        claim_folder(tmp_path / "parts", {"job": 1}, is_removed=True)
        (tmp_path / "parts" / "part-1").write_text("whole")


def test_of_a_finished_job_a_folder_of_other_files_is_not_removed(tmp_path, monkeypatch):
    """evaluate.py started again finds its results, and then removes the parts that a kill may have left."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "engine.txt").write_text("mine")
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps({"job": {"a": 1}}))
    monkeypatch.setattr(results, "leave_report", lambda *_: None)
    processes = Processes(rank=0, local_rank=0, world_size=1, store=dist.HashStore())
    results.leave_results(file, str, lambda: {"a": 1}, lambda folder: None, processes, Console(processes))
    assert (tmp_path / "parts" / "engine.txt").read_text() == "mine"


def test_parts_whose_removal_was_killed_bar_neither_the_next_job_nor_its_removal(tmp_path, monkeypatch):
    folder = tmp_path / "parts"

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    claim_folder(folder, {"job": 1}, is_removed=True)
    monkeypatch.setattr(durability.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_parts(folder)
    monkeypatch.undo()
    assert not folder.exists() and list(tmp_path.iterdir())  # what is left is none of the next job's parts
    claim_folder(folder, {"job": 2}, is_removed=True)
    remove_parts(folder)
    assert not list(tmp_path.iterdir())
