"""Training through the launcher: the same numbers whatever the stage, the number of ranks or the cut of a batch."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import yaml
from safetensors.torch import load_file

from hafrm_ds import HybridRewardModel
from tests.distributed.forked_ranks import run_cases
from tests.distributed.launching import REPOSITORY, as_options, rows, write_pairs
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.distributed

STEPS = 20
FIELDS = ("key", "logprob")
ZERO_3_FILES = ("zero3_offload_optimizer", "zero3_offload", "zero3_hpz")


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    """Those of the policy and of all heads."""
    final = load_file(run / "final/model.safetensors") | load_file(run / "final/reward_head.safetensors")
    if (attributes := run / "final/attribute_head.safetensors").is_file():
        final |= {f"attribute_head.{name}": values for name, values in load_file(attributes).items()}
    return final


def largest_difference(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference of a weight, relative to the largest weight of its tensor."""
    assert actual.keys() == expected.keys()
    return max(((actual[n] - expected[n]).abs().max() / expected[n].abs().max()).item() for n in expected)


def stored_values(store: Path) -> dict[bytes, float]:
    """Content key -> log-prob, of a reference store with one namespace."""
    tables = [pa.ipc.open_file(file).read_all() for file in store.glob("*/*.arrow")]
    return {key: value for table in tables for key, value in zip(*(table[name].to_pylist() for name in FIELDS))}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    model = save_tiny_model(folder / "model")
    save_tiny_model(folder / "untied", "phi")  # an LM head of its own, with a bias
    save_tiny_model(folder / "state-space", "mamba")
    # Parameters of fewer than 100,000 elements are never split unless told so, and these models have no others.
    gather_all = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (folder / "gather_all.json").write_text(json.dumps(gather_all))
    for name in ZERO_3_FILES:
        content = json.loads((REPOSITORY / f"ds_configs/{name}.json").read_text())
        content["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
        (folder / f"{name}.json").write_text(json.dumps(content))
    train_file, test_file = write_pairs(folder / "train.jsonl", 60), write_pairs(folder / "test.jsonl", 15, seed=1)

    def job(name: str, stage: int, **changes) -> list:
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
            "reference.store": folder / f"store-{name}",
            "optimizer.learning_rate": 3e-3,
            "optimizer.reward_head_learning_rate": 1e-2,
            "optimizer.weight_decay": 0.01,
            "logging.report": "false",
        }
        return [as_options(chosen, **changes), None]

    return folder, job


