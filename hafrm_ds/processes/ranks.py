"""The processes of a run: who they are, work that one does before the others, and one voice for errors.

Everything here works before the process group exists: preparing data can take an hour, and a collective that waits so
long times out. The rendezvous store waits as long as it is told to.
"""

import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hafrm_ds.errors import UserError, print_in_any_encoding
from hafrm_ds.hardware.devices import refuse_untried
from hafrm_ds.processes.agreement import differences, disagreement, software
from hafrm_ds.processes.launchers import Placement, placement_of, timeout_of
from hafrm_ds.processes.meeting import meet
from hafrm_ds.processes.network import interface_towards
from hafrm_ds.processes.peers import PeerWatch
from hafrm_ds.processes.stopping import STOPPED_STATUS, Launcher, Stopped, StopRequest

T = TypeVar("T")

POLL_SECONDS, LONGEST_POLL_SECONDS = 0.1, 2.0
"""Ranks that wait ask rank 0's store less and less often: there may be a thousand of them."""
ERRORS = "errors"
"""Key in the store: how many ranks have met an error."""


class FailedElsewhere(UserError):
    """Another rank has met an error and reports it; this one only leaves."""


@dataclass
class Processes:
    """This process among those of the run.

    stopping: what has asked this process to stop, if anything has.
    watch: tells when another process has ended; None where nobody watches.
    host: name of this host.
    num_hosts: as far as the launcher tells; 1 if it does not.
    timeout: of each collective.
    first_store: that of all jobs, where `store` is of one of them (`for_job`).
    words: the message of an error in the words of the entry file, which may have other names for options.
    """

    rank: int
    local_rank: int
    world_size: int
    store: dist.Store
    stopping: StopRequest = field(default_factory=StopRequest)
    watch: PeerWatch | None = None
    host: str = field(default_factory=socket.gethostname)
    num_hosts: int = 1
    timeout: timedelta = field(default_factory=lambda: timeout_of(os.environ))
    first_store: dist.Store | None = None
    words: Callable[[UserError], str] = str

    @property
    def errors(self) -> dist.Store:
        """The store in which ranks say that they have met an error."""
        return self.first_store or self.store

    def for_job(self, name: str) -> "Processes":
        """These processes for one of several jobs one after another, with names of its own in the store."""
        return replace(self, store=dist.PrefixStore(name, self.store), first_store=self.errors)

    @classmethod
    def join(cls) -> "Processes":
        """Meet the other processes that the launcher started; without a launcher this one is alone.

        From here on signals are caught, and the processes and their launcher are watched.

        Raises:
            UserError: the launcher's variables are incomplete, or the processes do not find one another.
        """
        stopping = StopRequest()
        stopping.install()
        host, timeout = socket.gethostname(), timeout_of(os.environ)
        placement = placement_of(os.environ, host)
        launcher = Launcher.above() if placement is not None else None

        def look_up() -> None:
            if launcher is not None:
                stopping.stop_if_lost(launcher)

        if placement is None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                placement = Placement(host, port=probe.getsockname()[1])
        os.environ |= placement.variables
        processes = cls(
            placement.rank,
            placement.local_rank,
            placement.world_size,
            meet(placement, timeout, on_wait=look_up),
            stopping,
            host=placement.host,
            num_hosts=placement.num_hosts,
            timeout=timeout,
        )
        processes.watch = watch_peers(processes, placement.address, on_tick=look_up)
        return processes

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def name(self) -> str:
        """The name of this process in messages."""
        return f"rank {self.rank}" + (f" on {self.host}" if self.num_hosts > 1 else "")

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def machine_size(self) -> int:
        """Processes of each host; 1 where the hosts have not equally many."""
        return 1 if self.world_size % self.num_hosts else self.world_size // self.num_hosts

    def use_device(self) -> None:
        """Make this process's GPU the one that kernels run on when they are not told."""
        if self.device.type != "cuda":
            return
        refuse_untried(self.device)
        if self.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"{self.name} is process {self.local_rank} (from 0) of its host and sees "
                f"{torch.cuda.device_count()} GPUs. Start as many processes on a host as it has GPUs, and let each see "
                "all of them: with srun by --gpus-per-node, not by --gpus-per-task or --gpu-bind"
            )
        torch.cuda.set_device(self.device)

    def in_turns(self, name: str, work: Callable[[], T]) -> T:
        """Run cached `work` on rank 0, then on the first rank of each other node, then on all others.

        The later ones find what the earlier ones left in the cache, on shared and on local disks.

        Raises:
            FailedElsewhere: an error has stopped another rank meanwhile.
        """
        first, node = f"{name}/first", f"{name}/node/{self.host}"
        if not self.is_first:
            self.wait(lambda: self.store.check([first if self.local_rank == 0 else node]))
        result = work()
        if self.is_first:
            self.store.set(first, "done")
        if self.local_rank == 0:
            self.store.set(node, "done")
        return result

    def from_first(self, name: str, work: Callable[[], Any]) -> Any:
        """What `work` gives on rank 0, on every rank, as it comes through JSON; the others wait for it as long as it
        takes.

        Raises:
            FailedElsewhere: an error has stopped another rank meanwhile.
        """
        key = f"text/{name}"
        if self.is_first:
            self.store.set(key, json.dumps(work()))
        else:
            self.wait(lambda: self.store.check([key]))
        return json.loads(self.store.get(key))

    def texts_of_all(self, name: str, text: str) -> list[str]:
        """What each rank gives, on rank 0, which waits for all; an empty list elsewhere.

        Raises:
            FailedElsewhere: an error has stopped another rank meanwhile.
        """
        self.store.set(f"text/{name}/{self.rank}", text)
        if not self.is_first:
            return []
        keys = [f"text/{name}/{rank}" for rank in range(self.world_size)]
        self.wait(lambda: self.store.check(keys))
        return [self.store.get(key).decode() for key in keys]

    def must_agree(self, subject: str, facts: Mapping[str, str | None]) -> None:
        """Compare what this rank knows with what rank 0 does, before anything rests on its being the same.

        Args:
            subject: what the facts are, for the message: "software".
            facts: name -> value, or a hash of it.

        Raises:
            UserError: on rank 0, with the hosts and what differs.
            FailedElsewhere: an error has stopped another rank meanwhile.
        """
        if self.world_size == 1:
            return
        expected = self.from_first(f"{subject} of rank 0", lambda: facts)
        found = self.texts_of_all(f"differences in {subject}", json.dumps([self.host, differences(expected, facts)]))
        if message := disagreement(subject, self.host, [json.loads(text) for text in found]):
            raise UserError(message)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait for as long as it takes.

        Raises:
            FailedElsewhere: another rank has reported an error, or rank 0, which keeps the store, has left.
        """
        pause = POLL_SECONDS
        try:
            while not condition():
                if self.errors.check([ERRORS]):
                    raise FailedElsewhere
                time.sleep(pause)
                pause = min(1.2 * pause, LONGEST_POLL_SECONDS)
        except dist.DistError as error:
            raise FailedElsewhere from error

    def start_group(self) -> None:
        """Start the process group of the collectives, on the store that is already there. Runs after one another in
        these processes, each with a store of its own, share it."""
        # A rank that has met an error never arrives; the group would wait for it until the collectives time out.
        self.store.add("arrived", 1)
        self.wait(lambda: self.store.add("arrived", 0) == self.world_size)
        if dist.is_initialized():
            return
        self.use_device()
        if self.device.type != "cuda" and self.num_hosts > 1:
            self.choose_interface()
        is_cuda = self.device.type == "cuda"
        # DeepSpeed's collectives run in a group of its own, so two communicators may be busy at once: under ZeRO-3
        # weights that are fetched ahead, and a vote whether to stop. Their kernels could then start in another order on
        # each GPU, and wait for one another for ever. All ranks call both in the same order, one after another, and
        # NCCL (2.26 and later, which torch brings) keeps it. Handing DeepSpeed's group to every collective of ours
        # would do as well, but all rooms would have to know it.
        os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=dist.PrefixStore("group", self.store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=self.timeout,
            # Without it torch guesses at the first barrier, with a warning. With it every later group, as DeepSpeed's
            # own, is split off this one, which NCCL refuses on a single rank (CUDA error 600).
            device_id=self.device if is_cuda and self.world_size > 1 else None,
        )

    def choose_interface(self) -> None:
        """Let gloo use the interface that leads to rank 0. By itself it takes the address that this host's name has
        here, and /etc/hosts often has a loopback address for it, which no other host reaches.

        Raises:
            UserError: rank 0 would offer a loopback address.
        """
        if "GLOO_SOCKET_IFNAME" in os.environ:
            return
        address = os.environ["MASTER_ADDR"]
        own = interface_towards(address)
        first_host, is_loopback = self.from_first("interface", lambda: [self.host, own.is_loopback])
        if is_loopback and first_host != self.host:
            raise UserError(
                f"{address} is a loopback address on {first_host} itself, where rank 0 runs (see /etc/hosts there), "
                f"and {self.host} cannot answer to that. Set MASTER_ADDR to an address that all hosts reach, or "
                "GLOO_SOCKET_IFNAME to the interface between them"
            )
        if own.name is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = own.name

    def report(self, error: UserError) -> bool:
        """Print the message of an error that stops this rank, unless another rank has; True if it was printed."""
        if isinstance(error, FailedElsewhere) or not self.speaks():
            return False
        where = f" ({self.name})" if self.num_hosts > 1 else ""
        print(f"\nerror{where}: {self.words(error)}", file=sys.stderr, flush=True)
        return True

    def speaks(self) -> bool:
        """True for the first rank that asks."""
        try:
            return self.errors.add(ERRORS, 1) == 1
        except dist.DistError:  # rank 0, which keeps the store, has left: it has spoken
            return False


def watch_peers(processes: Processes, address: str, on_tick: Callable[[], None]) -> PeerWatch:
    """Start the watch of this rank. Where a firewall is in its way the run continues without; each host says so once.

    Raises:
        UserError: the rendezvous store does not tell where the watch of rank 0 is.
    """
    store = processes.store
    try:
        watch = PeerWatch(processes.rank, processes.world_size, store, address, name=processes.name, on_tick=on_tick)
        if watch.problem is not None and store.add(f"watch/{processes.host}", 1) == 1:
            print(
                f"WARNING {processes.name} does not reach the watch of rank 0 ({watch.problem}): the run continues "
                f"without it, and a rank that is killed may be noticed only when a collective times out, after "
                f"{processes.timeout}. Open the ports above 1023 between the hosts of a run",
                file=sys.stderr,
                flush=True,
            )
    except (OSError, dist.DistError) as error:
        raise UserError(f"{processes.name} cannot start the watch over the other ranks: {reason_of(error)}") from error
    return watch


def reason_of(error: Exception) -> str:
    """The first line of an error of torch or of the system, without the trace of C++ frames behind it."""
    return str(error).split("\n")[0]


def choose_allocators() -> None:
    """Settings of torch's memory, which it reads when it first allocates; what the user has set stays."""
    # Huge pages on the CPU, where page faults otherwise take a quarter of a step.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Segments that grow on a GPU: every micro-batch has another shape, and would leave fragments of fixed ones behind.
    # The second name is the older one.
    if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def keep_compiled_kernels() -> None:
    """Let FlashAttention 4 keep what it compiles beside other caches of the user: by itself every rank of every run
    compiles anew, seconds a variant. What the user has set stays."""
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(cache / "hafrm_ds" / "flash_attention_4"))


