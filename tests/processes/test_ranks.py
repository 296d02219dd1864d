"""Ranks as threads around one store: who works when, and who leaves when another has met an error."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from hafrm_ds.errors import DataError, UserError
from hafrm_ds.processes import ranks as module
from hafrm_ds.processes.launchers import Placement
from hafrm_ds.processes.meeting import meet
from hafrm_ds.processes.ranks import FailedElsewhere, Processes, run_entry
from hafrm_ds.processes.stopping import Stopped

WORLD_SIZE = 4


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A rank that would wait for ever fails instead."""
    end = time.monotonic() + 20

    def sleep(seconds: float) -> None:
        if time.monotonic() > end:
            raise TimeoutError("waits for ever")
        time.sleep(seconds)

    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=sleep))


@pytest.fixture
def ranks() -> list[Processes]:
    """Four ranks of one node."""
    store = dist.HashStore()
    return [Processes(rank, rank, WORLD_SIZE, store) for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize(("num_hosts", "number"), [(1, 4), (2, 2), (3, 1)])
def test_processes_of_each_host(ranks, num_hosts, number):
    assert replace(ranks[0], num_hosts=num_hosts).machine_size == number


def at_once(ranks: list[Processes], action) -> list:
    """What `action(processes)` returned on each rank, or the error it raised."""

    def run(processes: Processes):
        try:
            return action(processes)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(run, ranks))


@pytest.fixture
def enter(monkeypatch):
    """Runs an entry file as one of the ranks, while the others do nothing."""

    def run(processes: Processes, main) -> None:
        monkeypatch.setattr(Processes, "join", classmethod(lambda cls: processes))
        monkeypatch.setattr(Processes, "must_agree", lambda *given: None)
        run_entry(main)

    return run


def test_rank_0_works_alone_before_the_others(ranks):
    started, finished = [], threading.Event()

    def work(rank: int) -> int:
        assert rank == 0 or finished.is_set()
        started.append(rank)
        if rank == 0:
            time.sleep(0.5)  # long enough for the others to overtake it
            finished.set()
        return 10 * rank

    assert at_once(ranks, lambda p: p.in_turns("data", lambda: work(p.rank))) == [0, 10, 20, 30]
    assert started[0] == 0


def test_the_first_rank_of_another_node_works_before_its_neighbours():
    store, finished = dist.HashStore(), []

    def turn(processes: Processes) -> list[int]:
        def work() -> list[int]:
            before = list(finished)
            time.sleep(0.5 if processes.local_rank == 0 else 0)  # long enough for the others to overtake it
            finished.append(processes.rank)
            return before

        return processes.in_turns("data", work)

    before = at_once([Processes(rank, rank % 2, 4, store, host=f"node {rank // 2}") for rank in range(4)], turn)
    assert before[0] == []
    assert 0 in before[1] and 0 in before[2] and 2 in before[3]


def test_what_the_first_rank_finds_every_rank_knows(ranks):
    found = at_once(
        ranks, lambda processes: processes.from_first("work", lambda: [processes.rank, None, True, {"a": 1}])
    )
    assert found == [[0, None, True, {"a": 1}]] * WORLD_SIZE


def test_the_first_rank_hears_what_every_rank_says(ranks):
    said = at_once(ranks, lambda processes: processes.texts_of_all("state", f"of {processes.rank}"))
    assert said == [["of 0", "of 1", "of 2", "of 3"], [], [], []]


def test_a_run_that_was_asked_to_stop_says_so_once_and_can_be_told_from_an_error(ranks, enter, capsys):
    def main(arguments: list[str], processes: Processes) -> None:
        raise Stopped("SIGUSR1", 40, "step-000040")

    for processes in ranks:
        with pytest.raises(SystemExit, match="75"):
            enter(processes, main)
    said = "\nstopped: SIGUSR1 after step 40; --resume auto resumes from step-000040\n"
    assert capsys.readouterr().err == said


def test_an_error_is_reported_once_and_stops_the_ranks_that_wait(ranks, capsys):
    def turn(processes: Processes) -> None:
        def work() -> None:
            raise DataError("pairs.jsonl:3: is no pair")

        try:
            processes.in_turns("data", work)
        except DataError as error:
            processes.report(error)
            raise
        except FailedElsewhere as error:
            assert not processes.report(error)
            raise

    outcomes = at_once(ranks, turn)
    assert [type(outcome) for outcome in outcomes] == [DataError, *[FailedElsewhere] * 3]
    assert capsys.readouterr().err == "\nerror: pairs.jsonl:3: is no pair\n"


def test_the_same_error_on_all_ranks_is_one_message(ranks, capsys):
    printed = at_once(ranks, lambda processes: processes.report(DataError("the loss is not finite")))
    assert sorted(printed) == [False, False, False, True]
    assert capsys.readouterr().err.count("error: ") == 1


