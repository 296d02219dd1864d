"""What a run refuses: one clear message from one rank, every rank stops, nothing hangs."""

import gzip
import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.distributed.forked_ranks import run_ranks
from tests.distributed.launching import as_options, launch, write_pairs
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.distributed

GOOD = {"prompt": "say a", "chosen": "aaa", "rejected": "bbb"}


def jsonl(path: Path, *rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> dict[str, tuple[dict, str]]:
    """Name -> (options that differ from a sound run, pattern of the message)."""
    folder = tmp_path_factory.mktemp("refusals")
    model = save_tiny_model(folder / "model")
    no_template = save_tiny_model(folder / "no_template", chat_template=None)
    broken_weights = save_tiny_model(folder / "broken_weights")
    weights = load_file(broken_weights / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    save_file(weights, broken_weights / "model.safetensors", metadata={"format": "pt"})
    # States near the end of fp32: their mean square is infinite, so the norm gives 0, but its gradient is not finite.
    overflowing = save_tiny_model(folder / "overflowing")
    weights = load_file(overflowing / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"].fill_(1e37)
    weights["model.norm.weight"].fill_(1e6)
    save_file(weights, overflowing / "model.safetensors", metadata={"format": "pt"})
    missing_weights = save_tiny_model(folder / "missing_weights")
    weights = load_file(missing_weights / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, missing_weights / "model.safetensors", metadata={"format": "pt"})
    pairs = write_pairs(folder / "pairs.jsonl", 40)
    used = folder / "used"
    used.mkdir()
    (used / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / "a_file").touch()
    (folder / "latin1.jsonl").write_bytes(json.dumps(GOOD, ensure_ascii=False).replace("aaa", "é").encode("latin-1"))
    (folder / "cut.json.gz").write_bytes(gzip.compress(b'[{"prompt": "x"}]')[:-9])

    def deepspeed(name: str, **content) -> Path:
        (folder / f"{name}.json").write_text(json.dumps(content))
        return folder / f"{name}.json"

    def data(name: str, *rows) -> dict:
        return {"data.train": jsonl(folder / f"{name}.jsonl", *rows)}

    table = {
        # options
        "unknown option": ({"optimizer.learning_rte": 1}, r"optimizer.learning_rte: unknown.*optimizer.learning_rate"),
        "wrong type": ({"max_steps": "many"}, r"max_steps: .*integer.*'many'"),
        "several at once": (
            {"max_steps": "many", "seeed": 1, "objective.alpha": 0, "objective.rm_weight": 0},
            r"(?s)3 problems.*max_steps.*seeed.*rm_weight and objective.alpha are both 0",
        ),
        "config file missing": ({"config": folder / "none.yaml"}, r"none.yaml.*No such file"),
        "unknown evaluation metric": ({"evaluation.best_metric": "x/accuracy/reward"}, r"'x/accuracy/reward'.*known"),
        "max_length above the budget": ({"batch.max_tokens_per_micro_batch": 50}, r"max_length 120 exceeds .* 50"),
        "batch smaller than the ranks": ({"batch.global_batch_size": 1}, r"1 pairs, fewer than the 2 processes"),
        "DeepSpeed JSON missing": ({"deepspeed": folder / "none.json"}, r"deepspeed: .*none.json cannot be read"),
        "DeepSpeed JSON contradicts": (
            {"deepspeed": deepspeed("clip", gradient_clipping=0.5)},
            r"clip.json says gradient_clipping = 0.5, but optimizer.max_gradient_norm says 1.0",
        ),
        "DeepSpeed accumulates": (
            {"deepspeed": deepspeed("gas", gradient_accumulation_steps=4)},
            r"gas.json says gradient_accumulation_steps = 4.*max_tokens_per_micro_batch",
        ),
        "output folder holds a run": ({"output_dir": used}, r"used already holds a run"),
        "output folder is a file": ({"output_dir": folder / "a_file/run"}, r"a_file/run cannot be written"),
        # data
        "data file missing": ({"data.train": folder / "none.jsonl"}, r"none.jsonl"),
        "data file empty": (data("empty"), r"empty.jsonl"),
        "not JSON": (data("broken", GOOD, '{"prompt": '), r"broken.jsonl:2"),
        "not UTF-8": ({"data.train": folder / "latin1.jsonl"}, r"latin1.jsonl.*UTF-8"),
        "cut gzip": ({"data.train": folder / "cut.json.gz"}, r"cut.json.gz"),
        "missing column": (data("columns", {"question": "x", "good": "a"}), r"(?s)columns.jsonl.*question"),
        "missing field": (data("missing", GOOD, {"prompt": "x", "chosen": "a"}), r"missing.jsonl:2.*rejected"),
        "null field": (data("null", GOOD, GOOD | {"chosen": None}), r"null.jsonl:2.*chosen"),
        "wrong type of field": (data("number", GOOD | {"chosen": 3}), r"number.jsonl:1.*chosen"),
        "filter on an unknown field": ({"data.train": f"{pairs}?part=train"}, r"pairs.jsonl.*part.*prompt"),
        "filter leaves nothing": ({"data.train": f"{pairs}?prompt=none"}, r"pairs.jsonl.*40"),
        "unknown preset": ({"data.train": "preset:hh_harmles"}, r"hh_harmles.*hh_harmless"),
        "too many dropped": (
            data("identical", *[GOOD] * 8, *[GOOD | {"rejected": "aaa"}] * 4),
            r"(?s)4 of 12.*identical answers.*max_dropped_share",
        ),
        "all over-long": (
            {"data.max_length": 8, "data.truncation": "drop"},
            r"(?s)longer than max_length.*data.max_length",
        ),
        "fewer pairs than a batch": (data("few", GOOD), r"1 usable pairs, fewer than one global batch"),
        "no margins": ({"objective.use_margin": "true"}, r"none of the 40 pairs of data.train has a margin.*`margin`"),
        "pair above the budget": (
            {"batch.max_tokens_per_micro_batch": 120, "batch.layout": "padded"},
            r"pairs.jsonl:\d+ \(\d+ tokens\).*--batch.max_tokens_per_micro_batch",
        ),
        # model
        "no model there": ({"model.name_or_path": folder / "none"}, r"none' is no local folder.*model.name_or_path"),
        "no chat template": (
            {"model.name_or_path": no_template},
            r"(?s)no chat template.*--data.chat_template.*chatml",
        ),
        "unknown template": ({"data.chat_template": "chatlm"}, r"chatlm.*chatml"),
        "weights missing": ({"model.name_or_path": missing_weights}, r"lack 1 parameters.*: model.norm.weight"),
        "weights not finite": ({"model.name_or_path": broken_weights}, r"not finite before any training"),
        "loss not finite": (  # a margin that is infinite in fp32
            data("margins", *[GOOD] * 3, GOOD | {"margin": 1e39}) | {"objective.use_margin": "true"},
            r"step 1: the loss is not finite, for the pairs \S*margins.jsonl:4\.",
        ),
        "gradient not finite": (
            {"model.name_or_path": overflowing, "objective.alpha": 0},
            r"step 1: the gradient norm is (inf|nan) although every loss is finite",
        ),
    }
    sound = {
        "model.name_or_path": model,
        "model.dtype": "float32",
        "data.train": pairs,
        "data.max_length": 120,
        "batch.global_batch_size": 4,
        "max_steps": 1,
        "reference.store": folder / "store",
        "logging.tensorboard": "false",
        "logging.report": "false",
    }
    return {
        name: ({"output_dir": folder / "runs" / name.replace(" ", "_")} | sound | changes, pattern)
        for name, (changes, pattern) in table.items()
    }


def test_every_kind_is_refused_by_one_message_from_one_rank(cases, tmp_path):
    assert len(cases) >= 20
    file = tmp_path / "cases.json"
    file.write_text(json.dumps({name: as_options(changes) for name, (changes, _) in cases.items()}))
    run_ranks(2, "tests/distributed/refusal_cases.py", file, tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    faults = []
    for name, (_, pattern) in cases.items():
        outcomes = [rank[name] for rank in ranks]
        printed = [message for message, was_printed in outcomes if was_printed]
        if any(message is None for message, _ in outcomes):
            faults.append(f"{name}: a rank did not refuse")
        elif len(printed) != 1:
            faults.append(f"{name}: {len(printed)} messages")
        elif not re.search(pattern, printed[0]):
            faults.append(f"{name}: {printed[0]}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", ["unknown option", "output folder holds a run", "not JSON", "loss not finite"])
def test_the_launcher_ends_with_one_message_and_an_error(cases, name):
    """Before the options are read, on rank 0 alone, before the process group, and in the middle of a step."""
    changes, pattern = cases[name]
    result = launch(2, "launch/train.py", *as_options(changes), timeout=180)
    assert result.returncode != 0
    assert result.stdout.count("\nerror: ") == 1, result.stdout[-4000:]
    assert re.search(pattern, result.stdout)
    assert "Traceback" not in result.stdout, result.stdout[-4000:]