DETERMINISTIC_VALUES = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("^NVLS,NVLSTree", "^NVLS", "Ring", "Tree", "CollnetDirect", "CollnetChain"),
}
"""Environment variable -> the values under which cuBLAS and NCCL add in one order, the first where none is set. Those
of NCCL are the ones that Megatron-LM's deterministic mode takes: a switch (NVLS) adds in the order of arrival."""


def use_deterministic_algorithms() -> str:
    """Let torch, cuBLAS and NCCL take only algorithms that give equal bits in equal runs. Comes before CUDA starts:
    cuBLAS and NCCL read their variables once.

    Returns:
        What is set, for the log.

    Raises:
        UserError: the user's environment asks for another algorithm.
    """
    for name, values in DETERMINISTIC_VALUES.items():
        if (given := os.environ.setdefault(name, values[0])) not in values:
            raise UserError(
                f"deterministic is true, but the environment sets {name} to {given!r}, which need not give the same "
                f"bits twice; unset it or set it to one of {'  '.join(values)}"
            )
    torch.use_deterministic_algorithms(True)
    # Filling what is not written yet is for finding mistakes, and costs a kernel for each tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # made by torch at run time
    settings = ", ".join(f"{name}={os.environ[name]}" for name in DETERMINISTIC_VALUES)
    return f"deterministic algorithms are on ({settings})"


