"""What a user can write, and what is said about each mistake."""

import itertools
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from hafrm_ds.config import TrainConfig
from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.errors import ConfigError
from hafrm_ds.options import WIDTH, Section, wrapped

REQUIRED = ["--output_dir", "runs/a", "--model.name_or_path", "m", "--data.train", "a.jsonl"]


def load(*arguments: str) -> TrainConfig:
    return load_config([*REQUIRED, *arguments])


def problems(*arguments: str, required: bool = True) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config([*(REQUIRED if required else []), *arguments])
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# ---- options that are gone -------------------------------------------------------------------------------------------


def test_the_config_of_an_older_run_is_read_without_the_option_that_is_gone(tmp_path):
    file = write(tmp_path / "config.yaml", "reference: {per_token: false, flush_seconds: 5}\n")
    config = load("--config", file)
    assert config.reference.flush_seconds == 5
    assert "per_token" not in config.to_yaml()


def test_an_option_that_is_gone_is_refused_where_it_was_in_use():
    (problem,) = problems("--reference.per_token", "true")
    assert problem.startswith("reference: per_token is gone, as nothing read what it stored; leave it out")


# ---- precedence and values -----------------------------------------------------------------------------------------


def test_overrides_beat_files_and_files_beat_defaults(tmp_path):
    first = write(tmp_path / "first.yaml", "objective: {alpha: 0.5, beta: 0.3}\nseed: 1\n")
    second = write(tmp_path / "second.yaml", "objective: {beta: 0.4}\n")
    config = load("--seed", "7", "--config", first, "--config", second)
    assert (config.seed, config.objective.alpha, config.objective.beta) == (7, 0.5, 0.4)
    assert config.objective.rm_weight == 1.0


def test_the_last_override_wins():
    assert load("--objective.alpha", "0.5", "--objective.alpha=0.7").objective.alpha == 0.7


def test_off_is_a_word_though_yaml_reads_it_as_false(tmp_path):
    file = write(tmp_path / "config.yaml", "model: {fused: off}\n")
    for config in (load("--config", file), load("--model.fused", "off"), load("--model.fused", "'off'")):
        assert config.model.fused == "off"
        assert yaml.safe_load(config.to_yaml())["model"]["fused"] == "off"


def test_defaults_are_the_papers():
    objective = load().objective
    assert (objective.alpha, objective.rm_weight, objective.beta, objective.policy_loss) == (0.2, 1.0, 0.1, "dpo")


def test_values_are_in_yaml_notation():
    config = load(
        "--optimizer.learning_rate", "1e-5",  # text, to YAML
        "--optimizer.betas", "[0.9, 0.999]",
        "--max_steps", "null",
        "--evaluation.at_start=false",
        "--data.template_date", "2025-01-31",  # a date, to YAML
    )  # fmt: skip
    assert config.optimizer.learning_rate == 1e-5
    assert config.optimizer.betas == (0.9, 0.999)
    assert config.max_steps is None
    assert config.evaluation.at_start is False
    assert config.data.template_date == "2025-01-31"


def test_the_launchers_local_rank_is_swallowed():
    assert load("--local_rank=0") == load("--local_rank", "1") == load("--local-rank=1") == load()


def test_no_word_of_the_command_line_is_a_comment():
    config = load("--output_dir", "runs/a #2", "--logging.wandb_project", "#1", "--data.train", "my pairs #2.jsonl")
    assert (str(config.output_dir), config.logging.wandb_project) == ("runs/a #2", "#1")
    assert [source.path for source in config.data.train] == ["my pairs #2.jsonl"]


def test_a_key_that_stands_twice_is_refused(tmp_path):
    file = write(tmp_path / "twice.yaml", "data: {max_length: 64}\nseed: 1\ndata: {num_proc: 2}\n")
    (problem,) = problems("--config", file)
    assert problem.startswith(f"--config {file}: is not valid YAML: 'data' stands twice in one mapping")
    assert "line 3" in problem
    (problem,) = problems("--data.eval", "{mine: a.jsonl, mine: b.jsonl}")
    assert problem == "--data.eval {mine: a.jsonl, mine: b.jsonl}: 'mine' stands twice in one mapping"
    sets = "{mine: &a {path: a.jsonl, portion: ':5'}, other: {<<: *a, portion: '5:'}}"
    assert [source.portion for (source,) in load("--data.eval", sets).data.eval.values()] == [":5", "5:"]


