"""launch/slurm/ under a real Slurm: two nodes on this machine, in a network and file namespace of their own.

    python -m tests.clusters.slurm [CASE ...]        cases: launch limit preempt cancel pipeline sweep; all by default

Needs root and Debian's slurmctld, slurmd, slurm-client, munge and iproute2. Everything is kept in a temporary folder
that is removed at the end, or left and named when a case fails. It takes about a quarter of an hour on two cores.
"""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

from hafrm_ds.processes.launchers import first_host
from tests.clusters.namespaces import call, enter_namespaces, say, wait_for
from tests.clusters.tiny_run import options, show_equal, steps, write_setting
from tests.distributed.launching import REPOSITORY

NODES = {"n1": "10.78.0.1", "n2": "10.78.0.2"}
SBATCH = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
"""In place of what the scripts ask for."""
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}({first})
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldPort=16817
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5,bf_interval=5,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/finished-jobs
MailProg=/bin/true
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeAddr={first} NodeHostname={host} Port=16821 CPUs=2
NodeName=n2 NodeAddr={second} NodeHostname={host} Port=16822 CPUs=2
PartitionName=low Nodes=n[1-2] Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=n[1-2] State=UP PriorityTier=2 PreemptMode=OFF
"""


@contextmanager
def cluster(folder: Path):
    """A controller and two nodes that run."""
    call("ip", "link", "set", "lo", "up")
    call("ip", "link", "add", "nodes", "type", "veth", "peer", "name", "other-end")
    call("ip", "link", "set", "nodes", "up")
    call("ip", "link", "set", "other-end", "up")
    for address in NODES.values():
        call("ip", "address", "add", f"{address}/24", "dev", "nodes")
    host, (first, second) = socket.gethostname(), NODES.values()
    hosts = folder / "hosts"
    hosts.write_text(
        f"127.0.0.1 localhost {host}\n" + "".join(f"{address} {name}\n" for name, address in NODES.items())
    )
    call("mount", "--bind", hosts, "/etc/hosts")
    for name in ("munge", "state", "n1", "n2"):
        (folder / name).mkdir(mode=0o700)
    key = folder / "munge/key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(host=host, folder=folder, first=first, second=second))
    os.environ["SLURM_CONF"] = str(configuration)
    places = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munge = [f"--{option}={folder / 'munge' / name}" for option, name in places.items()]
    daemons = [["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"]]
    daemons += [["slurmd", "-D", "-N", name] for name in NODES]
    running = []
    try:
        for command in daemons:
            with (folder / "daemons.log").open("a") as log:
                running.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
            time.sleep(1)
        states = ("sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %T")
        idle = ["n1", "idle", "n2", "idle"]
        wait_for(lambda: call(*states).split() == idle, 60, f"two idle nodes ({folder}/daemons.log)")
        yield
    finally:
        with suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["scancel", "--user=root"], timeout=20, stderr=subprocess.DEVNULL)
            time.sleep(3)
        for process in reversed(running):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=40)
            except subprocess.TimeoutExpired:
                process.kill()


class Case:
    """Jobs that are submitted from the root of the repository, with their logs in the folder of the case."""

    def __init__(self, folder: Path, setting: Path):
        self.folder, self.setting = folder, setting
        folder.mkdir()
        os.environ["HAFRM_LOGS"] = str(folder)

    def submit(self, script: str | Path, *words, sbatch=()) -> str:
        given = [*SBATCH, f"--output={self.folder}/%x-%j.log", *sbatch]
        job = call("sbatch", "--parsable", *given, script, *words)
        say(f"job {job}: sbatch {' '.join(sbatch)} {script}")
        return job

    def train(self, run: str, max_steps: int, sbatch=(), **changes) -> str:
        words = options(self.setting, max_steps, **changes)
        return self.submit("launch/slurm/train.sbatch", "--output_dir", self.folder / run, *words, sbatch=sbatch)

    def wait(self, job: str, seconds: float, state: str = "COMPLETED") -> None:
        """Until the job has ended; shows each change of its state on the way."""
        seen: list[str] = []

        def ended() -> bool:
            now = facts_of(job)
            shown = f"{now['JobState']:<10} {now['Reason']:<12} start {now['Restarts']}, exit code {now['ExitCode']}"
            if not seen or seen[-1] != shown:
                seen.append(shown)
                say(f"job {job} {now['JobName']}: {shown}")
            return now["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        wait_for(ended, seconds, f"the end of job {job}")
        if facts_of(job)["JobState"] != state:
            sys.exit(f"FAILED: job {job} is {facts_of(job)['JobState']}, not {state}\n{self.logs()}")

    def wait_for_steps(self, run: str, number: int) -> None:
        wait_for(lambda: steps(self.folder / run) >= number, 120, f"step {number} of {run}")

    def logs(self) -> str:
        files = sorted(self.folder.glob("**/*.log"))
        return "\n".join(f"==> {file}\n{file.read_text()[-3000:]}" for file in files)

    def show(self, words: str, *patterns: str) -> list[str]:
        """Lines of the logs that hold `words`."""
        files = sorted(file for pattern in patterns for file in self.folder.glob(pattern))
        lines = [(file, line) for file in files for line in file.read_text().splitlines() if words in line]
        for file, line in lines:
            print(f"          {file.relative_to(self.folder)}: {line}")
        return [line for _, line in lines]


def facts_of(job: str) -> dict[str, str]:
    """What scontrol says of a job; of an array, its first task."""
    text = call("scontrol", "--oneliner", "show", "job", job).splitlines()[0]
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def queue() -> None:
    text = call("squeue", "--Format=JobID:6,Name:18,Partition:6,StateCompact:4,TimeUsed:7,NumNodes:6,ReasonList:24")
    print("".join(f"          {line}\n" for line in text.splitlines()), end="", flush=True)


# ---- the cases -----------------------------------------------------------------------------------------------------


def launch(case: Case) -> None:
    """srun starts the ranks of two nodes, which train; a plain python in an allocation waits for nobody."""
    job = case.train("run", 20)
    wait_for(lambda: facts_of(job)["JobState"] == "RUNNING", 60, "the start of the job")
    queue()
    case.wait(job, 240)
    assert steps(case.folder / "run") == 20
    assert len(list(case.folder.glob("hafrm-train-*/rank-*.log"))) == 2, "a log for each rank"
    assert case.show("the trained model is in", "*/rank-0000.log")
    plain = [
        sys.executable,
        "-c",
        "from hafrm_ds.processes.ranks import Processes as P; print('processes:', P.join().world_size)",
    ]
    script = case.folder / "plain.sh"
    script.write_text(f"#!/bin/bash\n{shlex.join(plain)}\n")
    for way in (["salloc", "--quiet", *SBATCH], ["srun", *SBATCH, "--nodes=1"]):
        assert call(*way, *plain) == "processes: 1", way
    say("alone in the shell of salloc and as the only task of srun: 1 process")
    case.wait(case.submit(script), 60)
    assert case.show("processes:", "plain.sh-*.log") == ["processes: 1"], "in the shell of a batch script"
    for nodes in ("n[2,7-9],x1", "gpu[003-004,012],n1", "rack[2-3]node[04-11]", "a-1.example,n[1-2]"):
        assert first_host(nodes) == call("scontrol", "show", "hostnames", nodes).split()[0], nodes


def limit(case: Case) -> None:
    """A job that reaches its time limit is saved, requeued and goes on; its result is that of an undisturbed one."""
    case.wait(case.train("straight", LONG), 400)
    job = case.train("limited", LONG, sbatch=["--time=2", "--signal=USR1@60"])
    case.wait(job, 900)
    assert int(facts_of(job)["Restarts"]) >= 1, "the limit was never reached: more steps are needed"
    case.show("", "hafrm-train-" + job + ".log")
    assert case.show("stopped: SIGUSR1", f"*-{job}/rank-*.log")
    assert case.show("resuming after step", f"*-{job}/rank-*.log")
    show_equal(case.folder / "limited", case.folder / "straight")


def preempt(case: Case) -> None:
    """A job that must leave its nodes to another is saved within the grace time, requeued by Slurm, and goes on."""
    straight = case.train("straight", 400)
    case.wait(straight, 240)
    job = case.train("preempted", 400)
    case.wait_for_steps("preempted", 20)
    other = call(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 5"
    )
    say(f"job {other}: sbatch --partition=high --exclusive --wrap='sleep 5'")
    wait_for(lambda: facts_of(other)["JobState"] == "RUNNING", 120, "the job that takes the nodes")
    queue()
    case.wait(job, 400)
    case.show("", f"hafrm-train-{job}.log")
    assert case.show("stopped: SIGTERM", f"*-{job}/rank-*.log")
    assert case.show("resuming after step", f"*-{job}/rank-*.log")
    show_equal(case.folder / "preempted", case.folder / "straight")


def cancel(case: Case) -> None:
    """A job that its user cancels is saved, and does not come back."""
    job = case.train("cancelled", 100000)
    case.wait_for_steps("cancelled", 20)
    call("scancel", job)
    case.wait(job, 60, "CANCELLED")
    time.sleep(20)
    assert facts_of(job)["JobState"] == "CANCELLED" and not call("squeue", "--noheader")
    case.show("", f"hafrm-train-{job}.log")
    assert case.show("stopped: SIGTERM", f"*-{job}/rank-*.log")


def pipeline(case: Case) -> None:
    """Reference pass, training and evaluation run in this order, and stop at a stage that fails."""
    for name, changes, states in (
        ("good", {}, ["COMPLETED"] * 3),
        # Fewer pairs in a step than processes: the reference pass does not mind, the training refuses.
        ("bad", {"batch__global_batch_size": 1}, ["COMPLETED", "FAILED", "CANCELLED"]),
    ):
        os.environ["HAFRM_SBATCH"] = " ".join([*SBATCH, f"--output={case.folder}/{name}-%x.log"])
        words = options(case.setting, 20, reference__store=case.folder / f"store-{name}", **changes)
        run = case.folder / name
        text = call("bash", "launch/slurm/pipeline.sh", run, case.setting / "test.jsonl", "--", *words)
        say(f"pipeline {name}: {'; '.join(text.splitlines())}")
        jobs = [line.split()[-1] for line in text.splitlines()]
        queue()
        for job, state in zip(jobs, states, strict=True):
            case.wait(job, 240, state)
        times = [[facts_of(job)[key] for key in ("StartTime", "EndTime")] for job in jobs]
        ran = [time for time, state in zip(times, states) if state != "CANCELLED"]
        assert ran == sorted(ran) and all(a[1] <= b[0] for a, b in pairwise(ran)), times
        assert (run / "final").exists() == (name == "good")
        assert (run / "evaluated").exists() == (name == "good")
    assert case.show("batch.global_batch_size is 1", "*/rank-*.log")


def sweep(case: Case) -> None:
    """The tasks of an array train with a value each."""
    words = options(case.setting, 10)
    runs = case.folder / "alpha"
    job = case.submit(
        "launch/slurm/sweep.sbatch", "objective.alpha", "0 0.5", runs, *words, sbatch=["--array=0-1", "--nodes=1"]
    )
    wait_for(lambda: not call("squeue", "--noheader"), 240, "the end of the array")
    for value in ("0", "0.5"):
        assert steps(runs / value) == 10, case.logs()
        assert f"alpha: {float(value)}" in (runs / value / "config.yaml").read_text()
    say(f"array {job}: {', '.join(sorted(path.name for path in case.folder.iterdir()))}")


LONG = 800
"""Steps that take longer than the time until the warning."""
CASES = {case.__name__: case for case in (launch, limit, preempt, cancel, pipeline, sweep)}


def main() -> None:
    enter_namespaces("tests.clusters.slurm", "slurmctld", "slurmd", "srun", "munged")
    chosen = [word for word in sys.argv[1:] if word != "--inside"] or list(CASES)
    folder = Path(tempfile.mkdtemp(prefix="hafrm-slurm-"))
    os.environ |= {"HF_HUB_OFFLINE": "1", "HAFRM_PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY)}
    say(f"everything is in {folder}")
    setting = folder / "setting"
    setting.mkdir()
    write_setting(setting)
    with cluster(folder):
        say(call("sinfo", "--version"))
        for name in chosen:
            say(f"---- {name}: {' '.join((CASES[name].__doc__ or '').split())}")
            CASES[name](Case(folder / name, setting))
        finished = (folder / "finished-jobs").read_text()
        print("".join(f"          {line}\n" for line in finished.splitlines()))
    shutil.rmtree(folder)
    say("all is as it should be")


if __name__ == "__main__":
    main()
