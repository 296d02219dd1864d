"""launch/refusals.py and compare.py --refusals as they are run: on several processes, killed and started again."""

import json
import random
from pathlib import Path

import pytest

from tests.data.row_files import write_lines
from tests.distributed.forked_ranks import Ranks, run_ranks
from tests.tiny_models import save_tiny_final, save_tiny_model

pytestmark = pytest.mark.distributed

NUM_PROMPTS = 400


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(folder, function from the name of an output to the arguments)"""
    folder = tmp_path_factory.mktemp("refusals")
    save_tiny_final(folder / "final", pad_token="</s>")
    save_tiny_model(folder / "base", "llama", pad_token="</s>")
    source = random.Random(0)
    rows = [
        {
            "prompt": f"{number} " + "".join(source.choice("abcd ") for _ in range(source.randrange(2, 60))),
            "label": source.choice(["harmful", "benign"]),
            "refusal": "No, I will not.",
            "compliance": "Yes, so it is.",
        }
        for number in range(NUM_PROMPTS)
    ]
    data = write_lines(folder / "prompts.jsonl", rows)
    shared = ["--models", f"{{base: {folder / 'base'}, trained: {folder / 'final'}}}", "--prompts", str(data)]
    shared += ["--answers", str(data), "--rewrite", "true", "--generated", "40", "--max_new_tokens", "6"]
    return folder, lambda output: [*shared, "--output_dir", str(folder / output)]


def results(folder: Path) -> dict:
    found = json.loads((folder / "refusals.json").read_text())
    return {name: found[name] for name in ("probes", "generated", "prompts", "rewrites")}


def test_killed_and_started_again_on_two_processes_the_bits_are_those_of_one(setting):
    folder, arguments = setting
    run_ranks(1, "launch/refusals.py", *arguments("one"))
    parts = folder / "two" / "parts"
    ranks = Ranks("launch/refusals.py", arguments("two"), folder / "log")
    assert not ranks.wait(120, until=lambda: len(list(parts.glob("model-1-logprob-*"))) >= 3)
    ranks.kill()
    printed = run_ranks(2, "launch/refusals.py", *arguments("two"))
    assert "parts of rewrites-1 are there already" in printed and "parts of model-1-logprob are there" in printed
    assert results(folder / "two") == results(folder / "one")
    assert (folder / "two" / "prompts.jsonl").read_bytes() == (folder / "one" / "prompts.jsonl").read_bytes()