def test_an_empty_file_changes_nothing(tmp_path):
    assert load("--config", write(tmp_path / "empty.yaml", "# nothing yet\n")) == load()


# ---- data sources --------------------------------------------------------------------------------------------------


def test_source_strings():
    config = load("--data.train", "a.jsonl?split=train", "--data.eval", "b.jsonl?split=test&lang=en")
    assert [(source.path, source.where) for source in config.data.train] == [("a.jsonl", {"split": "train"})]
    ((source,),) = config.data.eval.values()
    assert (source.path, source.where) == ("b.jsonl", {"split": "test", "lang": "en"})


def test_sources_in_yaml_may_be_mappings_lists_and_named_sets(tmp_path):
    file = write(
        tmp_path / "run.yaml",
        """
data:
  train: [a.jsonl, {path: b.jsonl, max_pairs: 5}]
  eval: {mine: c.jsonl, both: [c.jsonl, d.jsonl]}
""",
    )
    config = load_config(["--output_dir", "o", "--model.name_or_path", "m", "--config", file])
    assert [(source.path, source.max_pairs) for source in config.data.train] == [("a.jsonl", None), ("b.jsonl", 5)]
    assert {name: [source.path for source in mix] for name, mix in config.data.eval.items()} == {
        "mine": ["c.jsonl"],
        "both": ["c.jsonl", "d.jsonl"],
    }


def test_a_later_source_replaces_the_whole_earlier_one(tmp_path):
    file = write(tmp_path / "run.yaml", "data: {train: {path: b.jsonl, max_pairs: 5}, eval: {mine: c.jsonl}}\n")
    config = load_config(
        ["--output_dir", "o", "--model.name_or_path", "m", "--config", file]
        + ["--data.train", "{path: e.jsonl}", "--data.eval", "{other: d.jsonl}"]
    )
    assert [(source.path, source.max_pairs) for source in config.data.train] == [("e.jsonl", None)]
    assert list(config.data.eval) == ["other"]


# ---- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "answer"),
    [
        ("objective.aplha", "did you mean objective.alpha?"),
        ("objectve.alpha", "did you mean objective?"),
        ("alpha", "did you mean objective.alpha?"),
        ("model.max_length", "did you mean data.max_length?"),
        ("evaluation.every_step", "did you mean evaluation.every_steps?"),  # not logging.every_steps
        ("logging.every_step", "did you mean logging.every_steps?"),
        ("batch.size", "batch has global_batch_size, max_tokens_per_micro_batch, layout"),
        ("model.lora.rnk", "did you mean model.lora.rank?"),
        ("qqqq", "--help lists all options"),
    ],
)
def test_an_unknown_option_is_answered_with_the_nearest(option, answer):
    (problem,) = problems(f"--{option}", "1")
    name = option if option != "objectve.alpha" else "objectve"
    assert problem == f"{name}: unknown option; {answer}"


def test_an_unknown_field_of_a_source_is_answered_with_the_nearest():
    (problem,) = problems("--data.eval", "{mine: {path: c.jsonl, max_pair: 5}}")
    assert problem.startswith("data.eval.mine.0: a source has no field 'max_pair'; did you mean 'max_pairs'?")


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("objective.alpha", "much", "valid number"),
        ("objective.alpha", "-0.1", "greater than or equal to 0"),
        ("objective.beta", "0", "greater than 0"),
        ("objective.alpha", ".nan", "finite number"),
        ("optimizer.learning_rate", ".inf", "finite number"),
        ("optimizer.betas", "[0.9, 1.0]", "less than 1"),
        ("seed", "-1", "greater than or equal to 0"),
        ("seed", "5 # five", "valid integer"),
        ("max_steps", "0", "greater than or equal to 1"),
        ("max_steps", "1.5", "valid integer"),
        ("objective.policy_loss", "ppo", "'dpo', 'ipo', 'hinge', 'simpo' or 'sft'"),
        ("evaluation.at_start", "perhaps", "valid boolean"),
        ("model", "smollm", "valid dictionary"),
        ("seed.x", "1", "valid integer"),
        ("model.lora.rank", "-1", "greater than or equal to 0"),
        ("model.lora.targets", "q_proj", "must be a list of layer names as [q_proj, v_proj], or all-linear"),
        ("model.lora.targets", "[]", "must be a list of layer names"),
    ],
)
def test_wrong_values_name_the_option_and_what_was_given(option, value, said):
    (problem,) = problems(f"--{option}", value)
    assert problem.startswith(option.removesuffix(".x"))
    assert said in problem
    assert "(given: " in problem


