"""What a comparison trains: methods, cells and names from the values of swept options."""

import pytest

from hafrm_ds.config import ObjectiveConfig, TrainConfig
from hafrm_ds.errors import ConfigError
from hafrm_ds.training.sweep import Arm, arms_of, axes_of
from tests.training.test_compare import config_of


def arms(config: TrainConfig, alphas=(), betas=(), sweep=None) -> dict[str, Arm]:
    return {arm.name: arm for arm in arms_of(config, axes_of(config, alphas, betas, sweep or {}))}


def test_arms_are_named_by_what_differs(tmp_path):
    found = arms(config_of(tmp_path), [0.05, 1], [0.1])
    assert list(found) == ["baseline", "dpo", "haf-alpha0.05", "haf-alpha1"]
    weights = {name: (arm.config.objective.rm_weight, arm.config.objective.alpha) for name, arm in found.items()}
    assert weights == {"baseline": (1, 0), "dpo": (0, 1), "haf-alpha0.05": (1, 0.05), "haf-alpha1": (1, 1)}
    assert [arm.judge for arm in found.values()] == ["reward", "implicit", "reward", "reward"]
    assert isinstance(found["haf-alpha1"].config.objective.alpha, float)
    both = arms(config_of(tmp_path), [0.2, 1], [0.1, 0.5])
    assert list(both)[:4] == ["baseline", "dpo-beta0.1", "dpo-beta0.5", "haf-alpha0.2-beta0.1"] and len(both) == 7
    assert {name for arm in both.values() for name in arm.cells} == {"baseline"}


def test_a_share_is_that_of_the_joint_loss_alone_and_alphas_take_its_place(tmp_path):
    share = ObjectiveConfig(policy_share=0.5, policy_share_every=10)
    config = config_of(tmp_path).model_copy(update={"objective": share})

    def weights(alphas: list[float]) -> dict[str, tuple]:
        found = {name: arm.config.objective for name, arm in arms(config, alphas).items()}
        return {
            name: (each.rm_weight, each.alpha, each.policy_share, each.policy_share_every)
            for name, each in found.items()
        }

    alone = {"baseline": (1, 0, None, None), "dpo": (0, 1, None, None)}
    assert weights([]) == alone | {"haf": (1, None, 0.5, 10)}
    assert weights([3.0]) == alone | {"haf": (1, 3.0, None, None)}


@pytest.mark.parametrize(
    ("alphas", "betas", "message"),
    [
        ([0.2, 0.2], [], "--alphas has 2 values that are written 0.2 in the names"),
        ([], [1, 1.0000001, 2], "--betas has 2 values that are written 1 in the names"),
        ([float("nan")], [], "--alphas has a value of nan; each must be a number above 0"),
        ([0.1], [float("inf"), 0.1], "--betas has a value of inf; each must be a number above 0"),
        ([0], [-1], "2 problems"),
    ],
)
def test_values_that_make_no_arms_are_refused_by_name(tmp_path, alphas, betas, message):
    with pytest.raises(ConfigError, match=message):
        arms(config_of(tmp_path), alphas, betas)


def test_an_option_that_an_arm_cannot_have_is_named_before_any_training(tmp_path):
    config = config_of(tmp_path, objective={"use_margin": True, "alternate_every": 5})
    with pytest.raises(ConfigError, match=r"baseline: objective\.alternate_every is 5") as caught:
        arms(config)
    assert any(problem.startswith("dpo: objective.use_margin") for problem in caught.value.problems)


SIZES = {"data.train.portion": [":80", ":320"]}


def test_a_cell_is_what_baseline_feels_and_has_one_baseline(tmp_path):
    head_rates = {"optimizer.reward_head_learning_rate": ["5e-5", None]}
    found = arms(config_of(tmp_path), sweep={"objective.policy_share": [0, 0.5, 1]} | SIZES | head_rates)
    assert len(found) == 2 * (2 + 1 + 2)  # DPO does not feel the head's rate, nor Baseline the share
    assert list(found)[:3] == [
        "baseline-pairs80-head-lr5e-05",
        "dpo-pairs80",
        "haf-share0.5-pairs80-head-lr5e-05",
    ]
    for name, arm in found.items():
        assert arm.kind == name.split("-")[0] and len(arm.cells) == (2 if arm.kind == "dpo" else 1)
        for baseline, labels in arm.cells.items():
            assert found[baseline].kind == "baseline" and baseline in found[baseline].cells
            assert f":{labels['pairs']}" == arm.config.data.train[0].portion and f"pairs{labels['pairs']}" in baseline
    of_joint = found["haf-share0.5-pairs320-head-lrnone"]
    assert of_joint.config.optimizer.reward_head_learning_rate is None
    assert found["haf-share0.5-pairs80-head-lr5e-05"].config.optimizer.reward_head_learning_rate == 5e-5
    assert (of_joint.config.objective.alpha, of_joint.config.objective.policy_share) == (None, 0.5)
    assert of_joint.cells == {"baseline-pairs320-head-lrnone": {"share": "0.5", "pairs": "320", "head-lr": "none"}}
    assert found["dpo-pairs80"].cells["baseline-pairs80-head-lrnone"] == {"pairs": "80", "head-lr": "none"}


