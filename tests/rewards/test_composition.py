"""What a composition file may say, what is refused by name, and what its identity depends on."""

import json
import os
import random

import pytest
import torch.distributed as dist

from hafrm_ds.data.pairs import assistant, user
from hafrm_ds.errors import ConfigError, ModelError
from hafrm_ds.evaluation.best_of_n.options import RankingOptions
from hafrm_ds.evaluation.best_of_n.ranking import rank
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.rewards.composition import open_reward, read_composition
from hafrm_ds.rewards.loading import load_reward
from hafrm_ds.rewards.reward import fingerprint_of
from hafrm_ds.saved.opening import load_judge
from hafrm_ds.scoring.files import ScoringOptions, score_file
from tests.tiny_models import save_tiny_final, save_tiny_model

ASPECTS = """
def brevity(prompt, answer):
    return -len(answer) / 10

def sentences(conversation):
    return [len(each) / 10 for each in conversation[-1]["content"].split(".") if each.strip()]
"""
COMPOSITION = """
hierarchy: hierarchical
threshold: 0.0
holistic: {model: one, mean: -0.5, deviation: 2.0, weight: 3}
aspects:
  brevity: aspects.py:brevity
  other: {ensemble: [one, {model: two, mean: 0.1, deviation: 1.5}], by: mean_minus_deviations, k: 0.5, weight: 0.5}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders one/, two/ (final/ of trainings; two/ names policy/ as its start) and policy/."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_final(folder / "one")
    save_tiny_model(folder / "policy")
    save_tiny_final(folder / "two", base=folder / "policy")
    return folder


@pytest.fixture
def folder(models, tmp_path):
    for name in ("one", "two", "policy"):
        (tmp_path / name).symlink_to(models / name)
    (tmp_path / "aspects.py").write_text(ASPECTS)
    (tmp_path / "all.yaml").write_text(COMPOSITION)
    return tmp_path


def conversations(number: int) -> list[list[dict]]:
    source = random.Random(number)

    def text() -> str:
        return "".join(source.choice("abc. ") for _ in range(source.randrange(1, 30))) + "x"

    return [[user(text()), assistant(text())] for _ in range(number)]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "exactly one of the keys model, function, file, ensemble, hierarchy"),
        ("model: one\nfunction: aspects.py:brevity", "exactly one of the keys"),
        ("model: one\njugde: implicit", "jugde: unknown key; did you mean judge?"),
        ("model: one\njudge: best", "judge: input should be 'reward', 'implicit', 'combined' or 'logprob'"),
        ("ensemble: [one, {model: two, wieght: 2}]", "ensemble.1.wieght: unknown key; did you mean weight?"),
        ("ensemble: [one]", "ensemble: list should have at least 2 items"),
        ("ensemble: [one, {model: two, weight: 2}]", "ensemble.1.weight: a weight counts in a hierarchy alone"),
        ("ensemble: [one, two]\nby: mean_minus_deviations", "by mean_minus_deviations needs k"),
        ("ensemble: [one, two]\nk: 1", "k has no meaning by mean"),
        ("model: one\nweight: 2", "weight: a weight counts in a hierarchy alone"),
        ("model: one\nmean: 2", "give mean and deviation, or neither"),
        ("model: one\nmean: 2\ndeviation: 0", "deviation: input should be greater than 0"),
        ("function: aspects.py", "function: string should match pattern"),
        (COMPOSITION.replace("mean: -0.5, deviation: 2.0, ", ""), "needs mean and deviation of the holistic reward"),
        (COMPOSITION.replace("threshold: 0.0", ""), "the mode hierarchical needs a threshold"),
        (
            COMPOSITION.replace("hierarchy: hierarchical", "hierarchy: best"),
            "hierarchy: input should be 'hierarchical'",
        ),
        (COMPOSITION.split("aspects:")[0], "aspects: is required and was not given"),
        ("{", "is not valid YAML"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(content, problem, tmp_path):
    (tmp_path / "wrong.yaml").write_text(content)
    with pytest.raises(ConfigError) as error:
        read_composition(tmp_path / "wrong.yaml")
    assert f"{tmp_path}/wrong.yaml: " in str(error.value)
    assert problem in str(error.value)


def test_a_composition_that_names_itself_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("ensemble: [b.yaml, one]")
    (tmp_path / "b.yaml").write_text("{file: a.yaml, mean: 0, deviation: 1}")
    with pytest.raises(ConfigError, match=r"a.yaml names itself: a.yaml -> b.yaml -> a.yaml"):
        open_reward(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("file: none.yaml", "none.yaml: cannot be read: No such file"),
        ("function: aspects.py:none", "aspects.py defines no none"),
        ("function: none.py:brevity", "none.py cannot be read"),
        ("{model: policy, judge: reward}", "no reward head"),
    ],
)
def test_parts_that_cannot_be_used_are_named_before_anything_is_loaded(content, problem, folder):
    (folder / "wrong.yaml").write_text(content)
    with pytest.raises((ConfigError, ModelError), match=problem):
        open_reward(folder / "wrong.yaml")


def test_a_judge_belongs_to_a_model(folder):
    with pytest.raises(ConfigError, match="--judge and --reference are of models alone"):
        open_reward(folder / "all.yaml", judge="implicit")
    with pytest.raises(ConfigError, match=r"a function is written FILE.py:NAME"):
        open_reward(f"{folder}/aspects.py:")


def test_judges_of_a_model_in_a_composition_score_as_the_model_does(folder):
    asked = conversations(5)
    for judge in ("reward", "implicit"):
        (folder / "model.yaml").write_text(f"model: two\njudge: {judge}")
        found = [score.value for score in load_reward(folder / "model.yaml", device="cpu").scores(asked)]
        assert found == pytest.approx(load_judge(folder / "two", judge, device="cpu").score(asked), abs=1e-5)
    (folder / "model.yaml").write_text("model: two\njudge: logprob")
    found = [score.value for score in load_reward(folder / "model.yaml", device="cpu").scores(asked)]
    assert found == pytest.approx(load_judge(folder / "two", device="cpu").log_probs(asked), abs=1e-5)
    assert (
        load_reward(folder / "model.yaml", device="cpu").scores([[user("a")]])[0].error.startswith("a log-prob needs")
    )


def test_a_part_that_stands_in_it_twice_is_loaded_once(folder):
    reward = load_reward(folder / "all.yaml", device="cpu").reward
    other = reward.aspects["other"].reward
    assert reward.holistic.reward is other.members["ensemble.0"]


def test_the_identity_changes_when_a_part_changes_and_only_then(folder):
    def fingerprint() -> str:
        return fingerprint_of(open_reward(folder / "all.yaml"))

    first = fingerprint()
    (folder / "all.yaml").write_text(f"# a remark\n{COMPOSITION}")
    assert fingerprint() == first
    for change in (("0.5, weight: 0.5", "0.5, weight: 0.6"), ("threshold: 0.0", "threshold: 0.1"), ("-0.5", "-0.6")):
        (folder / "all.yaml").write_text(COMPOSITION.replace(*change))
        assert fingerprint() != first
    (folder / "all.yaml").write_text(COMPOSITION)
    (folder / "aspects.py").write_text(ASPECTS.replace("/ 10", "/ 11"))
    assert fingerprint() != first
    (folder / "aspects.py").write_text(ASPECTS)
    assert fingerprint() == first
    weights = folder / "two" / "reward_head.safetensors"
    facts = weights.stat()
    os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    assert fingerprint() != first
    os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_one_composition_gives_the_same_values_by_every_door(folder):
    asked = conversations(6)
    expected = [score.value for score in load_reward(folder / "all.yaml", device="cpu").scores(asked)]
    assert len({value > 0 for value in expected}) == 2
    rows = [{"messages": each} for each in asked]
    write(folder / "in.jsonl", rows)
    options = ScoringOptions(model=folder / "all.yaml", input=folder / "in.jsonl", output=folder / "out.jsonl")
    assert score_file(options, alone()) == 0
    assert [row["score"] for row in lines(folder / "out.jsonl")] == pytest.approx(expected, abs=1e-5)

    answers = [each[-1]["content"] for each in asked]
    write(folder / "candidates.jsonl", [{"prompt": asked[0][0]["content"], "responses": answers}])
    ranking = RankingOptions(
        model=[str(folder / "all.yaml"), f"{folder}/aspects.py:sentences"],
        output_dir=folder / "best",
        candidates=folder / "candidates.jsonl",
    )
    assert rank(ranking, alone()) == 0
    [found] = [row["scores"] for row in lines(folder / "best" / "scores-1.jsonl")]
    direct = load_reward(folder / "all.yaml", device="cpu")
    same = [score.value for score in direct.scores([[asked[0][0], assistant(answer)] for answer in answers])]
    assert found == pytest.approx(same, abs=1e-5)


def test_messages_from_python_are_read_as_those_of_a_file_are(folder):
    [asked] = conversations(1)
    named = [{"from": {"user": "human", "assistant": "gpt"}[each["role"]], "value": each["content"]} for each in asked]
    for name in (folder / "all.yaml", f"{folder}/aspects.py:sentences"):
        first, second, third = load_reward(name, device="cpu").scores([asked, named, [{"role": "user"}]])
        assert second.value == pytest.approx(first.value, abs=1e-5)
        assert third.error.startswith("the conversation: message 1 of field 'messages' is an object with the keys role")


def test_a_row_that_a_function_fails_on_is_named_and_the_rest_is_scored(folder):
    write(folder / "in.jsonl", [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": "."}])
    options = ScoringOptions(
        model=f"{folder}/aspects.py:sentences", input=folder / "in.jsonl", output=folder / "out.jsonl"
    )
    assert score_file(options, alone()) == 1
    good, bad = lines(folder / "out.jsonl")
    assert good["score"] == pytest.approx(0.1)
    assert bad["score"] is None and bad["score_error"] == "in.jsonl:2: aspects.py:sentences: gave no value"


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def alone() -> Processes:
    return Processes(rank=0, local_rank=0, world_size=1, store=dist.HashStore())