def test_a_group_is_not_started_without_a_rank_that_has_met_an_error(ranks):
    """It would wait for that rank until its collectives time out."""

    def start(processes: Processes) -> None:
        if processes.rank == 2:
            processes.report(DataError("cannot be read"))
        else:
            processes.start_group()

    outcomes = at_once(ranks, start)
    assert [type(outcome) for outcome in outcomes] == [FailedElsewhere, FailedElsewhere, type(None), FailedElsewhere]
    assert not dist.is_initialized()


@pytest.mark.parametrize(("world_size", "bound"), [(1, None), (2, torch.device("cuda", 0))])
def test_nccl_is_bound_to_a_device_only_where_there_are_several_ranks(monkeypatch, world_size, bound):
    """On one GPU the groups that DeepSpeed makes after a bound one fail."""
    started = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: started.update(options, backend=backend))
    monkeypatch.setattr(Processes, "device", torch.device("cuda", 0))
    monkeypatch.setattr(Processes, "use_device", lambda self: None)
    monkeypatch.setenv("NCCL_LAUNCH_ORDER_IMPLICIT", "")  # so that it is as it was after the test
    monkeypatch.delenv("NCCL_LAUNCH_ORDER_IMPLICIT")
    store = dist.HashStore()
    store.add("arrived", world_size - 1)
    Processes(0, 0, world_size, store).start_group()
    assert (started["backend"], started["device_id"]) == ("nccl", bound)
    # Those groups and ours have communicators of their own.
    assert os.environ["NCCL_LAUNCH_ORDER_IMPLICIT"] == "1"


def test_an_amd_gpu_is_refused_unless_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(Processes, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    processes = Processes(0, 0, 1, dist.HashStore())
    with pytest.raises(
        UserError, match=r"AMD GPUs \(ROCm 6.4.1\), on which hafrm_ds has never run.*set HAFRM_TRY_ROCM=1"
    ):
        processes.use_device()
    assert chosen == []
    monkeypatch.setenv("HAFRM_TRY_ROCM", "1")
    processes.use_device()
    assert chosen == [torch.device("cuda", 0)]


def test_an_error_that_nobody_foresaw_also_stops_the_ranks_that_wait(ranks, enter, capsys):
    def main(arguments: list[str], processes: Processes) -> None:
        raise ZeroDivisionError("a bug on one rank")

    with pytest.raises(SystemExit, match="1"):
        enter(ranks[1], main)
    assert "ZeroDivisionError: a bug on one rank" in capsys.readouterr().err
    with pytest.raises(FailedElsewhere):
        ranks[0].wait(lambda: False)
    assert not ranks[0].report(DataError("of rank 0, after that"))


def test_a_collective_that_fails_with_another_rank_is_no_error_of_its_own(ranks, enter, capsys):
    def main(arguments: list[str], processes: Processes) -> None:
        raise RuntimeError("[/src/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:23945")

    with pytest.raises(SystemExit, match="1"):
        enter(ranks[1], main)
    said = capsys.readouterr().err
    assert said.startswith("rank 1 stops: another process of the run has ended, or cannot be reached: ")
    assert "Connection closed by peer [127.0.0.1]:23945" in said
    assert ranks[0].report(DataError("the error of rank 0, which is printed"))


def test_an_error_of_nccl_keeps_its_words(ranks, enter, capsys):
    def main(arguments: list[str], processes: Processes) -> None:
        raise dist.DistBackendError(
            "NCCL error in: ProcessGroupNCCL.cpp\nLast error:\nFailed to CUDA calloc: out of memory"
        )

    with pytest.raises(SystemExit, match="1"):
        enter(ranks[1], main)
    assert "DistBackendError: NCCL error" in (said := capsys.readouterr().err) and "out of memory" in said


def test_a_store_that_is_gone_means_that_rank_0_has_left():
    class Gone:
        def check(self, *given):
            raise dist.DistNetworkError("connection reset")

        add = check

    processes = Processes(1, 1, 2, Gone())
    with pytest.raises(FailedElsewhere):
        processes.wait(lambda: False)
    assert not processes.report(DataError("of rank 1"))


def test_waiting_ranks_ask_less_and_less_often(ranks, monkeypatch):
    pauses = []
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=pauses.append))
    ranks[1].wait(lambda: len(pauses) == 100)
    assert pauses[0] == module.POLL_SECONDS
    assert pauses == sorted(pauses)
    assert max(pauses) == module.LONGEST_POLL_SECONDS