def test_a_swept_share_says_which_methods_there_are(tmp_path):
    def kinds(*shares: float) -> list[str]:
        return list(arms(config_of(tmp_path), sweep={"objective.policy_share": list(shares)}))

    assert kinds(0.5, 0.9) == ["baseline", "haf-share0.5", "haf-share0.9"]
    assert kinds(1, 0) == ["baseline", "dpo"]
    assert kinds(1, 0.25) == ["baseline", "dpo", "haf-share0.25"]


def test_a_swept_alpha_of_0_is_baseline_and_not_trained_twice(tmp_path):
    assert list(arms(config_of(tmp_path), sweep={"objective.alpha": [0, 0.2]})) == ["baseline", "dpo", "haf-alpha0.2"]


def test_a_swept_option_is_always_in_the_name_so_that_values_can_be_added(tmp_path):
    one, two = (arms(config_of(tmp_path), sweep={"epochs": epochs}) for epochs in ([1], [1, 2]))
    assert list(one) == ["baseline-epochs1", "dpo-epochs1", "haf-epochs1"] and one.keys() < two.keys()
    assert one["haf-epochs1"].config == two["haf-epochs1"].config


def test_a_name_that_no_folder_can_have_is_refused_before_any_training(tmp_path):
    sources = [f"/{'disk' * 20}/{name}.jsonl" for name in "abc"]
    with pytest.raises(ConfigError, match="too long for a name; give shorter ones in --sweep") as caught:
        arms(config_of(tmp_path), sweep={"data.train": [sources, sources[:1]]})
    assert len(caught.value.problems) == 1


def test_names_tell_paths_and_options_apart(tmp_path):
    def names(sweep: dict) -> list[str]:
        return [name for name in arms(config_of(tmp_path), sweep=sweep) if name.startswith("baseline")]

    assert names({"model.name_or_path": ["world/pretrained", "world/model/"]}) == [
        "baseline-modelpretrained",
        "baseline-modelmodel",
    ]
    paths = ["c/start", "/a/model", "b/model"]  # those alone are told apart that are the same
    assert names({"model.name_or_path": paths}) == [
        "baseline-modelstart",
        "baseline-modela-model",
        "baseline-modelb-model",
    ]
    mixes = ["a.jsonl", [{"path": "a.jsonl", "portion": ":5%"}, "b.jsonl"]]
    assert names({"data.train": mixes}) == ["baseline-traina.jsonl", "baseline-traina.jsonl-5%+b.jsonl"]
    ranks = {"model.lora.rank": [8], "model.lora.alpha": [4], "objective.alpha": [1]}
    assert list(arms(config_of(tmp_path), sweep=ranks))[-1] == "haf-rank8-model.lora.alpha4-objective.alpha1"
    clipping = {"optimizer.max_gradient_norm": [0, 1], "model.gradient_checkpointing": [True]}
    assert names(clipping) == [f"baseline-clip{norm}-gradient-checkpointingtrue" for norm in (0, 1)]


def test_places_on_an_axis(tmp_path):
    sweep = {"optimizer.learning_rate": ["5e-5", 1], **SIZES, "model.reward_head_init": ["normal", "from_model"]}
    rates, sizes, starts = axes_of(config_of(tmp_path), [], [], sweep)
    assert (rates.numbers, sizes.numbers, starts.numbers) == ([5e-5, 1], [80, 320], None)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"seed": [1, 2]}, "--sweep cannot have seed: --seeds says how many"),
        ({"data.eval": ["a.jsonl"]}, "--sweep cannot have data.eval: all methods are tested on the same pairs"),
        ({"optimizer.learning_rat": [1]}, "unknown option optimizer.learning_rat; did you mean optimizer"),
        ({"objective": [{"alpha": 1}]}, "objective, which is a section: .* as objective.alpha"),
        ({"data.train.portoin": [":1"]}, "unknown option data.train.portoin"),
        ({"evaluation.max_pairs": [10, 20]}, "--sweep cannot have evaluation.max_pairs: all methods are tested on"),
        ({"epochs": [1, 2], "max_steps": [10]}, "--sweep cannot have epochs beside max_steps"),
        ({"epochs": []}, "--sweep has no value of epochs"),
        ({"epochs": [1, "many"]}, r"--sweep: epochs: .*\(given: 'many'\)"),
        ({"epochs": [2, 2.0]}, "--sweep has 2 values of epochs that are written 2 in the names"),
        ({"data.train.portion": ["80"]}, "'80' is no portion"),
        ({"objective.policy_share": [0.5, 1.5]}, "policy_share of 1.5; each must be a number from 0 to 1"),
        ({"objective.policy_share": [0.5], "objective.alpha": [1]}, "cannot both be swept"),
        ({"objective.alpha": [1]}, "--sweep and --alphas both give values of objective.alpha"),
    ],
)
def test_what_cannot_be_swept_is_refused_by_name(tmp_path, sweep, message):
    alphas = [0.3] if list(sweep) == ["objective.alpha"] else []
    with pytest.raises(ConfigError, match=message):
        arms(config_of(tmp_path), alphas, sweep=sweep)


def test_a_measured_pull_is_that_of_the_joint_loss_alone(tmp_path):
    found = arms(config_of(tmp_path, logging={"gradient_shares_every": 5}))
    every = {name: arm.config.logging.gradient_shares_every for name, arm in found.items()}
    assert every == {"baseline": 0, "dpo": 0, "haf": 5}
