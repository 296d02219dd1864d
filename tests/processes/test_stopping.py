"""Signals, and the loss of the launcher."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from hafrm_ds.processes.stopping import LAUNCHER_LOST, REASONS, Launcher, Stopped, StopRequest, reason_of_vote


@pytest.fixture
def request_to_stop():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    request = StopRequest()
    request.install()
    yield request
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_before_the_first_step_a_signal_ends_the_run(request_to_stop, name):
    with pytest.raises(Stopped) as stopped:
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(1)
    assert stopped.value.to_json() | {"time": ""} == {"reason": name, "step": 0, "checkpoint": None, "time": ""}


def test_from_then_on_it_is_noted_and_the_first_one_counts(request_to_stop):
    request_to_stop.defer()
    assert request_to_stop.vote == 0
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)
    assert reason_of_vote(request_to_stop.vote) == "SIGINT"


def test_votes_and_reasons_belong_together():
    assert reason_of_vote(0.0) is None
    for reason in REASONS:
        request = StopRequest()
        request.note(reason)
        assert reason_of_vote(request.vote) == reason


def test_a_worker_process_ends_without_a_word(request_to_stop):
    ready, tell = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.write(tell, b".")  # Python forgets a signal that arrives while it forks
        time.sleep(20)
        os._exit(0)
    os.read(ready, 1)
    os.kill(worker, signal.SIGTERM)
    _, status = os.waitpid(worker, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGTERM


def test_stopped_passes_through_except_exception():
    assert not issubclass(Stopped, Exception)


def test_the_loss_of_a_launcher_asks_for_a_stop_once(request_to_stop):
    # A shell in the place of the launcher, whose child outlives it.
    shell = subprocess.Popen(
        ["bash", "-c", "sleep 20 & echo $!; wait"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    child = psutil.Process(int(shell.stdout.readline()))
    launcher = Launcher([(child, shell.pid)])
    request_to_stop.defer()
    request_to_stop.stop_if_lost(launcher)
    assert request_to_stop.reason is None
    shell.kill()
    shell.wait()
    request_to_stop.stop_if_lost(launcher)
    assert request_to_stop.reason == LAUNCHER_LOST
    child.kill()


def test_before_the_first_step_the_loss_of_a_launcher_ends_the_run(request_to_stop):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    own = psutil.Process()
    ended.wait()
    with pytest.raises(Stopped, match=LAUNCHER_LOST):
        request_to_stop.stop_if_lost(Launcher([(own, ended.pid)]))
        time.sleep(1)