def run_entry(main: Callable[[list[str], Processes], None]) -> None:
    """Run an entry file: a UserError becomes one message from one rank, and exit status 1 on all.

    A collective that fails because another rank has left is the consequence of an error, not the error: the rank whose
    it is reports it. Anything else keeps its traceback; ranks that wait for this one are told, for they would wait for
    ever. A run that was asked to stop ends with STOPPED_STATUS.
    """
    print_in_any_encoding()
    choose_allocators()
    keep_compiled_kernels()
    try:
        processes = Processes.join()
    except Stopped as stop:
        if not stop.is_told:
            print(f"\n{stop}", file=sys.stderr, flush=True)
        os._exit(STOPPED_STATUS)  # a thread may be waiting for rank 0 inside torch, which no signal interrupts
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    status: int = 1
    verdict: str | None = f"{processes.name} has met an error"
    try:
        processes.must_agree("software", software())
        main(sys.argv[1:], processes)
        status, verdict = 0, None
    except Stopped as stop:
        # All ranks have agreed on it if something was saved; else the others cannot continue without this one.
        status, verdict = STOPPED_STATUS, None if stop.checkpoint else f"{processes.name} was asked to stop"
        if processes.speaks():  # and those that wait for this rank learn that it leaves
            print(f"\n{stop}", file=sys.stderr, flush=True)
    except UserError as error:
        processes.report(error)
    except Exception as error:
        if is_lost_connection(error):
            cause = processes.watch and processes.watch.verdict_soon()
            # NCCL says in these words too that it has no memory, or no interface: they are kept where no rank is known
            # to have ended.
            print(f"{processes.name} stops: {cause or lost_connection(error)}", file=sys.stderr, flush=True)
        elif has_no_deterministic_algorithm(error):
            processes.report(UserError(f"{reason_of(error).split(', but')[0]}. Leave --deterministic out"))
        else:
            processes.speaks()
            traceback.print_exc()
    processes.stopping.defer()  # what follows must not be interrupted by an impatient launcher
    if processes.watch is not None:
        processes.watch.leave(verdict)
    if status:
        sys.exit(status)
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost_connection(error: Exception) -> bool:
    """A collective that failed, or a store that is gone: gloo raises a plain RuntimeError that names its own source."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def lost_connection(error: Exception) -> str:
    """The message for a lost connection of which nobody has said the cause: what torch has said stands in it."""
    return f"another process of the run has ended, or cannot be reached: {type(error).__name__}: {error}"


def has_no_deterministic_algorithm(error: Exception) -> bool:
    """An operation that torch refuses under `use_deterministic_algorithms`."""
    return isinstance(error, RuntimeError) and "does not have a deterministic implementation" in str(error)
