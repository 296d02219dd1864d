"""The watch of the ranks over one another: ranks as threads of one process, which would be ended."""

import errno
import socket
import time
from contextlib import suppress

import pytest
import torch.distributed as dist

from hafrm_ds.processes import peers as module
from hafrm_ds.processes.peers import PeerWatch


@pytest.fixture
def watches(monkeypatch):
    """Three ranks, and the list of those that were ended."""
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(module, "LINGER_SECONDS", 2.0)
    monkeypatch.setattr(module, "TICK_SECONDS", 0.05)
    store, ended = dist.HashStore(), []
    ranks = [
        PeerWatch(rank, 3, store, "127.0.0.1", f"rank {rank}", end=lambda status, rank=rank: ended.append(rank))
        for rank in range(3)
    ]
    wait_for(lambda: len(ranks[0].peers) == 2)
    return ranks, ended


def wait_for(condition, seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waits for ever"
        time.sleep(0.01)


def die(watch: PeerWatch) -> None:
    """What the kernel does when the process of a rank dies."""
    watch.is_leaving = True
    for connection in list(watch.peers):
        connection.shutdown(2)


def test_the_death_of_a_rank_ends_all_others_with_its_name(watches, capsys):
    ranks, ended = watches
    die(ranks[2])
    wait_for(lambda: len(ended) == 2)
    assert sorted(ended) == [0, 1]
    lines = sorted(line for line in capsys.readouterr().err.splitlines() if line)
    assert lines == ["rank 0 stops: rank 2 has ended", "rank 1 stops: rank 2 has ended"]


def test_the_watch_goes_on_where_a_connection_cannot_be_accepted(watches, monkeypatch):
    ranks, ended = watches

    class Refused:
        times = 0

        def accept(self):
            Refused.times += 1
            raise OSError(errno.EMFILE, "Too many open files")

    ranks[0].accept(Refused())
    assert Refused.times == 1
    die(ranks[2])
    wait_for(lambda: len(ended) == 2)


def test_the_death_of_rank_0_ends_all_others(watches, capsys):
    ranks, ended = watches
    die(ranks[0])
    wait_for(lambda: len(ended) == 2)
    assert "rank 1 stops: rank 0 has ended" in capsys.readouterr().err


def test_an_error_of_a_rank_ends_those_that_do_not_leave_by_themselves(watches, capsys):
    ranks, ended = watches
    ranks[1].leave("rank 1 has met an error")
    wait_for(lambda: all(watch.verdict == "rank 1 has met an error" for watch in (ranks[0], ranks[2])))
    ranks[2].leave("rank 2 has met an error")  # within the grace: it says nothing more
    wait_for(lambda: ended)
    time.sleep(0.5)
    assert ended == [0]
    assert capsys.readouterr().err == "rank 0 stops: rank 1 has met an error\n"


def test_ranks_that_leave_in_order_end_nobody(watches):
    ranks, ended = watches
    for rank in (2, 1, 0):
        ranks[rank].leave()
    time.sleep(0.6)
    assert ended == []
    assert ranks[0].verdict is None


def test_rank_0_waits_for_the_others_but_not_for_ever(watches):
    ranks, ended = watches
    ranks[1].leave()
    started = time.monotonic()
    ranks[0].leave()
    assert 1.9 < time.monotonic() - started < 4
    time.sleep(0.6)
    assert ended == [], "rank 2 was told that rank 0 leaves in order"


def test_whoever_else_tries_the_port_is_nobody(watches):
    ranks, ended = watches
    for said in (b"GET / HTTP/1.1\r\n\r\n", b"token 1\n", b""):
        with socket.create_connection(("127.0.0.1", ranks[0].listener.getsockname()[1])) as other:
            other.sendall(said)
    time.sleep(0.6)
    assert len(ranks[0].peers) == 2
    assert ended == []
    die(ranks[2])
    wait_for(lambda: len(ended) == 2)


def connect(watch: PeerWatch) -> socket.socket:
    return socket.create_connection(("127.0.0.1", watch.listener.getsockname()[1]))


def test_a_rank_may_take_its_time_to_say_who_it_is(watches, capsys):
    """Longer than a tick, and a byte at a time: its host is busy."""
    ranks, ended = watches
    with connect(ranks[0]) as slow:
        time.sleep(0.3)
        for byte in f"{ranks[0].token} rank 3 on n2\n".encode():
            slow.sendall(bytes([byte]))
            time.sleep(0.01)
        wait_for(lambda: len(ranks[0].peers) == 3)
    wait_for(lambda: len(ended) == 3)
    assert "rank 0 stops: rank 3 on n2 has ended" in capsys.readouterr().err


def test_what_a_rank_says_right_after_its_name_is_heard(watches):
    ranks, ended = watches
    with connect(ranks[0]) as hasty:
        hasty.sendall(f"{ranks[0].token} rank 3\n{module.LEAVES}\n".encode())
        assert hasty.recv(1) == b"", "rank 0 has closed its side"
    time.sleep(0.6)
    assert ended == []
    assert ranks[0].verdict is None


def test_a_silent_connection_is_closed_in_time_and_holds_nobody_up(watches):
    ranks, ended = watches
    with connect(ranks[0]) as silent:
        wait_for(lambda: ranks[0].unauthenticated)
        with connect(ranks[0]) as endless:
            endless.sendall(b"x" * 5000)
            endless.settimeout(5)
            with suppress(ConnectionResetError):  # not all of it was read
                assert endless.recv(1) == b""
        ((connection, (said, deadline)),) = ranks[0].unauthenticated.items()
        assert 0 < deadline - time.monotonic() <= module.INTRODUCTION_SECONDS
        ranks[0].unauthenticated[connection] = said, time.monotonic()
        silent.settimeout(5)
        assert silent.recv(1) == b""
        wait_for(lambda: not ranks[0].unauthenticated)
        assert len(ranks[0].peers) == 2
        assert ended == []
    with connect(ranks[0]):
        wait_for(lambda: ranks[0].unauthenticated)
        die(ranks[2])
        wait_for(lambda: len(ended) == 2)


def test_what_else_is_watched_is_looked_at_again_and_again():
    calls = []
    PeerWatch(0, 1, dist.HashStore(), "127.0.0.1", "rank 0", on_tick=lambda: calls.append(1))
    wait_for(lambda: len(calls) > 1)


def test_a_host_that_falls_silent_is_told_from_a_process_that_has_ended(watches, capsys):
    """What the kernel reports when the other host no longer answers."""

    class Silent(socket.socket):
        def recv(self, *given):
            raise TimeoutError(errno.ETIMEDOUT, "Connection timed out")

    ranks, ended = watches
    with socket.create_server(("127.0.0.1", 0)) as listener:
        other = socket.create_connection(listener.getsockname())
        connection, _ = listener.accept()
        ranks[0].add(Silent(fileno=connection.detach()), "rank 3 on n2")
    other.sendall(b"\n")
    wait_for(lambda: len(ended) == 3)
    lines = set(filter(None, capsys.readouterr().err.splitlines()))
    reason = "rank 3 on n2 cannot be reached: its host, or the network between, is down"
    assert lines == {f"rank {rank} stops: {reason}" for rank in range(3)}
    other.close()


def test_a_rank_that_cannot_reach_the_port_goes_without(monkeypatch):
    """What a firewall that drops packets looks like from here: the connection is never made."""
    monkeypatch.setattr(module, "REACH_SECONDS", 0.2)
    monkeypatch.setattr(module, "LINGER_SECONDS", 2.0)
    store, calls = dist.HashStore(), []
    first = PeerWatch(0, 2, store, "127.0.0.1", "rank 0")
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:  # the queue of connections is full: the kernel drops what comes next
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        store.set("peer watch", f"{port} token rank 0")
        watch = PeerWatch(1, 2, store, "127.0.0.1", "rank 1", on_tick=lambda: calls.append(1))
        assert "timed out" in watch.problem
        wait_for(lambda: calls)
        watch.leave("rank 1 has met an error")
        started = time.monotonic()
        first.leave()
        assert time.monotonic() - started < 1, "rank 0 waits for none that is not there"
        for filler in fillers:
            filler.close()