def test_hosts_that_differ_are_named_once_with_what_differs(monkeypatch, capsys):
    store = dist.HashStore()
    ranks = [Processes(rank, rank % 2, 4, store, host=f"n{rank // 2 + 1}") for rank in range(4)]

    def compare(processes: Processes) -> None:
        facts = {"torch": "2.13.0", "deepspeed": "0.19.8"} if processes.host == "n1" else {"torch": "2.12.1"}
        try:
            processes.must_agree("software", facts)
            processes.wait(lambda: False)
        except UserError as error:
            processes.report(error)
            raise

    outcomes = at_once(ranks, compare)
    assert [type(outcome) for outcome in outcomes] == [UserError, *[FailedElsewhere] * 3]
    assert capsys.readouterr().err == (
        "\nerror: the hosts of this run differ from n1, where rank 0 runs, in software:\n"
        "  - n2: torch is 2.12.1, and 2.13.0 on n1\n"
        "  - n2: deepspeed is not there, and 0.19.8 on n1\n"
    )


def test_ranks_that_agree_go_on(ranks):
    assert at_once(ranks, lambda processes: processes.must_agree("data", {"train": "ab12"})) == [None] * WORLD_SIZE


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "THP_MEM_ALLOC_ENABLE": "1"}),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64", "THP_MEM_ALLOC_ENABLE": "0"},
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64", "THP_MEM_ALLOC_ENABLE": "0"},
        ),
    ],
)
def test_allocators_are_chosen_unless_the_user_has_chosen(monkeypatch, given, expected):
    monkeypatch.setattr(module, "os", SimpleNamespace(environ=dict(given)))
    module.choose_allocators()
    assert module.os.environ == expected


@pytest.fixture
def rank_0_on_loopback(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it is as it was after the test
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")


def test_gloo_gets_the_interface_that_leads_to_rank_0(rank_0_on_loopback):
    Processes(0, 0, 2, dist.HashStore(), host="n1").choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_a_loopback_address_of_rank_0_is_refused_by_the_other_hosts(rank_0_on_loopback):
    store = dist.HashStore()
    Processes(0, 0, 3, store, host="n1").choose_interface()
    del os.environ["GLOO_SOCKET_IFNAME"]
    with pytest.raises(UserError, match=r"127.0.0.1 is a loopback address on n1 itself.* n2 cannot answer"):
        Processes(2, 0, 3, store, host="n2").choose_interface()
    Processes(1, 1, 3, store, host="n1").choose_interface()


def test_a_rank_0_that_cannot_be_found_is_one_message():
    with pytest.raises(UserError, match=r"^n2 does not know the address n1.invalid of rank 0 .* set MASTER_ADDR"):
        meet(Placement("n2", 1, 0, 2, 2, "n1.invalid", 23456), timedelta(seconds=1))


def test_kernels_of_flash_attention_4_are_kept_where_the_user_says(monkeypatch):
    names = [f"FLASH_ATTENTION_CUTE_DSL_CACHE_{name}" for name in ("ENABLED", "DIR")]
    for name in names:  # set, then removed: what the call sets is removed again after the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    module.keep_compiled_kernels()
    assert [os.environ[name] for name in names] == ["1", "/cache/hafrm_ds/flash_attention_4"]
    monkeypatch.setenv(names[0], "0")
    module.keep_compiled_kernels()
    assert os.environ[names[0]] == "0"


@pytest.fixture
def torch_settings():
    """Puts back what `use_deterministic_algorithms` sets for the whole process."""
    fills = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fills


def test_deterministic_sets_torch_cublas_and_nccl(monkeypatch, torch_settings):
    monkeypatch.setattr(module, "os", SimpleNamespace(environ={"NCCL_ALGO": "Ring"}))
    text = module.use_deterministic_algorithms()
    assert text == "deterministic algorithms are on (CUBLAS_WORKSPACE_CONFIG=:4096:8, NCCL_ALGO=Ring)"
    assert module.os.environ == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize(("name", "value"), [("CUBLAS_WORKSPACE_CONFIG", ":0:0"), ("NCCL_ALGO", "NVLS")])
def test_an_environment_that_is_not_deterministic_is_refused(monkeypatch, torch_settings, name, value):
    monkeypatch.setattr(module, "os", SimpleNamespace(environ={name: value}))
    with pytest.raises(UserError, match=rf"the environment sets {name} to '{value}'.* unset it or set it to one of"):
        module.use_deterministic_algorithms()
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_a_deterministic_algorithm_is_one_message(ranks, enter, capsys, torch_settings):
    def main(arguments, processes) -> None:
        torch.use_deterministic_algorithms(True)
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))

    with pytest.raises(SystemExit):
        enter(ranks[0], main)
    assert capsys.readouterr().err == (
        "\nerror: put_ does not have a deterministic implementation. Leave --deterministic out\n"
    )
