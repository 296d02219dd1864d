"""What launch/policy.py refuses before it starts; that it trains, tests/distributed/test_policy.py shows."""

import json

import pytest
import torch
import torch.distributed as dist
import trl

from hafrm_ds.errors import ConfigError, DataError
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.training.policy import PolicyOptions, arguments_of, json_for_transformers, train_policy, whole_checkpoint
from tests.data.row_files import write_lines


def processes(world_size: int = 1) -> Processes:
    return Processes(rank=0, local_rank=0, world_size=world_size, store=dist.HashStore())


def options_for(folder, **changes) -> PolicyOptions:
    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        write_lines(prompts, [{"prompt": "a"}])
    given = {"policy": "p", "reward": "r", "prompts": prompts, "output_dir": folder / "out"}
    return PolicyOptions(**given | changes)


def test_answers_that_cannot_be_shared_are_refused(tmp_path):
    message = "--prompts_per_step 1 x --num_generations 3 answers cannot be shared by 2 processes"
    with pytest.raises(ConfigError, match=message):
        train_policy(options_for(tmp_path, prompts_per_step=1, num_generations=3), processes(2))
    write_lines(tmp_path / "prompts.jsonl", [])
    with pytest.raises(DataError, match=r"--prompts .*prompts\.jsonl is empty"):
        train_policy(options_for(tmp_path), processes())
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="arguments for a CPU")
def test_an_option_that_trl_does_not_know_is_refused(tmp_path):
    alone = processes()
    with pytest.raises(ConfigError, match=r"--trl: GRPOConfig takes no such options: .*no_such_option"):
        arguments_of(trl.GRPOConfig, options_for(tmp_path, trl={"no_such_option": 1}), alone)


def test_a_json_of_ours_gets_what_transformers_fills_in(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}, "train_batch_size": 8}))
    assert json_for_transformers(file) == {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage3_gather_16bit_weights_on_model_save": True, "stage": 3},
    }
    with pytest.raises(ConfigError, match=r"nowhere\.json cannot be read"):
        json_for_transformers(tmp_path / "nowhere.json")


def test_what_a_kill_has_left_of_a_checkpoint_is_not_resumed(tmp_path):
    assert whole_checkpoint(tmp_path) is None
    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}" / "whole").touch()
    assert whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert not (tmp_path / "checkpoint-12").exists() and (tmp_path / "checkpoint-2").exists()
