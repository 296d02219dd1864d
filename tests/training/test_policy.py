"""What launch/policy.py refuses before it starts; that it trains, tests/distributed/test_policy.py shows."""

import json

import pytest
import torch
import torch.distributed as dist
import trl
from transformers import AutoConfig, AutoModelForSequenceClassification

from hafrm_ds.errors import ConfigError, DataError, ModelError
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.training.policy import (
    PolicyOptions,
    arguments_of,
    claim,
    json_for_transformers,
    newest_checkpoint,
    open_policy,
    refuse_options_of_trl,
    train_policy,
)
from tests.data.row_files import write_lines
from tests.tiny_models import save_tiny_final, save_tiny_model


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
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": "a"}] * 3)
    with pytest.raises(DataError, match=r"has 3 prompts, fewer than a step takes \(--prompts_per_step 8\)"):
        train_policy(options_for(tmp_path), processes())
    (tmp_path / "prompts.jsonl").write_text('"a"\n')
    with pytest.raises(DataError, match=r"prompts\.jsonl:1: the row is the text 'a', expected an object with a prompt"):
        train_policy(options_for(tmp_path), processes())
    assert not (tmp_path / "out").exists()


def test_a_finished_policy_is_not_taken_for_that_of_another_reward(tmp_path):
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": "a"}] * 8)
    reward = tmp_path / "reward.py"
    reward.write_text("def short(prompt, answer):\n    return -len(answer)\n")
    options = options_for(tmp_path, policy=str(save_tiny_final(tmp_path / "final")), reward=f"{reward}:short")
    claim(options, processes())
    (tmp_path / "out" / "final").mkdir()
    train_policy(options, processes())  # says that it is there
    reward.write_text("def short(prompt, answer):\n    return len(answer)\n")
    with pytest.raises(DataError, match="holds parts of a job with another model, input or setting"):
        train_policy(options, processes())


def test_the_folder_of_a_training_is_not_written_into(tmp_path):
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": "a"}] * 8)
    (tmp_path / "reward.py").write_text("def short(prompt, answer):\n    return -len(answer)\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text("seed: 1")
    policy = str(save_tiny_final(tmp_path / "out" / "final"))
    with pytest.raises(DataError, match=r"config\.yaml is there already, and not of this job"):
        train_policy(options_for(tmp_path, policy=policy, reward=f"{tmp_path}/reward.py:short"), processes())
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.yaml", "final"]
    assert (tmp_path / "out" / "config.yaml").read_text() == "seed: 1"


def test_the_options_of_trl_that_are_ours_or_unknown_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"--trl: GRPOConfig has no option top_pp; did you mean 'top_p'"):
        refuse_options_of_trl(trl.GRPOConfig, options_for(tmp_path, trl={"top_pp": 1}))
    with pytest.raises(ConfigError, match=r"--trl max_completion_length: give --max_new_tokens instead"):
        refuse_options_of_trl(trl.GRPOConfig, options_for(tmp_path, trl={"max_completion_length": 1}))
    with pytest.raises(ConfigError, match="TRL refuses the options: "):
        arguments_of(
            trl.GRPOConfig, options_for(tmp_path, trl={"loss_type": "none", "lr_scheduler_type": "x"}), processes()
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="arguments for a CPU")
def test_fewer_answers_at_once_leave_a_step_as_it_was(tmp_path):
    arguments = arguments_of(
        trl.GRPOConfig, options_for(tmp_path, trl={"per_device_train_batch_size": 4}), processes(2)
    )
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (4, 8)
    for wrong in (5, 0, -1, "many"):
        with pytest.raises(
            ConfigError, match=f"per_device_train_batch_size {wrong} does not divide the 64 answers of a process"
        ):
            arguments_of(trl.GRPOConfig, options_for(tmp_path, trl={"per_device_train_batch_size": wrong}), processes())


def test_a_policy_that_cannot_answer_is_refused_before_the_folder_is_claimed(tmp_path):
    write_lines(tmp_path / "prompts.jsonl", [{"prompt": "a"}] * 8)
    classifier = save_tiny_model(tmp_path / "classifier")
    config = AutoConfig.from_pretrained(classifier, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(classifier)
    with pytest.raises(ModelError, match=r"--policy .*classifier has no LM head: it cannot answer"):
        train_policy(options_for(tmp_path, policy=str(classifier)), processes())
    bare = save_tiny_model(tmp_path / "bare", chat_template=None)
    with pytest.raises(ModelError, match=r"has no chat template, so one must be named"):
        train_policy(options_for(tmp_path, policy=str(bare)), processes())
    assert open_policy(options_for(tmp_path, policy=str(bare), chat_template="chatml")).formatter().template
    assert not (tmp_path / "out").exists()


def test_a_json_of_ours_gets_what_transformers_fills_in(tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(
        json.dumps(
            {
                "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False},
                "train_batch_size": 8,
            }
        )
    )
    assert json_for_transformers(file) == {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage3_gather_16bit_weights_on_model_save": True, "stage": 3},
    }
    with pytest.raises(ConfigError, match=r"nowhere\.json cannot be read"):
        json_for_transformers(tmp_path / "nowhere.json")


def test_what_a_kill_has_left_of_a_checkpoint_is_not_resumed(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {step}, "kind": "policy"}}\n' for step in range(1, 13)) + '{"step": 1')
    (tmp_path / "checkpoint-best").mkdir()  # which somebody has kept
    for step in (2, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}" / "whole").touch()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert not (tmp_path / "checkpoint-12").exists() and (tmp_path / "checkpoint-2").exists()
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 11))
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}" / "whole").unlink()
    assert newest_checkpoint(tmp_path) is None and metrics.read_text() == ""
    assert (tmp_path / "checkpoint-best").exists()