def test_missing_options_are_named_together():
    assert problems(required=False) == [
        "output_dir: is required and was not given",
        "model.name_or_path: is required and was not given",
        "data.train: is required and was not given",
    ]
    assert problems("--output_dir", "o", "--data.eval", "a.jsonl", "--model.dtype", "float32", required=False) == [
        "model.name_or_path: is required and was not given",
        "data.train: is required and was not given",
    ]


def test_all_faults_are_named_at_once():
    found = problems("--seed", "x", "--objective.aplha", "1", "--objective.alpha", "0", "--objective.rm_weight", "0")
    assert len(found) == 3
    assert any(problem.startswith("seed: ") for problem in found)
    assert any(problem.startswith("objective.aplha: ") for problem in found)
    assert "objective.rm_weight and objective.alpha are both 0: there is nothing to train" in found


def test_no_contradiction_with_the_default_of_a_faulty_option_is_named():
    (problem,) = problems("--data.eval", "{mine: {pth: c.jsonl}}", "--evaluation.every_steps", "5")
    assert problem.startswith("data.eval")
    (problem,) = problems("--batch.max_tokens_per_micro_batch", "x", "--data.max_length", "16384")
    assert problem.startswith("batch.max_tokens_per_micro_batch")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objective.alpha": "0", "objective.rm_weight": "0"}, ["objective.alpha", "objective.rm_weight"]),
        ({"objective.alternate_every": "5", "objective.alpha": "0"}, ["alternate_every is 5", "alpha is 0.0"]),
        ({"data.train": "[{path: a, reward_loss: false}]"}, ["reward_loss is false for a, but", "no other source"]),
        (
            {"data.train": "[{path: a, reward_loss: false}, {path: b}]", "objective.alpha": "0"},
            ["reward_loss is false for a, but objective.alpha is 0: these pairs would train nothing"],
        ),
        (
            {"data.train": "[{path: a, reward_loss: false}, {path: b}]", "objective.rm_weight": "0"},
            ["reward_loss is false for a, but objective.rm_weight is 0: no pair trains the reward loss"],
        ),
        ({"data.eval": "{held: {path: a, reward_loss: false}}"}, ["data.eval held: reward_loss is of training"]),
        ({"objective.policy_label_smoothing": "0.1", "objective.policy_loss": "ipo"}, ["label_smoothing", "ipo"]),
        ({"objective.use_margin": "true", "objective.rm_weight": "0"}, ["use_margin", "objective.rm_weight is 0"]),
        ({"evaluation.every_steps": "5"}, ["evaluation.every_steps is 5", "data.eval"]),
        (
            {"data.eval": "{hh: b.jsonl}", "evaluation.best_metric": "hx/accuracy/reward"},
            ["'hx/accuracy/reward'", "did you mean hh/accuracy/reward?", "known: hh"],
        ),
        ({"evaluation.best_metric": "hh/accuracy/reward"}, ["'hh/accuracy/reward'", "known: none"]),
        ({"evaluation.patience": "3", "data.eval": "{hh: b.jsonl}"}, ["evaluation.patience needs", "every_steps"]),
        ({"checkpoint.final": "best"}, ["checkpoint.final best needs", "data.eval"]),
        (
            {"data.eval": "{hh: b.jsonl}", "evaluation.best_metric": "hh/acuracy/reward"},
            ["did you mean hh/accuracy/reward?", "accuracy/logprob", "loss/policy"],
        ),
        (
            {"data.eval": "{hh: b.jsonl}", "evaluation.best_metric": "hh/accuracy/implicit", "objective.alpha": "0"},
            ["'hh/accuracy/implicit'", "one of accuracy/reward, margin/reward, loss/reward)"],
        ),
        (
            {"data.eval": "{hh: b.jsonl}", "evaluation.best_metric": "hh/loss/reward", "objective.rm_weight": "0"},
            ["'hh/loss/reward'", "margin/logprob, loss/policy)"],
        ),
        (
            {"model.lora.quantize": "4bit", "deepspeed": "ds_configs/zero2.json"},
            ["model.lora.quantize is 4bit", "lora.rank is 0"],
        ),
        ({"data.max_length": "9000"}, ["data.max_length 9000", "batch.max_tokens_per_micro_batch 8192"]),
        ({"objective.alpha": "null"}, ["objective.alpha is null", "objective.policy_share"]),
        ({"objective.policy_share": "0.5", "objective.rm_weight": "0"}, ["policy_share needs both", "rm_weight is 0"]),
        ({"objective.policy_share": "0.5", "objective.alternate_every": "3"}, ["every step", "alternate_every is 3"]),
        (
            {"objective.policy_share": "0.5", "model.reward_head_init": "zero"},
            ["reward_head_init zero", "no gradient"],
        ),
        ({"objective.policy_share_every": "10"}, ["policy_share_every", "objective.policy_share is not given"]),
        ({"logging.gradient_shares_every": "10", "objective.alpha": "0"}, ["gradient_shares_every", "alpha is 0"]),
        ({"objective.policy_share": "0.5", "objective.alpha": "0.3"}, ["alpha is 0.3 and policy_share 0.5", "null"]),
        ({"objective.policy_share": "1"}, ["objective.policy_share", "less than 1"]),
        ({"model.attributes": "[a, b, a]"}, ["model.attributes ['a', 'b', 'a']", "different names"]),
        ({"model.attributes": "[reward]"}, ["none of them reward"]),
        ({"model.attributes": "[r2/x]"}, ["model.attributes", "pattern"]),
        ({"model.attributes": "[x]", "objective.rm_weight": "0"}, ["model.attributes", "objective.rm_weight is 0"]),
        ({"model.attributes": "[x]", "objective.policy_share": "0.5"}, ["two losses", "model.attributes adds a third"]),
        ({"objective.attributes_weight": "2"}, ["objective.attributes_weight is 2.0", "model.attributes names no"]),
        ({"model.attributes": "[x]", "objective.attributes_weight": "0"}, ["attributes_weight", "greater than 0"]),
    ],
)
def test_contradictions_name_both_sides(options, said):
    (problem,) = problems(*(word for name, value in options.items() for word in (f"--{name}", value)))
    assert all(part in problem for part in said)


