"""launch/policy.py as it is run: TRL's trainers on two ranks under ZeRO-3, killed and started again."""

import json

import pytest

from hafrm_ds.saved.opening import open_model
from tests.data.row_files import write_lines
from tests.distributed.forked_ranks import Ranks, run_ranks
from tests.distributed.launching import as_options
from tests.tiny_models import save_tiny_final, save_tiny_model

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(folder, function from the name of an output and further options to the arguments)"""
    folder = tmp_path_factory.mktemp("policy")
    save_tiny_final(folder / "final", "llama", pad_token="</s>")
    prompts = write_lines(folder / "prompts.jsonl", [{"prompt": f"what of {n}"} for n in range(12)])
    (folder / "reward.py").write_text("def short(prompt, answer):\n    return -len(answer)\n")
    shared = {
        "policy": folder / "final",
        "reward": f"{folder / 'reward.py'}:short",
        "prompts": prompts,
        "deepspeed": "ds_configs/zero3.json",
        "max_steps": 4,
        "prompts_per_step": 2,
        "num_generations": 2,
        "max_new_tokens": 6,
        "checkpoint_every": 2,
    }
    return folder, lambda output, **more: as_options(shared | {"output_dir": folder / output}, **more)


def test_a_policy_is_trained_killed_and_resumed(setting):
    folder, arguments = setting
    out = folder / "grpo"
    ranks = Ranks("launch/policy.py", arguments("grpo", max_steps=6), folder / "log")
    assert not ranks.wait(240, until=(out / "checkpoint-2" / "whole").exists)
    ranks.kill()
    assert not (out / "final").exists()
    (out / "checkpoint-9").mkdir()
    (out / "checkpoint-9" / "rng_state_0.pth").write_bytes(b"")  # as a kill leaves it
    printed = run_ranks(2, "launch/policy.py", *arguments("grpo", max_steps=6))
    assert "resuming from" in printed and "the policy, after step 6, is in" in printed
    assert not (out / "checkpoint-9").exists() and (out / "checkpoint-6" / "whole").exists()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert all(row["kind"] == "policy" and row["reward"] <= 0 and "kl" in row for row in rows)
    assert open_model(out / "final").heads == ("logprob",)


def test_rloo_is_trained_on_one_process_with_a_template_that_the_policy_lacks(setting):
    folder, arguments = setting
    bare = save_tiny_model(folder / "bare", chat_template=None)
    run_ranks(
        1, "launch/policy.py", *arguments("rloo", method="rloo", max_steps=1, policy=bare, chat_template="chatml")
    )
    assert (folder / "rloo" / "final" / "model.safetensors").exists()
    assert "im_start" in open_model(folder / "rloo" / "final").formatter().template