@pytest.fixture(scope="module")
def runs(setting):
    """One rank and two ranks, every stage; on two ranks also the variants of the other tests."""
    folder, job = setting
    gather_all = {"deepspeed": folder / "gather_all.json"}
    untied = {"model__name_or_path": folder / "untied"}
    alternating = {"objective__alternate_every": 2, "max_steps": 8}
    three_pairs = {"batch__global_batch_size": 3, "batch__max_tokens_per_micro_batch": 120}
    run_cases(
        1,
        [job(f"ranks1-zero{stage}", stage) for stage in range(4)]
        + [job("untied-whole", 0, **untied), job("three-on-one", 0, **three_pairs)],
    )
    run_cases(
        2,
        [job(f"ranks2-zero{stage}", stage) for stage in range(4)]
        + [
            job("one-cut", 3, batch__max_tokens_per_micro_batch=100000),
            job("padded", 3, batch__layout="padded", batch__max_tokens_per_micro_batch=300),
            job("checkpointed", 3, model__gradient_checkpointing=True),
            *(job(f"selective-zero{stage}", stage, model__gradient_checkpointing="selective") for stage in range(4)),
            job("selective-gathered", 3, **gather_all, model__gradient_checkpointing="selective"),
            job("every-second-gathered", 3, **gather_all, model__gradient_checkpointing="every_2"),
            job("baseline", 3, objective__alpha=0),
            job("policy-only", 3, objective__rm_weight=0),
            *(
                job(f"alternating-zero{stage}", stage, **untied, **gather, **alternating)
                for stage, gather in ((0, {}), (2, {}), (3, gather_all))
            ),
            job("gathered", 3, **gather_all),
            job("untied-gathered", 3, **gather_all, **untied),
            job("untied-baseline", 3, **gather_all, **untied, objective__alpha=0),
            job("three-on-two", 3, **gather_all, **three_pairs),
            job("no-evaluation", 3, evaluation__at_start=False),
            *(job(f"auto-budget-zero{stage}", stage, batch__max_tokens_per_micro_batch="auto") for stage in (2, 3)),
            job("state-space", 0, model__name_or_path=folder / "state-space", data__max_length=60, max_steps=2),
            *(job(f"bfloat16-zero{stage}", stage, model__dtype="bfloat16") for stage in range(4)),
            *(job(name, 3, deepspeed=folder / f"{name}.json") for name in ZERO_3_FILES),
            [*job("offloaded-reference", 3, deepspeed=folder / "zero3_offload.json"), "precompute"],
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


@pytest.mark.parametrize("stage", [2, 3])
def test_alternating_leaves_out_the_head_of_the_other_block_under_every_stage(runs, stage):
    """ZeRO-3 keeps the last gradient of what has none in a step: were it stepped by, the norms would differ."""
    expected, actual = rows(runs / "alternating-zero0", "train"), rows(runs / f"alternating-zero{stage}", "train")
    for step, row in enumerate(actual):
        is_policy_block = step // 2 % 2 == 0
        own, other = ("policy", "reward") if is_policy_block else ("reward", "policy")
        assert f"loss/{own}" in row and f"loss/{other}" not in row
        assert ("accuracy/reward" in row) == ("accuracy/implicit" not in row) == (not is_policy_block)
        for name in ("loss/total", "grad_norm"):
            assert row[name] == pytest.approx(expected[step][name], rel=1e-4)
    assert len(actual) == 8
    last = rows(runs / f"alternating-zero{stage}", "eval")[-1]
    assert {"loss/reward", "loss/policy"} <= last.keys()
    weights = [final_weights(runs / f"alternating-zero{each}") for each in (stage, 0)]
    # The true gradient of a key's bias is 0: Adam makes steps of its noise.
    kept = [{name: each[name] for name in each if not name.endswith("k_proj.bias")} for each in weights]
    assert largest_difference(*kept) < 1e-4


@pytest.mark.parametrize("variant", ["one-cut", "padded", "checkpointed", "gathered"])
def test_cut_layout_checkpointing_and_gathering_change_only_the_cost(runs, variant):
    assert rows(runs / "ranks2-zero3", "train")[0]["micro_batches"] > 1
    assert rows(runs / "one-cut", "train")[0]["micro_batches"] == 1
    assert largest_difference(final_weights(runs / variant), final_weights(runs / "ranks2-zero3")) < 1e-4
    norms = [[row["grad_norm"] for row in rows(runs / name, "train")] for name in (variant, "ranks2-zero3")]
    torch.testing.assert_close(*map(torch.tensor, norms), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("name", "without"),
    [
        *((f"selective-zero{stage}", f"ranks2-zero{stage}") for stage in range(4)),
        ("selective-gathered", "gathered"),  # each weight is fetched again where its product is not computed again
        ("every-second-gathered", "gathered"),
    ],
)
def test_recomputation_changes_no_bit(runs, name, without):
    for measured in ("loss/total", "grad_norm"):
        assert [row[measured] for row in rows(runs / name, "train")] == [
            row[measured] for row in rows(runs / without, "train")
        ]
    expected, actual = final_weights(runs / without), final_weights(runs / name)
    assert all(torch.equal(actual[tensor], expected[tensor]) for tensor in expected)


@pytest.mark.parametrize("name", ZERO_3_FILES)
def test_offload_and_a_secondary_copy_of_the_weights_change_no_loss(runs, name):
    """Training, and the evaluations before and after it; the reference pass went through the same engine."""
    expected, actual = runs / "gathered", runs / name
    for kind, column in (("train", "loss/total"), ("train", "grad_norm"), ("eval", "loss/reward")):
        columns = [torch.tensor([row[column] for row in rows(run, kind)]) for run in (actual, expected)]
        torch.testing.assert_close(*columns, rtol=1e-4, atol=0)
    assert largest_difference(final_weights(actual), final_weights(expected)) < 1e-4


def test_the_reference_pass_alone_runs_on_offloaded_parameters(runs):
    """Without an optimizer, so without its offload; the values are those of the training engine."""
    stores = [stored_values(runs / f"store-{name}") for name in ("offloaded-reference", "gathered")]
    assert stores[0].keys() == stores[1].keys()
    assert len(stores[0]) > 100
    torch.testing.assert_close(
        *(torch.tensor([store[key] for key in sorted(stores[0])]) for store in stores), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("stage", [2, 3])
def test_a_token_budget_found_at_the_start_changes_no_bit(runs, stage):
    """These pairs fit in one micro-batch a rank, and the passes that measured memory leave no trace in the weights."""
    run = runs / f"auto-budget-zero{stage}"
    assert {row["micro_batches"] for row in rows(run, "train")} == {1}
    found = yaml.safe_load((run / "config.yaml").read_text())["batch"]
    assert found["layout"] == "shared_prefix"
    assert isinstance(found["max_tokens_per_micro_batch"], int)
    expected, actual = final_weights(runs / "one-cut"), final_weights(run)
    if stage == 3:
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
    else:
        assert largest_difference(actual, expected) < 1e-4


def test_a_model_that_cannot_keep_packed_answers_apart_trains_padded(runs):
    run = runs / "state-space"
    assert yaml.safe_load((run / "config.yaml").read_text())["batch"]["layout"] == "padded"
    assert all(0 < row["padding_share"] < 1 for row in rows(run, "train"))
    assert all(row["padding_share"] == 0 for row in rows(runs / "ranks2-zero3", "train"))


def test_an_untied_head_with_a_bias_trains_alike_whole_and_gathered(runs):
    whole, gathered, baseline = (
        final_weights(runs / name) for name in ("untied-whole", "untied-gathered", "untied-baseline")
    )
    # The true gradient of a key's bias is 0: Adam makes steps of its noise.
    names = [name for name in whole if not name.endswith("k_proj.bias")]
    assert largest_difference({name: gathered[name] for name in names}, {name: whole[name] for name in names}) < 1e-4
    start = load_file(runs / "untied/model.safetensors")
    for name in ("lm_head.weight", "lm_head.bias"):
        assert not torch.equal(whole[name], start[name])
        assert torch.equal(baseline[name], start[name]), "without a policy loss it is frozen"


def test_a_rank_without_a_pair_runs_a_dummy_that_counts_nothing(runs):
    """Three pairs a step, each a micro-batch of its own: on two ranks every step has a fourth."""
    alone, both = rows(runs / "three-on-one", "train"), rows(runs / "three-on-two", "train")
    assert {row["micro_batches"] for row in both} >= {2}
    for name in ("loss/total", "grad_norm", "accuracy/reward", "margin/implicit"):
        columns = [torch.tensor([row[name] for row in run]) for run in (both, alone)]
        torch.testing.assert_close(*columns, rtol=1e-4, atol=1e-5)
    assert largest_difference(final_weights(runs / "three-on-two"), final_weights(runs / "three-on-one")) < 1e-4


def test_scoring_before_the_first_step_leaves_training_as_it_was(runs):
    assert [row["step"] for row in rows(runs / "no-evaluation", "eval")] == [STEPS]
    expected, actual = final_weights(runs / "ranks2-zero3"), final_weights(runs / "no-evaluation")
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("run", ["ranks2-zero3", "gathered", *(f"bfloat16-zero{stage}" for stage in range(4))])
def test_at_step_0_the_policy_is_its_reference(runs, run):
    """The same code, layout and dtype: the same log-probs, so every pair of the held-out set is a tie. In a training
    step pairs are cut otherwise, which moves the last bits."""
    start = rows(runs / run, "eval")[0]
    assert start["step"] == 0
    assert (start["margin/implicit"], start["ties/implicit"], start["accuracy/implicit"]) == (0, start["pairs"], 0.5)
    tolerance = 0.02 if run.startswith("bfloat16") else 1e-5
    assert abs(rows(runs / run, "train")[0]["margin/implicit"]) < tolerance


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


@pytest.mark.parametrize("run", ["ranks2-zero3", "gathered", "padded"])
def test_the_saved_model_gives_the_figures_of_the_last_evaluation(runs, run):
    """By way of the text of the pairs, and of nothing but the folder."""
    model = HybridRewardModel.from_pretrained(runs / run / "final")
    pairs = [json.loads(line) for line in (runs / "test.jsonl").read_text().splitlines()]
    rewards = torch.tensor(
        [model.score([{"role": "user", "content": p["prompt"]}], [p["chosen"], p["rejected"]]) for p in pairs]
    )
    last = rows(runs / run, "eval")[-1]
    assert (rewards[:, 0] > rewards[:, 1]).float().mean() == pytest.approx(last["accuracy/reward"])
    assert rewards.mean() == pytest.approx(last["reward/mean"], abs=1e-5)
    assert rewards.std() == pytest.approx(last["reward/std"], abs=1e-5)
    metadata = json.loads((runs / run / "final/hafrm.json").read_text())
    assert metadata["evaluation"] == {"held_out": {k: v for k, v in last.items() if k not in ("step", "kind", "set")}}
    assert metadata["data"]["train"]["kept"] == 60


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_follows_fp32(runs, stage):
    bf16 = [row["loss/total"] for row in rows(runs / f"bfloat16-zero{stage}", "train")]
    fp32 = [row["loss/total"] for row in rows(runs / "ranks2-zero3", "train")]
    torch.testing.assert_close(torch.tensor(bf16), torch.tensor(fp32), rtol=0.1, atol=0.02)
    assert {value.dtype for value in final_weights(runs / f"bfloat16-zero{stage}").values()} == {torch.bfloat16}