def test_a_share_stands_in_the_place_of_alpha_in_what_is_written_down_too():
    config = load("--objective.policy_share", "0.5")
    assert (config.objective.alpha, config.objective.uses_policy, config.objective.uses_reference) == (None, True, True)
    assert TrainConfig.model_validate(config.model_dump(mode="json")) == config
    assert load("--objective.alpha", "0.3", "--objective.alpha", "null", "--objective.policy_share", "0.5") == config


def test_several_contradictions_and_those_with_the_deepspeed_json_are_named_together(tmp_path):
    file = write(tmp_path / "ds.json", '{"gradient_clipping": 0.5}')
    found = problems("--evaluation.every_steps", "5", "--data.max_length", "9000", "--deepspeed", file)
    assert len(found) == 3


def test_faults_of_the_command_line_are_named_together(tmp_path):
    missing, broken, listed = tmp_path / "none.yaml", tmp_path / "broken.yaml", tmp_path / "list.yaml"
    write(broken, "objective: {alpha: 1\nbeta: 2")
    write(listed, "- alpha\n- beta\n")
    found = problems(
        "--config", str(missing), "--config", str(broken), "--config", str(listed), "--config", str(tmp_path),
        "stray", "--objective.alpha", "--seed", "1", "--max_steps",
    )  # fmt: skip
    assert [problem for problem in found if "yaml" not in problem] == [
        "'stray' stands alone: options look like --section.key value",
        "--objective.alpha has no value",
        "--max_steps has no value",
        f"--config {tmp_path}: cannot be read: Is a directory",
    ]
    assert f"--config {missing}: cannot be read: No such file or directory" in found
    assert any(problem.startswith(f"--config {broken}: is not valid YAML: ") for problem in found)
    assert f"--config {listed}: holds a list, not a mapping of options" in found
    assert len(found) == 7


# ---- what is printed -----------------------------------------------------------------------------------------------


