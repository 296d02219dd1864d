"""launch/evaluate.py as it is run: on several processes, killed and started again, and sharded over them."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from hafrm_ds.evaluation.pair_scores import PairScores, load_all
from tests.distributed.forked_ranks import Ranks, run_ranks
from tests.distributed.launching import launch
from tests.tiny_models import save_tiny_final, save_tiny_model

pytestmark = pytest.mark.distributed

NUM_PAIRS = 1500


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(folder, function from the name of an output to the arguments)"""
    folder = tmp_path_factory.mktemp("evaluate")
    save_tiny_final(folder / "final", pad_token="</s>")
    save_tiny_model(folder / "base", "llama", pad_token="</s>")
    source = random.Random(0)
    for name in ("near", "far"):
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(NUM_PAIRS // 2):
                texts = ["".join(source.choice("abcd ") for _ in range(source.randrange(2, 60))) for _ in range(3)]
                row = dict(zip(("prompt", "chosen", "rejected"), (f"{text}x" for text in texts)))
                file.write(json.dumps(row) + "\n")
    shared = ["--model", str(folder / "final"), "--max_length", "500", "--reference", str(folder / "base")]
    shared += ["--data", str(folder / "near.jsonl"), f"{{elsewhere: {folder / 'far.jsonl'}}}"]
    return folder, lambda output: [*shared, "--output_dir", str(folder / output)]


@pytest.fixture(scope="module")
def undisturbed(setting) -> Path:
    folder, arguments = setting
    run_ranks(1, "launch/evaluate.py", *arguments("one"))
    return folder / "one"


def results(folder: Path) -> tuple[dict, dict[str, PairScores]]:
    return json.loads((folder / "evaluation.json").read_text())["sets"], load_all(folder / "evaluation")


def test_killed_and_started_again_on_two_processes_the_numbers_are_those_of_one(setting, undisturbed):
    folder, arguments = setting
    parts = folder / "two" / "parts"
    ranks = Ranks("launch/evaluate.py", arguments("two"), folder / "log")
    assert not ranks.wait(120, until=lambda: len(list(parts.glob("scoring-*"))) >= 3)
    ranks.kill()
    printed = run_ranks(2, "launch/evaluate.py", *arguments("two"))
    assert "parts of scoring are there already" in printed and "implicit reward" in printed
    (sets, scores), (expected_sets, expected) = results(folder / "two"), results(undisturbed)
    assert sets == expected_sets and sets.keys() == {"near", "elsewhere"}
    for name in sets:
        for values in ("reward", "logprob", "reference"):
            np.testing.assert_array_equal(getattr(scores[name], values), getattr(expected[name], values))


def test_a_model_that_is_sharded_over_the_processes_gives_the_same_scores(setting, undisturbed):
    folder, arguments = setting
    gather_all = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (folder / "gather_all.json").write_text(json.dumps(gather_all))
    options = [*arguments("sharded"), "--deepspeed", str(folder / "gather_all.json"), "--max_pairs", "200"]
    result = launch(2, "launch/evaluate.py", *options, timeout=300)
    assert result.returncode == 0, result.stdout[-6000:]
    (_, scores), (_, expected) = results(folder / "sharded"), results(undisturbed)
    for name, part in scores.items():
        assert len(part) == 200
        index = [expected[name].ids.index(id) for id in part.ids]
        np.testing.assert_allclose(part.reward, expected[name].reward[index], atol=1e-4)
        np.testing.assert_allclose(part.logprob, expected[name].logprob[index], atol=1e-3)
        np.testing.assert_allclose(part.reference, expected[name].reference[index], atol=1e-3)
