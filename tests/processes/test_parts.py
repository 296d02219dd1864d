"""Work in parts: only what is missing is made, and nothing is loaded where nothing is."""

import pytest
import torch.distributed as dist

from hafrm_ds.processes.console import Console
from hafrm_ds.processes.parts import work_through
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
