"""Policies under gold: win rates by hand, and a comparison from folders to files."""

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.errors import ConfigError, DataError
from hafrm_ds.evaluation.policies import PolicyMeasures
from hafrm_ds.evaluation.policy_comparison import PolicyComparisonOptions, compare_policies, compared
from hafrm_ds.generation.samplers import Answer
from hafrm_ds.options import read
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.saved.opening import load_scorer, open_model
from tests.data.row_files import write_lines
from tests.tiny_models import save_tiny_final, save_tiny_model


def measured(gold, texts=("a b", "c", "c", "d e f"), prompts="pqrs") -> PolicyMeasures:
    answers = [Answer(text, text != "c", []) for text in texts]
    return PolicyMeasures(list(prompts), answers, np.arange(4) / 2, {"gold": np.array(gold, dtype=float)})


def test_a_tie_is_half_a_win_and_seeds_are_taken_in_their_order():
    found = compared(
        {
            "first": [measured([1, 2, 3, 4]), measured([0, 0, 0, 0])],
            "other": [measured([2, 2, 2, 5]), measured([-1, -1, 1, 0])],
        }
    )
    assert (found["prompts"], found["seeds"]) == (4, 2)
    first, other = found["measures"].values()
    assert first["win_rate"] is None
    # seed 0: win, tie, loss, win; seed 1: loss, loss, win, tie
    assert other["win_rate"]["value"] == pytest.approx((2.5 + 1.5) / 8)
    assert other["gold"]["value"] == pytest.approx(10 / 8) and first["gold"]["value"] == pytest.approx(10 / 8)
    assert first["words"]["value"] == 7 / 4 and first["kl"]["value"] == 0.75 and first["distinct"] == 0.75
    assert first["truncated"] == 0.5


def test_answers_to_one_prompt_say_nothing_of_others():
    one = measured([1, 2, 3, 4], prompts="pppp")
    found = compared({"a": [one], "b": [one]})["measures"]["a"]["gold"]
    assert found == {"value": 2.5, "low": None, "high": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policies")
    save_tiny_model(folder / "start", "gpt-neox", pad_token="</s>")
    save_tiny_final(folder / "one", "gpt-neox", pad_token="</s>")
    save_tiny_final(folder / "two", "llama", pad_token="</s>")
    write_lines(folder / "prompts.jsonl", [{"prompt": f"what of {n}"} for n in range(20)])
    (folder / "gold.py").write_text("def long(prompt, answer):\n    return len(answer)\n")
    return folder


def run(folder, output, **changes) -> dict:
    given = {
        "policies": {"one": str(folder / "one"), "two": str(folder / "two")},
        "start": str(folder / "start"),
        "prompts": folder / "prompts.jsonl",
        "gold": f"{folder / 'gold.py'}:long",
        "output_dir": output,
        "max_new_tokens": 6,
    }
    options = PolicyComparisonOptions(**given | changes)
    compare_policies(options, Processes(rank=0, local_rank=0, world_size=1, store=dist.HashStore()))
    return json.loads((output / "policies.json").read_text())


def test_a_comparison_says_what_the_answers_are_worth(folder, tmp_path, capsys):
    found = run(folder, tmp_path)
    answers = [
        [json.loads(line) for line in (tmp_path / "answers" / f"policy-{k}" / "answers.jsonl").read_text().splitlines()]
        for k in (1, 2)
    ]
    lengths = np.array([[len(row["response"]) for row in each] for each in answers])
    assert len(set(map(str, lengths))) == 2
    for name, own in zip(("one", "two"), lengths):
        assert found["measures"][name]["gold"]["value"] == pytest.approx(own.mean())
    wins = (np.sign(lengths[1] - lengths[0]) + 1) / 2
    assert found["measures"]["two"]["win_rate"]["value"] == pytest.approx(wins.mean())
    start, one = (load_scorer(open_model(folder / name), torch.device("cpu"), 8192) for name in ("start", "one"))
    # Of the tokens that were drawn: the random model ends few of its answers, and none of those that it does not end
    # counts an end.
    parts = sorted((tmp_path / "answers" / "policy-1").glob("answers-*.json"))
    drawn = [ids for part in parts for _, _, ids in json.loads(part.read_text())]
    expected = []
    for row, ids in zip(answers[0], drawn, strict=True):
        assert len(ids) == 6 or row["ended"]
        group = PromptWithResponses(one.formatter.encode_prompt(row["prompt"]), (ids,))
        policy, before = (scorer.values([group], ("logprob",))[0, 0] for scorer in (one, start))
        expected.append(policy - before)
    assert found["measures"]["one"]["kl"]["value"] == pytest.approx(np.mean(expected), abs=1e-4)
    assert found["measures"]["one"]["truncated"] == np.mean([not row["ended"] for row in answers[0]]) > 0
    assert "wins against one" in capsys.readouterr().out.replace("\n", " ").replace("  ", " ")
    assert "Policies under gold" in (tmp_path / "report.html").read_text()
    assert run(folder, tmp_path) == found  # it is there already
    with pytest.raises(DataError, match="holds the results of another job"):
        run(folder, tmp_path, seed=3)
    (tmp_path / "policies.json").unlink()
    with pytest.raises(DataError, match=r"policy-1 holds parts of a job with another model, input or setting"):
        run(folder, tmp_path, policies={"two": str(folder / "two"), "one": str(folder / "one")})


def test_another_gold_under_the_same_name_is_another_job(folder, tmp_path):
    gold = tmp_path / "gold.py"
    gold.write_text("def long(prompt, answer):\n    return len(answer)\n")
    run(folder, tmp_path / "out", gold=f"{gold}:long")
    gold.write_text("def long(prompt, answer):\n    return -len(answer)\n")
    with pytest.raises(DataError, match="holds the results of another job"):
        run(folder, tmp_path / "out", gold=f"{gold}:long")


@pytest.mark.parametrize("asked", ["far too long " * 60, [{"role": "tool", "content": "a"}]])
def test_a_prompt_that_cannot_be_asked_is_named_before_a_folder_of_answers_is_claimed(folder, tmp_path, asked):
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": "a"}, {"prompt": asked}])
    with pytest.raises(DataError, match=r"prompts\.jsonl:2"):
        run(folder, tmp_path / "out", prompts=prompts)
    assert not (tmp_path / "out" / "answers").exists()


def test_gold_that_cannot_judge_an_answer_is_an_error(folder, tmp_path):
    (tmp_path / "gold.py").write_text("def none(prompt, answer):\n    return float('nan')\n")
    with pytest.raises(DataError, match="gold cannot score 20 of 20 answers"):
        run(folder, tmp_path / "out", gold=f"{tmp_path / 'gold.py'}:none")


def test_policies_have_the_same_number_of_trainings():
    words = ["--start", "s", "--prompts", "p", "--gold", "g", "--output_dir", "o", "--policies"]
    with pytest.raises(ConfigError, match="the number of trainings differs"):
        read(PolicyComparisonOptions, [*words, "{A: [a, b], B: c}"])
    with pytest.raises(ConfigError, match="policies"):
        read(PolicyComparisonOptions, [*words, "A"])
    assert read(PolicyComparisonOptions, [*words, "A", "B"]).policies == {"A": ["A"], "B": ["B"]}
