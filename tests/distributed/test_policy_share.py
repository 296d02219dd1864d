"""The share of the policy loss: measured, given and kept, alike on every number of ranks and under every ZeRO stage.

HAFRM_SHARES=all tries every combination, which takes five minutes instead of three:

    HAFRM_SHARES=all python -m pytest -s tests/distributed/test_policy_share.py
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hafrm_ds.config import DataConfig, ModelConfig
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.planning import BatchPlan
from hafrm_ds.data.preparation import prepare_groups
from hafrm_ds.engine.checkpoint import read_state
from hafrm_ds.model.hybrid import make_reward_head
from hafrm_ds.model.loading import load_tokenizer
from hafrm_ds.training.final import export_checkpoint
from tests.distributed.forked_ranks import run_cases
from tests.distributed.launching import TINY_RUN, as_options, rows, write_pairs
from tests.distributed.test_resume import assert_same_run
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.distributed

ALL = os.environ.get("HAFRM_SHARES") == "all"
STEPS, STOP = 6, 4
PAIRS, BATCH, SHARE = 60, 8, 0.4
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
SPLIT_ALL = {"stage3_param_persistence_threshold": 0}
ZERO = {
    **{f"zero{stage}": {"stage": stage} for stage in range(3)},
    "zero3": {"stage": 3} | SPLIT_ALL,
    "zero1 offloaded": {"stage": 1} | OFFLOADED,
    "zero2 offloaded": {"stage": 2} | OFFLOADED,
    "zero3 offloaded": {"stage": 3, "offload_param": {"device": "cpu"}} | OFFLOADED | SPLIT_ALL,
}
FIND = {"objective.policy_share": SHARE, "max_steps": 2}
KEEP = {"objective.policy_share": SHARE, "objective.policy_share_every": 2}
CHECKPOINTED = {"model.gradient_checkpointing": True}
LORA = {"model.lora.rank": 4, "model.lora.dropout": 0.3}
MEASURE = {"logging.gradient_shares_every": 1}
# Name -> options under which a run that measures is compared with one that does not.
MEASURED = {
    **{
        f"{zero}, float32": (zero, {})
        for zero in (ZERO if ALL else ["zero0", "zero1", "zero2", "zero3", "zero3 offloaded"])
    },
    # Stage 1 in bfloat16 has an optimizer of another kind.
    **{f"{zero}, bfloat16": (zero, {"model.dtype": "bfloat16"}) for zero in ("zero1", "zero3")},
    "checkpointed": ("zero3", LORA | CHECKPOINTED),
}
if ALL:
    others = ("zero0", "zero2", "zero2 offloaded")
    MEASURED |= {f"{zero}, bfloat16": (zero, {"model.dtype": "bfloat16"}) for zero in others}
    MEASURED |= {"dropout, zero2": ("zero2", LORA | CHECKPOINTED), "dropout, zero3": ("zero3", LORA)}
KEPT = ("zero0", "zero1", "zero2", "zero3") if ALL else ("zero1", "zero3")
# Name -> options of a run that finds its alpha on two ranks.
FOUND = {
    **{f"zero{stage}": (f"zero{stage}", {}) for stage in range(4)},
    "checkpointed": ("zero3", CHECKPOINTED),
    "in one micro-batch": ("zero2", {"batch.max_tokens_per_micro_batch": 100000}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("share")
    save_tiny_model(folder / "tied")
    save_tiny_model(folder / "untied", "llama")
    write_pairs(folder / "train.jsonl", PAIRS)
    for name, zero in ZERO.items():
        (folder / f"{name}.json").write_text(json.dumps({"zero_optimization": zero}))

    def options(name: str, zero: str, changes: dict) -> list[str]:
        chosen = TINY_RUN | {
            "output_dir": folder / name,
            "deepspeed": folder / f"{zero}.json",
            "max_steps": STEPS,
            "model.name_or_path": folder / "tied",
            "data.train": folder / "train.jsonl",
            "batch.global_batch_size": BATCH,
            "optimizer.learning_rate": 3e-3,
            "optimizer.reward_head_learning_rate": 1e-2,
            "reference.store": folder / "store",
        }
        return as_options(chosen | changes)

    def case(name: str, zero: str, changes: dict, fault: list | None = None) -> list:
        return [options(name, zero, changes), fault]

    run_cases(1, [case(f"found alone, {zero}", zero, FIND) for zero in ("zero0", "zero1", "zero2", "zero3")])
    cases = [case(f"found, {name}", zero, FIND | changes) for name, (zero, changes) in FOUND.items()]
    for name, (zero, changes) in MEASURED.items():
        cases += [case(f"plain, {name}", zero, {"max_steps": 3} | changes)]
        cases += [case(f"measured, {name}", zero, {"max_steps": 3} | changes | MEASURE)]
    cases += [case("measured, untied", "zero3", MEASURE | {"model.name_or_path": folder / "untied", "max_steps": 1})]
    for zero in KEPT:
        cases += [case(f"straight, {zero}", zero, KEEP | LORA | {"checkpoint.every_steps": STEPS})]
        cases += [case(f"resumed, {zero}", zero, KEEP | LORA, [STOP, 1, "SIGTERM"])]
        cases += [case(f"resumed, {zero}", zero, KEEP | LORA)]
    run_cases(2, cases)
    return folder


def found_alpha(run: Path) -> float:
    first = rows(run, "gradients")[0]
    assert first["step"] == 0
    return first["alpha"]


# ---- against plain autograd in fp64 --------------------------------------------------------------------------------


def naive_gradients(folder: Path, model: str, step: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the mean reward loss and the mean policy loss over a global batch with respect to the body, in fp64,
    from the start weights: each conversation by itself through the stock model."""
    config = ModelConfig(name_or_path=str(folder / model))
    data = DataConfig.model_validate({"train": str(folder / "train.jsonl"), "max_length": 120})
    formatter = ChatFormatter.create(load_tokenizer(config), data.chat_template, data.template_date)
    pairs = prepare_groups(data.train, formatter=formatter, options=data.preparation, role="train", seed=0)
    causal_lm = AutoModelForCausalLM.from_pretrained(folder / model, dtype=torch.float64)
    head = make_reward_head(32, bias=False, init="normal", dtype=torch.float32, seed=0).weight.double()
    body = list(causal_lm.model.parameters())

    def scores(prompt: list[int], response: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor([[*prompt, *response]])
        output = causal_lm(ids, output_hidden_states=True)
        logprobs = output.logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        return (output.hidden_states[-1][0, -1] @ head.T).squeeze(), logprobs[len(prompt) - 1 :].sum()

    losses = torch.zeros(2, dtype=torch.float64)
    for index in BatchPlan(len(pairs), BATCH, 0).global_batch(step):
        group = pairs[int(index)].ids
        (chosen, good), (rejected, bad) = (scores(group.prompt, response) for response in group.responses)
        implicit = 0.1 * ((good - good.detach()) - (bad - bad.detach()))  # the policy is still its reference
        losses = losses - F.logsigmoid(torch.stack([chosen - rejected, implicit])) / BATCH
    reward, policy = (torch.autograd.grad(loss, body, retain_graph=True) for loss in losses)
    return torch.cat([g.flatten() for g in reward]), torch.cat([g.flatten() for g in policy])


@pytest.mark.parametrize(
    ("run", "model"),
    [*((name, "tied") for name in MEASURED if name.endswith("float32")), ("untied", "untied")],
)
def test_the_pulls_of_a_step_are_those_of_plain_autograd_in_fp64(runs, run, model):
    reward, policy = naive_gradients(runs, model)
    policy = 0.2 * policy
    row = rows(runs / f"measured, {run}", "gradients")[0]
    expected = {
        "alpha": 0.2,
        "policy_share": (policy.norm() / (reward.norm() + policy.norm())).item(),
        "body_grad_norm/reward": reward.norm().item(),
        "body_grad_norm/policy": policy.norm().item(),
    }
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert row["body_grad_cosine"] == pytest.approx(F.cosine_similarity(reward, policy, dim=0).item(), abs=1e-4)


def test_the_alpha_found_is_that_of_plain_autograd_in_fp64(runs):
    """From the steps that a run has, two of them, by the geometric mean over their global batches."""
    ratios = []
    for step in range(2):
        reward, policy = naive_gradients(runs, "tied", step)
        ratios.append((reward.norm() / policy.norm()).item())
    expected = SHARE / (1 - SHARE) * np.sqrt(np.prod(ratios))
    assert found_alpha(runs / "found, zero0") == pytest.approx(expected, rel=1e-4)


# ---- everywhere alike ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [*(f"found alone, zero{stage}" for stage in range(4)), *(f"found, {n}" for n in FOUND)])
def test_every_stage_and_number_of_ranks_finds_the_same_alpha(runs, run):
    expected, actual = found_alpha(runs / "found alone, zero0"), found_alpha(runs / run)
    print(f"{run}: alpha {actual!r}, relative difference {abs(actual / expected - 1):.1e}")
    assert actual == pytest.approx(expected, rel=1e-4)
    assert rows(runs / run, "gradients")[0]["policy_share"] == pytest.approx(SHARE, abs=0.05)


@pytest.mark.parametrize("name", MEASURED)
def test_measuring_changes_no_bit_of_what_is_trained(runs, name):
    plain, measured = runs / f"plain, {name}", runs / f"measured, {name}"
    assert_same_run(measured, plain)
    assert not rows(plain, "gradients")
    assert [row["step"] for row in rows(measured, "gradients")] == [1, 2, 3]


@pytest.mark.parametrize("name", [name for name in MEASURED if name.endswith("bfloat16")])
def test_in_bfloat16_the_pulls_are_about_those_of_fp32(runs, name):
    exact = rows(runs / f"measured, {name.replace('bfloat16', 'float32')}", "gradients")[0]
    rounded = rows(runs / f"measured, {name}", "gradients")[0]
    for norm in ("body_grad_norm/reward", "body_grad_norm/policy"):
        assert rounded[norm] == pytest.approx(exact[norm], rel=0.05)


# ---- kept and resumed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", KEPT)
def test_a_resumed_run_with_a_kept_share_is_the_straight_run_bit_for_bit(runs, tmp_path, zero):
    straight, resumed = runs / f"straight, {zero}", runs / f"resumed, {zero}"
    measured = rows(straight, "gradients")
    assert [row["step"] for row in measured] == [0, 2, 4, 6]
    assert len({row["alpha"] for row in measured}) == 3, "found, then moved after steps 2 and 4"
    assert rows(resumed, "gradients") == rows(straight, "gradients")
    assert_same_run(resumed, straight)
    assert torch.equal(*(load_file(run / "final/reward_head.safetensors")["weight"] for run in (straight, resumed)))
    export_checkpoint(straight / "checkpoints/latest", tmp_path / "export")
    folders = (straight / "final", resumed / "final", tmp_path / "export")
    alphas = [json.loads((each / "hafrm.json").read_text())["training"]["alpha"] for each in folders]
    alphas.append(read_state(straight / "checkpoints/latest").alpha)
    assert len(set(alphas)) == 1 and alphas[0] != measured[-1]["alpha"], "moved once more after the last step"
