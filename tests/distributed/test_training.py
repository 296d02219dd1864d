"""Training through the launcher: the same numbers whatever the stage, the number of ranks or the cut of a batch."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launching import rows, train_all, write_pairs
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.distributed

STEPS = 20


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final/model.safetensors") | load_file(run / "final/reward_head.safetensors")


def largest_difference(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference of a weight, relative to the largest weight of its tensor."""
    assert actual.keys() == expected.keys()
    return max(((actual[n] - expected[n]).abs().max() / expected[n].abs().max()).item() for n in expected)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    model = save_tiny_model(folder / "model")
    train_file, test_file = write_pairs(folder / "train.jsonl", 60), write_pairs(folder / "test.jsonl", 15, seed=1)

    def options(name: str, stage: int, **changes) -> list[str]:
        chosen = {
            "output_dir": folder / name,
            "deepspeed": f"ds_configs/zero{stage}.json",
            "max_steps": STEPS,
            "model.name_or_path": model,
            "model.dtype": "float32",
            "data.train": train_file,
            "data.eval": f"{{held_out: {test_file}}}",
            "batch.global_batch_size": 8,
            "batch.max_tokens_per_micro_batch": 150,
            "data.max_length": 120,
            "optimizer.learning_rate": 3e-3,
            "optimizer.reward_head_learning_rate": 1e-2,
            "optimizer.weight_decay": 0.01,
        } | {key.replace("__", "."): value for key, value in changes.items()}
        return [word for key, value in chosen.items() for word in (f"--{key}", str(value))]

    return folder, options


@pytest.fixture(scope="module")
def runs(setting):
    """One rank and two ranks, every stage; on two ranks also the variants of the other tests."""
    folder, options = setting
    train_all(1, [options(f"ranks1-zero{stage}", stage) for stage in range(4)])
    train_all(
        2,
        [options(f"ranks2-zero{stage}", stage) for stage in range(4)]
        + [
            options("one-cut", 3, batch__max_tokens_per_micro_batch=100000),
            options("padded", 3, batch__layout="padded", batch__max_tokens_per_micro_batch=300),
            options("checkpointed", 3, model__gradient_checkpointing=True),
            options("baseline", 3, objective__alpha=0),
            options("policy-only", 3, objective__rm_weight=0),
            options("bfloat16", 3, model__dtype="bfloat16"),
        ],
    )
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_and_number_of_ranks_trains_the_same_model(runs, ranks, stage):
    expected, actual = runs / "ranks1-zero0", runs / f"ranks{ranks}-zero{stage}"
    losses = [[row["loss/total"] for row in rows(run, "train")] for run in (expected, actual)]
    assert len(losses[0]) == STEPS
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=0)
    norms = [[row["grad_norm"] for row in rows(run, "train")] for run in (expected, actual)]
    torch.testing.assert_close(*map(torch.tensor, norms), rtol=1e-4, atol=0)
    assert largest_difference(final_weights(actual), final_weights(expected)) < 1e-4


@pytest.mark.parametrize("variant", ["one-cut", "padded", "checkpointed"])
def test_cut_layout_and_checkpointing_change_only_the_cost(runs, variant):
    assert rows(runs / "ranks2-zero3", "train")[0]["micro_batches"] > 1
    assert rows(runs / "one-cut", "train")[0]["micro_batches"] == 1
    assert largest_difference(final_weights(runs / variant), final_weights(runs / "ranks2-zero3")) < 1e-4


def test_training_learns_and_starts_at_the_reference(runs):
    train, held_out = rows(runs / "ranks2-zero3", "train"), rows(runs / "ranks2-zero3", "eval")
    assert abs(train[0]["loss/policy"] - 0.6931) < 1e-3
    assert train[-1]["loss/total"] < 0.5 * train[0]["loss/total"]
    assert [row["step"] for row in held_out] == [0, STEPS]
    assert held_out[0]["loss/policy"] == pytest.approx(0.6931, abs=1e-3)
    assert held_out[-1]["accuracy/reward"] > 0.9


def test_baseline_has_no_policy_and_the_policy_run_leaves_the_reward_head(runs):
    baseline = rows(runs / "baseline", "train")[-1]
    assert not {"loss/policy", "accuracy/logprob", "accuracy/implicit"} & baseline.keys()
    policy = rows(runs / "policy-only", "train")[-1]
    assert not {"loss/reward", "accuracy/reward"} & policy.keys()
    heads = [load_file(runs / name / "final/reward_head.safetensors")["weight"] for name in ("policy-only", "baseline")]
    from hafrm_ds.model.hybrid import make_reward_head

    start = make_reward_head(32, bias=False, init="normal", dtype=torch.float32, seed=0).weight
    assert torch.equal(heads[0], start)
    assert not torch.equal(heads[1], start)


def test_bfloat16_follows_fp32(runs):
    bf16 = [row["loss/total"] for row in rows(runs / "bfloat16", "train")]
    fp32 = [row["loss/total"] for row in rows(runs / "ranks2-zero3", "train")]
    torch.testing.assert_close(torch.tensor(bf16), torch.tensor(fp32), rtol=0.1, atol=0.02)
    assert final_weights(runs / "bfloat16")["weight"].dtype == torch.bfloat16
