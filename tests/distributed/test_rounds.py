"""launch/rounds.py as it is run: killed in each stage of a round and started again, the results are those of rounds
that nothing has disturbed."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.data.row_files import write_lines
from tests.distributed.forked_ranks import Ranks, run_ranks
from tests.distributed.launching import as_options, write_pairs
from tests.tiny_models import save_tiny_final

pytestmark = pytest.mark.distributed


def ends_often(final: Path) -> None:
    """Let a random policy end most of its answers within eight tokens: truncated ones train nothing."""
    weights = load_file(final / "model.safetensors")
    end = json.loads((final / "config.json").read_text())["eos_token_id"]
    weights["lm_head.bias"][end] += 4.5
    save_file(weights, final / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(folder, function from the name of an output to the arguments)"""
    folder = tmp_path_factory.mktemp("rounds")
    ends_often(save_tiny_final(folder / "final", "phi", pad_token="</s>"))
    write_pairs(folder / "train.jsonl", 40, 0)
    write_pairs(folder / "test.jsonl", 20, 1)
    prompts = write_lines(folder / "prompts.jsonl", [{"prompt": f"what of {n}"} for n in range(36)])
    held = write_lines(folder / "held.jsonl", [{"prompt": f"and of {n}"} for n in range(40)])
    (folder / "gold.py").write_text("def short(prompt, answer):\n    return -len(answer)\n")
    shared = {
        "deepspeed": "ds_configs/zero0.json",
        "model.name_or_path": folder / "final",
        "model.dtype": "float32",
        "data.train": folder / "train.jsonl",
        "data.eval": f"{{held: {folder / 'test.jsonl'}}}",
        "data.max_length": 300,
        "batch.global_batch_size": 8,
        "batch.max_tokens_per_micro_batch": 1000,
        "optimizer.learning_rate": 1e-3,
        "checkpoint.every_steps": 1,
        "logging.tensorboard": "false",
        "logging.report": "false",
        "rounds.prompts": prompts,
        "rounds.evaluation_prompts": held,
        "rounds.gold": f"{folder / 'gold.py'}:short",
        "rounds.num_candidates": 3,
        "rounds.max_new_tokens": 8,
        "rounds.temperature": "[1.0, 1.5]",
    }
    return folder, lambda output: as_options(
        shared | {"output_dir": folder / output, "reference.store": folder / f"store-{output}"}
    )


def results(folder: Path) -> list[dict]:
    """What rounds.json says, but for times and places."""
    rounds = json.loads((folder / "rounds.json").read_text())["rounds"]
    return [{name: value for name, value in each.items() if name not in ("seconds", "model")} for each in rounds]


def test_rounds_that_are_killed_in_every_stage_end_as_undisturbed_ones(setting):
    folder, arguments = setting
    run_ranks(1, "launch/rounds.py", *arguments("whole"))
    expected = results(folder / "whole")
    assert [each["round"] for each in expected] == [0, 1, 2] and expected[0]["kl"]["value"] == 0
    assert expected[1]["pairs"] > 20 and 0 < expected[1]["truncated_candidates"] < 1
    assert all(each["reward"]["value"] != 0 and 0 < each["truncated"] < 1 for each in expected)
    assert expected[2]["kl"]["value"] != 0
    assert expected[2]["accuracy"]["held"].keys() >= {"reward", "implicit"}

    out = folder / "killed"
    stages = {
        "answering": out / "round-1" / "candidates" / "candidates.parts" / "part-000000.jsonl",
        "training": out / "round-1" / "run" / "checkpoints" / "step-000002",
        "measuring": out / "round-1" / "measured" / "answers-000000.json",
    }
    for name, file in stages.items():
        ranks = Ranks("launch/rounds.py", arguments("killed"), folder / "log", num_ranks=1)
        assert not ranks.wait(240, until=file.exists), name
        ranks.kill()
    run_ranks(1, "launch/rounds.py", *arguments("killed"))
    assert results(out) == expected
    for number in (1, 2):
        ours, theirs = (
            load_file(each / f"round-{number}/run/final/model.safetensors") for each in (out, folder / "whole")
        )
        assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    head = [load_file(folder / "whole" / f"round-{n}/run/final/reward_head.safetensors")["weight"] for n in (1, 2)]
    assert not head[0].equal(head[1])  # it trains on the human pairs that are replayed
    assert "Rounds" in (out / "report.html").read_text()
