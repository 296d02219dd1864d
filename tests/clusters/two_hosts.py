"""Two hosts without Slurm: namespaces of this machine, each with its own address, name and /etc/hosts.

    python -m tests.clusters.two_hosts [CASE ...]        cases: torchrun deepspeed disagreement; all by default

Needs root, iproute2 and util-linux. The hosts share the disk, so a run has one output folder. Their link goes over a
bridge, and is cut there, as by a switch that fails: no host sees its own link go down, and no connection is closed.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tests.clusters.namespaces import call, enter_namespaces, say, wait_for
from tests.clusters.tiny_run import options, show_equal, steps, write_setting
from tests.distributed.launching import LAUNCHER, REPOSITORY, write_pairs
from tests.tiny_models import save_tiny_model

ADDRESSES = {"hosta": "10.77.0.1", "hostb": "10.77.0.2"}
PORT = "23456"
STEPS, CUT_AFTER = 60, 25
DOWN_SECONDS = 30
"""Both sides must be down so long after the cut."""


class Host:
    """A process that does nothing holds the namespaces of a host; others enter them."""

    def __init__(self, name: str, folder: Path):
        self.name, self.link = name, f"to-{name}"
        holder = ["unshare", "--net", "--uts", "--mount", "--propagation", "private", "sleep", "infinity"]
        self.holder = subprocess.Popen(holder)
        # The folder is entered inside, or relative paths would see the files outside.
        inside = ["--net", "--uts", "--mount", "env", f"--chdir={REPOSITORY}"]
        self.enter = ["nsenter", f"--target={self.holder.pid}", *inside]
        own = Path("/proc/self/ns/uts").readlink()
        wait_for(lambda: Path(f"/proc/{self.holder.pid}/ns/uts").readlink() != own, 10, f"the namespaces of {name}")
        call("ip", "link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", self.holder.pid)
        call("ip", "link", "set", self.link, "up")
        self.connect()
        self.call("hostname", name)
        self.call("ip", "link", "set", "lo", "up")
        self.call("ip", "address", "add", f"{ADDRESSES[name]}/24", "dev", "eth0")
        self.call("ip", "link", "set", "eth0", "up")
        self.know(folder, ADDRESSES)

    def know(self, folder: Path, addresses: dict[str, str]) -> None:
        """Give the host an /etc/hosts."""
        file = folder / f"hosts-of-{self.name}-{time.time_ns()}"
        file.write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in addresses.items()))
        self.put(file, "/etc/hosts")

    def put(self, file: Path, place: Path | str) -> None:
        """Let this host alone see another file, or folder, at a place."""
        self.call("mount", "--bind", file, place)

    def take_away(self, place: Path | str) -> None:
        self.call("umount", place)

    def call(self, *words) -> str:
        return call(*self.enter, *words)

    def start(self, log: Path, *words) -> subprocess.Popen:
        with log.open("a") as file:
            command = [str(word) for word in (*self.enter, *words)]
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

    def connect(self) -> None:
        call("ip", "link", "set", self.link, "master", "switch")

    def cut(self) -> None:
        call("ip", "link", "set", self.link, "nomaster")


@contextmanager
def two_hosts(folder: Path) -> Iterator[list[Host]]:
    call("ip", "link", "set", "lo", "up")
    call("ip", "link", "add", "switch", "type", "bridge")
    call("ip", "link", "set", "switch", "up")
    hosts = []
    try:
        for name in ADDRESSES:
            hosts.append(Host(name, folder))
        (first, _), address = hosts, ADDRESSES["hostb"]
        wait_for(lambda: not subprocess.run([*first.enter, *ping(address)]).returncode, 20, "a connection")
        yield hosts
    finally:
        for host in hosts:
            host.holder.kill()


def ping(address: str) -> list[str]:
    """A connection that is refused has reached the other host."""
    probe = f"""import socket, sys
