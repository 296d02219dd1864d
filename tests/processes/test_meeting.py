"""Processes that wait for one another before they have met: what ends them, how soon, and what they say."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
import torch.distributed as dist

from hafrm_ds.errors import UserError
from hafrm_ds.processes import meeting
from hafrm_ds.processes.launchers import Placement
from hafrm_ds.processes.meeting import meet, ranks_in_words
from hafrm_ds.processes.stopping import STOPPED_STATUS, Stopped
from tests.distributed.launching import REPOSITORY, free_port

ENTRY = "from hafrm_ds.processes.ranks import run_entry; print('waits', flush=True); run_entry(print)"


def placements(world_size: int, number: int | None = None) -> list[Placement]:
    first = Placement("here", world_size=world_size, port=free_port())
    return [replace(first, rank=rank, local_rank=rank) for rank in range(number or world_size)]


def meet_at_once(those: list[Placement], timeout: timedelta = timedelta(seconds=20), **options) -> list:
    def one(placement: Placement):
        try:
            return meet(placement, timeout, **options)
        except (UserError, Stopped) as error:
            return error

    with ThreadPoolExecutor(len(those)) as pool:
        return list(pool.map(one, those))


def test_all_share_one_store():
    stores = meet_at_once(placements(3))
    stores[0].set("key", "value")
    assert [store.get("key") for store in stores] == [b"value"] * 3


def test_an_attempt_of_torchrun_does_not_meet_the_one_before(monkeypatch):
    """The agent keeps its store, with all that the attempt before has written."""
    [placement] = placements(1)
    agent = dist.TCPStore("127.0.0.1", placement.port, 1, is_master=True, wait_for_workers=False, multi_tenant=True)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for attempt in range(3):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        store = meet(placement, timedelta(seconds=20))
        assert not store.check(["errors"])
        store.add("errors", 1)
    assert agent.num_keys() >= 3


def test_who_is_missing_is_named_after_a_while_and_at_the_end(monkeypatch, capsys):
    monkeypatch.setattr(meeting, "NOTICE_SECONDS", 0.2)
    errors = meet_at_once(placements(4, number=2), timedelta(seconds=1))
    assert all("ranks 2, 3" in str(error) and "HAFRM_TIMEOUT_MINUTES" in str(error) for error in errors), errors
    said = capsys.readouterr().err
    assert "rank 0 on here is waiting at 127.0.0.1:" in said and "rank 1 on here is waiting" in said


def test_a_missing_rank_0_is_named():
    [error] = meet_at_once(placements(2)[1:], timedelta(seconds=1))
    assert "rank 1 on here is waiting at 127.0.0.1:" in str(error) and "for rank 0" in str(error)


def test_two_processes_of_one_rank_are_refused():
    first, second, _ = placements(3)
    errors = meet_at_once([first, second, second], timedelta(seconds=3))
    assert any("two processes" in str(error) and "rank 1 of 3" in str(error) for error in errors[1:])


def test_a_rank_that_is_stopped_takes_the_others_along():
    asked = []

    def stop_the_first_that_waits() -> None:
        if len(asked) == 20 and not asked.append(True):
            raise Stopped("SIGTERM")
        asked.append(False)

    started = time.monotonic()
    errors = meet_at_once(placements(3, number=2), on_wait=stop_the_first_that_waits)
    assert [str(error) for error in errors] == ["stopped: SIGTERM"] * 2
    assert sorted(error.is_told for error in errors) == [False, True]
    assert time.monotonic() - started < 8


def test_many_ranks_are_few_words():
    assert ranks_in_words([3]) == "rank 3"
    assert ranks_in_words(range(1000)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 992 more"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_waiting_processes_with_one_line(name):
    group = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", ENTRY],
            cwd=REPOSITORY,
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            assert rank.stdout.readline() == "waits\n"
        time.sleep(1.5)
        started = time.monotonic()
        for rank in ranks:
            rank.send_signal(getattr(signal, name))
        said = "".join(rank.communicate(timeout=10)[1] for rank in ranks)
        assert time.monotonic() - started < 4
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [STOPPED_STATUS] * 2
    assert said == f"\nstopped: {name}\n"
