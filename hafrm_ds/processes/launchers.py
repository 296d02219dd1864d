"""Which process of a run this one is, read from the environment variables that its launcher sets.

    deepspeed, torchrun   RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT
    srun                  SLURM_PROCID, SLURM_LOCALID, SLURM_STEP_NUM_TASKS, SLURM_STEP_NODELIST, SLURM_JOB_ID

The first count where both are there: srun may have started torchrun.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from hafrm_ds.errors import UserError

FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm's numbers from here on are no srun: the shell of a batch script, the shell of salloc."""
PORTS = range(20000, 32000)
"""Below the ports that Linux hands out by itself (32768 to 60999)."""
TIMEOUT_VARIABLE = "HAFRM_TIMEOUT_MINUTES"
DEFAULT_TIMEOUT_MINUTES = 30.0


@dataclass(frozen=True)
class Placement:
    """One process among those of a run.

    host: name of the host it runs on.
    local_rank: among the processes of its host.
    num_hosts: as far as the launcher tells; 1 if it does not.
    address, port: where rank 0 keeps the rendezvous store.
    """

    host: str
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    num_hosts: int = 1
    address: str = "127.0.0.1"
    port: int = 0

    @property
    def variables(self) -> dict[str, str]:
        """What torch and DeepSpeed look for in the environment."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def placement_of(environment: Mapping[str, str], host: str) -> Placement | None:
    """What the launcher says; None if there is none, and this process is alone.

    A shell that Slurm started (sbatch, salloc) is no launcher: only inside an srun step there are other processes.

    Args:
        host: name of this host, where Slurm has no other for it.

    Raises:
        UserError: the variables are incomplete, no numbers, or no place among the processes.
    """
    placement = read_placement(environment, host)
    if placement is not None and not placement.rank < placement.world_size:
        raise UserError(
            f"this process is rank {placement.rank} of {placement.world_size} (RANK and WORLD_SIZE, or what srun says "
            f"for them): ranks count from 0, so the last is {placement.world_size - 1}"
            if placement.world_size
            else "WORLD_SIZE is 0: it counts the processes of the run, of which this is one"
        )
    if placement is not None and not 0 < placement.port < 2**16:
        raise UserError(f"MASTER_PORT is {placement.port}; a port is a number from 1 to 65535")
    return placement


def read_placement(environment: Mapping[str, str], host: str) -> Placement | None:
    """`placement_of`, whatever the numbers are."""
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return Placement(
            host,
            rank=number(environment, "RANK"),
            local_rank=number(environment, "LOCAL_RANK", 0),
            world_size=number(environment, "WORLD_SIZE"),
            # torchrun's name and DeepSpeed's
            num_hosts=number(environment, "GROUP_WORLD_SIZE", number(environment, "CROSS_SIZE", 1)),
            address=text(environment, "MASTER_ADDR"),
            port=number(environment, "MASTER_PORT"),
        )
    if "SLURM_PROCID" in environment and number(environment, "SLURM_STEP_ID", FIRST_SPECIAL_STEP) < FIRST_SPECIAL_STEP:
        job, step = number(environment, "SLURM_JOB_ID"), number(environment, "SLURM_STEP_ID")
        return Placement(
            environment.get("SLURMD_NODENAME", host),
            rank=number(environment, "SLURM_PROCID"),
            local_rank=number(environment, "SLURM_LOCALID"),
            world_size=number(environment, "SLURM_STEP_NUM_TASKS"),
            num_hosts=number(environment, "SLURM_STEP_NUM_NODES", 1),
            address=environment.get("MASTER_ADDR") or first_host(text(environment, "SLURM_STEP_NODELIST")),
            port=number(environment, "MASTER_PORT", port_of(job, step)),
        )
    return None


def first_host(node_list: str) -> str:
    """The first name of a Slurm list of hosts, where rank 0 runs: gpu[007-009,12],login1 -> gpu007.

    Read here and not by scontrol, which containers do not have.
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", node_list)
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0] if first else node_list)


def port_of(job: int, step: int) -> int:
    """The port of a job step: the same on all its hosts, and another one for the jobs and steps beside it."""
    return PORTS[(101 * job + step) % len(PORTS)]


def timeout_of(environment: Mapping[str, str]) -> timedelta:
    """How long the processes wait for one another when they meet, and in each collective.

    Raises:
        UserError: HAFRM_TIMEOUT_MINUTES is no number above 0.
    """
    given = environment.get(TIMEOUT_VARIABLE, str(DEFAULT_TIMEOUT_MINUTES))
    try:
        timeout = timedelta(minutes=float(given))
    except (ValueError, OverflowError):
        timeout = timedelta(0)
    if timeout <= timedelta(0):
        raise UserError(f"the environment variable {TIMEOUT_VARIABLE} is {given!r}; it takes a number above 0")
    return timeout


def text(environment: Mapping[str, str], name: str) -> str:
    if not environment.get(name):
        known = ", ".join(f"{key}={environment[key]}" for key in ("RANK", "WORLD_SIZE") if key in environment)
        raise UserError(
            f"the environment variable {name} is not set, but others say that a launcher started this process "
            f"({known or 'SLURM_STEP_ID=' + environment['SLURM_STEP_ID']}). Start with deepspeed, torchrun or srun, "
            "which set all of them, or unset those"
        )
    return environment[name]


def number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    if default is not None and not environment.get(name):
        return default
    value = text(environment, name)
    if not value.isdecimal():
        raise UserError(f"the environment variable {name} is {value!r}; it takes a whole number")
    return int(value)