try: socket.create_connection(("{address}", 9), timeout=1)
except ConnectionRefusedError: sys.exit(0)
except OSError: sys.exit(1)"""
    return [sys.executable, "-c", probe]


class Launch:
    """One training on both hosts, and the launcher on each."""

    def __init__(self, way: str, hosts: list[Host], folder: Path, run: str, words: list[str]):
        self.run, self.logs, self.processes = folder / run, [], []
        (folder / "hostfile").write_text("".join(f"{host.name} slots=1\n" for host in hosts))
        meeting = ["--master_addr", "hosta", "--master_port", PORT]
        for number, host in enumerate(hosts):
            launchers = {
                "torchrun": [Path(sys.executable).with_name("torchrun"), "--nnodes", 2, "--nproc_per_node", 1],
                "deepspeed": [LAUNCHER, "--hostfile", folder / "hostfile", "--no_ssh"],
            }
            command = [*launchers[way], "--node_rank", number, *meeting, "launch/train.py", "--output_dir", self.run]
            self.logs.append(folder / f"{run}-{host.name}.log")
            self.processes.append(host.start(self.logs[-1], *command, *words))

    def finish(self, seconds: float = 240) -> None:
        wait_for(
            lambda: all(process.poll() is not None for process in self.processes), seconds, f"the end of {self.run}"
        )
        statuses = [process.returncode for process in self.processes]
        if statuses != [0, 0]:
            sys.exit(
                f"FAILED: {self.run.name} ended with {statuses}\n" + "\n".join(log.read_text() for log in self.logs)
            )

    def seconds_until_down(self) -> list[float]:
        """For each host, until its launcher and all that it started have ended."""
        started, seconds = time.monotonic(), {}

        def down() -> bool:
            for place, process in enumerate(self.processes):
                if place not in seconds and process.poll() is not None and not members(process.pid):
                    seconds[place] = time.monotonic() - started
            return len(seconds) == len(self.processes)

        wait_for(down, 120, "both sides to stop")
        return [seconds[place] for place in sorted(seconds)]

    def lines(self, words: str) -> list[str]:
        """Lines of the logs that hold `words`, shown with the host that wrote them."""
        found = []
        for log in self.logs:
            lines = [line for line in log.read_text().splitlines() if words in line]
            found += lines
            for line in lines:
                print(f"          {log.stem.rpartition('-')[2]}: {line}", flush=True)
        return found


def members(session: int) -> list[int]:
    """Processes of a session that are alive."""
    alive = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            alive.append(int(path.parent.name))
    return alive


# ---- the cases -----------------------------------------------------------------------------------------------------


def cut_and_resumed(way: str, hosts: list[Host], folder: Path) -> None:
    """A run over both hosts; the link is cut in its middle; it goes on, and equals an undisturbed one."""
    words = options(folder / "setting", STEPS, checkpoint__every_steps=10, evaluation__every_steps=20)
    straight = Launch(way, hosts, folder, f"straight-{way}", words)
    straight.finish()
    say(f"{way}: an undisturbed run over both hosts has ended after {steps(straight.run)} steps")
    run = Launch(way, hosts, folder, f"cut-{way}", [*words, "--resume", "auto"])
    wait_for(lambda: steps(run.run) >= CUT_AFTER, 120, f"step {CUT_AFTER}")
    hosts[1].cut()
    say(f"{way}: link cut after step {steps(run.run)}")
    seconds = run.seconds_until_down()
    statuses = [process.returncode for process in run.processes]
    say(f"{way}: down after {seconds[0]:.1f} s (hosta) and {seconds[1]:.1f} s (hostb), exit statuses {statuses}")
    assert max(seconds) < DOWN_SECONDS and all(statuses)
    assert len(run.lines("cannot be reached")) == 2
    hosts[1].connect()
    Launch(way, hosts, folder, f"cut-{way}", [*words, "--resume", "auto"]).finish()
    assert run.lines("resuming after step")
    show_equal(run.run, straight.run)


def torchrun(hosts: list[Host], folder: Path) -> None:
    """torchrun on each host; the link is cut; the run goes on and equals an undisturbed one."""
    cut_and_resumed("torchrun", hosts, folder)


def deepspeed(hosts: list[Host], folder: Path) -> None:
    """deepspeed --hostfile --no_ssh on each host; the link is cut; the run goes on and equals an undisturbed one."""
    cut_and_resumed("deepspeed", hosts, folder)


def disagreement(hosts: list[Host], folder: Path) -> None:
    """Hosts with other software, options, data, weights, or a loopback address, are named before training starts."""
    setting, other = folder / "setting", folder / "other"
    other.mkdir()
    write_pairs(other / "train.jsonl", 200, seed=7)
    save_tiny_model(other / "model", "llama")
    (other / "zero3.json").write_text('{"zero_optimization": {"stage": 3, "reduce_bucket_size": 1000000}}')
    code = REPOSITORY / "hafrm_ds/objective.py"
    (other / "objective.py").write_text(code.read_text() + "\n# another version\n")
    weights = setting / "model/model.safetensors"
    (package,) = Path(torch.__file__).parents[1].glob("torch-*.dist-info/METADATA")
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.0.1\n")
    for name, place, file, expected in (
        ("code", code, other / "objective.py", "- hostb: code of hafrm_ds is"),
        ("version", package, other / "METADATA", "- hostb: torch is 2.0.1, and"),
        ("options", REPOSITORY / "ds_configs/zero3.json", other / "zero3.json", "- hostb: the content of ds_configs"),
        ("data", setting / "train.jsonl", other / "train.jsonl", "- hostb: train is"),
        ("weights", weights, other / "model/model.safetensors", "- hostb: weights is"),
        ("address", None, None, "hosta is a loopback address on hosta itself"),
    ):
        if file is not None and place is not None:
            hosts[1].put(file, place)
        else:
            hosts[0].know(folder, ADDRESSES | {"hosta": "127.0.1.1"})
        run = Launch("torchrun", hosts, folder, f"other-{name}", options(setting, 5))
        seconds = run.seconds_until_down()
        say(f"other {name} on hostb: both down after {max(seconds):.1f} s")
        run.lines("differ from hosta")
        assert len(run.lines(expected)) == 1, [log.read_text() for log in run.logs]
        assert not steps(run.run)
        if place is not None:
            hosts[1].take_away(place)


CASES = {case.__name__: case for case in (torchrun, deepspeed, disagreement)}


def main() -> None:
    enter_namespaces("tests.clusters.two_hosts", "nsenter")
    chosen = [word for word in sys.argv[1:] if word != "--inside"] or list(CASES)
    folder = Path(tempfile.mkdtemp(prefix="hafrm-two-hosts-"))
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    say(f"everything is in {folder}")
    (folder / "setting").mkdir()
    write_setting(folder / "setting")
    with two_hosts(folder) as hosts:
        for name in chosen:
            say(f"---- {name}: {CASES[name].__doc__}")
            CASES[name](hosts, folder)
    shutil.rmtree(folder)
    say("all is as it should be")


if __name__ == "__main__":
    main()
