"""Who a process is, from the environments that launchers give it (as printed by each of them)."""

from datetime import timedelta

import pytest

from hafrm_ds.errors import UserError
from hafrm_ds.processes.launchers import PORTS, Placement, first_host, placement_of, port_of, timeout_of

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
DEEPSPEED = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_SIZE": "4",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
ALLOCATION = {  # of sbatch and salloc
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NTASKS": "8",
    "SLURM_NNODES": "2",
}
SRUN = ALLOCATION | {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURMD_NODENAME": "n2",
}


@pytest.mark.parametrize("environment", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
def test_the_variables_of_torch_count(environment):
    placement = placement_of(environment, "n2")
    assert placement == Placement("n2", 5, 1, 8, 2, "10.0.0.1", 29500)
    assert placement.variables.items() <= environment.items()


def test_srun_is_a_launcher():
    port = PORTS[101 * 4711 % 12000]
    assert placement_of(SRUN, "login") == Placement("n2", 5, 1, 8, 2, "n1", port)


def test_a_step_on_some_hosts_of_a_job_meets_at_its_own_first():
    environment = SRUN | {"SLURM_STEP_NODELIST": "n2", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_NODES": "1"}
    placement = placement_of(environment, "n2")
    assert (placement.address, placement.num_hosts) == ("n2", 1)
    assert placement.port == placement_of(SRUN, "n2").port + 3


def test_address_and_port_that_are_given_count_under_srun():
    placement = placement_of(SRUN | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"}, "n2")
    assert (placement.address, placement.port) == ("10.0.0.7", 1234)


def test_torchrun_inside_srun_is_the_launcher():
    assert placement_of(SRUN | TORCHRUN, "n2").address == "10.0.0.1"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        ALLOCATION,
        ALLOCATION | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # the shell of sbatch
        SRUN | {"SLURM_STEP_ID": str(0xFFFFFFFA)},  # the shell of salloc
    ],
    ids=["no launcher", "allocation", "batch script", "interactive step"],
)
def test_without_a_launcher_a_process_waits_for_nobody(environment):
    assert placement_of(environment, "n1") is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, r"WORLD_SIZE is not set, .* \(RANK=0\)"),
        ({"WORLD_SIZE": "4"}, r"RANK is not set, .* \(WORLD_SIZE=4\)"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, r"MASTER_ADDR is not set"),
        (TORCHRUN | {"RANK": "-1"}, r"RANK is '-1'; it takes a whole number"),
        ({**SRUN, "SLURM_STEP_NODELIST": ""}, r"SLURM_STEP_NODELIST is not set, .* \(SLURM_STEP_ID=0\)"),
    ],
)
def test_half_an_environment_is_refused_by_name(environment, message):
    with pytest.raises(UserError, match=message):
        placement_of(environment, "n1")


@pytest.mark.parametrize(
    ("node_list", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[007-009,12],login1", "gpu007"),
        ("gpu-a[3,5],gpu-b[1-9]", "gpu-a3"),
        ("rack[2-3]node[04-11]", "rack2node04"),
        ("ip-10-0-1-5.internal,n[1-2]", "ip-10-0-1-5.internal"),
    ],
)
def test_the_first_host_of_a_list(node_list, first):
    """By hand, after the notation that `scontrol show hostnames` reads."""
    assert first_host(node_list) == first


def test_jobs_and_steps_beside_one_another_have_other_ports():
    ports = [port_of(job, step) for job in range(1000, 1100) for step in range(3)]
    assert len(set(ports)) == len(ports)
    assert all(port in PORTS for port in ports)


def test_the_time_out_is_a_number_of_minutes():
    assert timeout_of({}) == timedelta(minutes=30)
    assert timeout_of({"HAFRM_TIMEOUT_MINUTES": "0.5"}) == timedelta(seconds=30)
    for wrong in ("0", "-3", "soon", "nan"):
        with pytest.raises(UserError, match=f"HAFRM_TIMEOUT_MINUTES is {wrong!r}"):
            timeout_of({"HAFRM_TIMEOUT_MINUTES": wrong})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"RANK": "9", "WORLD_SIZE": "2"}, "rank 9 of 2 .*the last is 1"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of 2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "70000"}, "MASTER_PORT is 70000"),
    ],
)
def test_impossible_ranks_are_refused_at_once(changes, said):
    with pytest.raises(UserError, match=said):
        placement_of({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"} | changes, "here")