def test_print_config_loads_to_the_same_configuration(tmp_path, capsys):
    arguments = [
        "--data.train", "[{path: a.jsonl, portion: '10:50', weight: 1}, {preset: hh_harmless, weight: 2}]",
        "--data.eval", "{mine: 'b.jsonl?split=test', hh: preset:hh_helpful}",
        "--data.template_date", "2025-01-31",
        "--objective.alpha", "0",
        "--optimizer.epsilon", "1e-9",
        "--evaluation.every_steps", "3",
        "--logging.wandb_project", "'2025'",
    ]  # fmt: skip
    with pytest.raises(SystemExit) as left:
        load(*arguments, "--print_config")
    assert left.value.code == 0
    file = write(tmp_path / "printed.yaml", capsys.readouterr().out)
    assert load_config(["--config", file]) == load(*arguments)
    # What the user did not say about a source stays unsaid, so that a preset still fills it.
    assert yaml.safe_load(Path(file).read_text())["data"]["train"][1] == {"preset": "hh_harmless", "weight": 2.0}


def test_print_config_of_a_faulty_configuration_names_the_faults():
    assert len(problems("--print_config", "--seed", "x")) == 1


def leaves(model: type[BaseModel], prefix: str = ""):
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


@pytest.mark.parametrize("columns", [80, 200])
def test_texts_of_help_fit_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = wrapped("word " * 100, " " * 8)
    assert max(map(len, lines)) <= min(columns, WIDTH) < max(map(len, lines)) + 6


def test_resume_says_what_it_takes():
    with pytest.raises(ConfigError, match="resume: must be auto, none, or the path of a checkpoint"):
        load_config(["--output_dir", "o", "--model.name_or_path", "m", "--data.train", "t", "--resume", "true"])


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_option_with_its_text(capsys, flag):
    with pytest.raises(SystemExit) as left:
        load_config([flag])
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    options = dict(leaves(TrainConfig))
    assert {"seed", "objective.alpha", "data.train", "logging.wandb_project"} < options.keys()
    for name, field in options.items():
        (number,) = [index for index, line in enumerate(lines) if line.startswith(f"  --{name}  ")]
        assert field.description, f"{name} has no docstring"
        text = itertools.takewhile(lambda line: line.startswith(" " * 8), lines[number + 1 :])
        assert " ".join(map(str.strip, text)) == " ".join(field.description.split())
    assert max(map(len, lines)) <= 120
    for line in (
        "  --output_dir  path  (required)",
        "  --objective.alpha  float  (default: 0.2)",
        "  --optimizer.schedule  linear | cosine | constant  (default: linear)",
        "  --batch.max_tokens_per_micro_batch  int | auto  (default: 8192)",
        "  --model.gradient_checkpointing  true | false | selective | text  (default: false)",
        "  --max_steps  int  (default: none)",
        "  max_pairs  int  (default: none)",
    ):
        assert line in lines


def test_what_is_recomputed_is_a_switch_or_a_word(tmp_path):
    name = "--model.gradient_checkpointing"
    for words, value in (
        ([name], True),
        ([name, "true"], True),
        ([name, "false"], False),
        ([name, "selective"], "selective"),
        ([name, "every_3"], "every_3"),
    ):
        config = load(*words)
        assert config.model.gradient_checkpointing == value
        written = write(tmp_path / "config.yaml", config.to_yaml())
        assert load_config(["--config", written]).model.gradient_checkpointing == value
    for word in ("some", "every_1", "every_0", "every_two", "3"):
        assert problems(name, word) == [
            "model.gradient_checkpointing: must be true, false, selective, or every_N with N above 1, as every_2 "
            f"(given: {yaml.safe_load(word)!r})"
        ]


class WithOwn(TrainConfig):
    gpus: int = 8
    health: bool = False


def test_a_mistyped_option_of_the_entry_file_itself_is_answered_with_it():
    for words, answer in ((["--gpu", "4"], "gpu: unknown option; did you mean gpus?"),
                          (["--heath"], "--heath: unknown option; did you mean health?")):  # fmt: skip
        with pytest.raises(ConfigError) as error:
            load_config([*REQUIRED, *words], WithOwn)
        assert error.value.problems == [answer]


def test_a_list_that_yaml_cannot_read_is_no_text():
    with pytest.raises(ConfigError, match=r"--data.train \[a.jsonl\?x=1, b.jsonl\]: is no valid YAML; .* in quotes"):
        load_config([*REQUIRED, "--data.train", "[a.jsonl?x=1, b.jsonl]"])
    config = load_config([*REQUIRED, "--data.train", '["a.jsonl?x=1", b.jsonl]'])
    assert [source.where for source in config.data.train] == [{"x": "1"}, {}]
