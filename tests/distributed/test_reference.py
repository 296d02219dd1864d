"""The reference pass through the launcher: what is stored, what is computed again, what a training run makes of it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from hafrm_ds.reference.store import SET_ASIDE, open_shard, write_shard
from tests.distributed.forked_ranks import run_cases, run_ranks
from tests.distributed.launching import as_options, rows, write_pairs
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.distributed


def stored(store: Path) -> dict[bytes, float]:
    """Every value of a store with one namespace, read shard by shard."""
    (namespace,) = [folder for folder in store.iterdir() if folder.is_dir()]
    values: dict[bytes, float] = {}
    for shard in (open_shard(path, namespace.name) for path in namespace.glob("*.arrow")):
        values |= dict(zip((key.tobytes() for key in shard.keys), shard.logprob.tolist(), strict=True))
    return values


def computed(output: str) -> list[int]:
    """How many responses each pass of an output says it has computed."""
    return [int(number.replace(",", "")) for number in re.findall(r"different responses: ([\d,]+) computed", output)]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    model = save_tiny_model(folder / "model")
    train_file, test_file = write_pairs(folder / "train.jsonl", 60), write_pairs(folder / "test.jsonl", 15, seed=1)
    lines = train_file.read_text().splitlines(keepends=True)
    (folder / "shuffled.jsonl").write_text("".join(lines[::-1]))
    (folder / "subset.jsonl").write_text("".join(lines[10:40]))
    grown = write_pairs(folder / "grown.jsonl", 7, seed=5)
    grown.write_text("".join(lines) + grown.read_text())

    offload = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    (folder / "offload.json").write_text(json.dumps(offload))

    def job(kind: str, name: str, store: str = "store", stage: int = 3, **changes) -> list:
        chosen = {
            "output_dir": folder / name,
            "deepspeed": f"ds_configs/zero{stage}.json",
            "max_steps": 6,
            "model.name_or_path": model,
            "model.dtype": "float32",
            "data.train": train_file,
            "data.eval": f"{{held_out: {test_file}}}",
            "data.max_length": 120,
            "batch.global_batch_size": 8,
            "batch.max_tokens_per_micro_batch": 150,
            "optimizer.learning_rate": 3e-3,
            "reference.store": folder / store,
        }
        return [as_options(chosen, **changes), None, kind]

    return folder, job


@pytest.fixture(scope="module")
def passes(setting) -> tuple[Path, list[int], str]:
    """One launch: a full pass, then passes over changed data, then trainings that use the store."""
    folder, job = setting
    output = run_cases(
        2,
        [
            job("precompute", "first"),
            job("precompute", "again"),
            job("precompute", "shuffled", data__train=folder / "shuffled.jsonl"),
            job("precompute", "subset", data__train=folder / "subset.jsonl"),
            job("precompute", "mixed", data__train=f"[{folder / 'subset.jsonl'}, {folder / 'test.jsonl'}]"),
            job("precompute", "grown", data__train=folder / "grown.jsonl"),
            job("precompute", "offload", store="offload-store", deepspeed=folder / "offload.json"),
            job("train", "from-store", reference__on_missing="stop"),
            job("train", "computing", store="empty-store"),
            job("train", "computing-again", store="empty-store", reference__on_missing="stop"),
        ],
    )
    run_cases(1, [job("precompute", "one-rank", store="one-rank-store", stage=0)])
    return folder, computed(output), output


def test_only_what_is_missing_is_computed(passes):
    _, counts, _ = passes
    assert counts[0] == 2 * (60 + 15)
    assert counts[1:5] == [0, 0, 0, 0]
    assert counts[5] == 2 * 7


@pytest.mark.parametrize("other", ["store", "offload-store"])
def test_zero3_on_two_ranks_stores_what_zero0_on_one_rank_stores(passes, other):
    folder, _, _ = passes
    two, one = stored(folder / other), stored(folder / "one-rank-store")
    assert one.keys() <= two.keys()
    assert len(one) == 150
    torch.testing.assert_close(
        torch.tensor([two[key] for key in one]), torch.tensor(list(one.values())), rtol=1e-4, atol=0
    )


def test_training_from_the_store_equals_training_that_computes(passes):
    folder, _, _ = passes
    losses = {
        name: [row["loss/total"] for row in rows(folder / name, "train")]
        for name in ("from-store", "computing", "computing-again")
    }
    assert len(losses["computing"]) == 6
    torch.testing.assert_close(*map(torch.tensor, (losses["from-store"], losses["computing"])), rtol=1e-5, atol=0)
    assert losses["computing-again"] == losses["computing"]


def test_the_first_step_checks_the_store(passes):
    folder, _, _ = passes
    (check,) = rows(folder / "from-store", "check")
    assert check["reference/pairs_checked"] == 16
    assert check["reference/mean_difference_per_token"] < 1e-5
    assert rows(folder / "computing", "check") == []


def test_missing_and_wrong_values_stop_a_run(setting, passes, tmp_path):
    """Nothing there, other tokens, other dtype, tampered values: each is refused by one message that says so."""
    folder, job = setting
    (namespace,) = [path.name for path in (folder / "store").iterdir() if path.is_dir()]
    tampered = folder / "tampered" / namespace
    tampered.mkdir(parents=True)
    for path in (folder / "store" / namespace).glob("*.arrow"):
        shard = open_shard(path, namespace)
        shifted = (shard.logprob + 3 * shard.num_tokens).astype(np.float32)
        write_shard(tampered, shard.table.set_column(1, shard.table.schema.field(1), [shifted]))
    cases = {
        "empty": (job("train", "x1", store="nothing", reference__on_missing="stop"), r"lacks .* It is empty"),
        "other template": (
            job("train", "x2", reference__on_missing="stop", data__chat_template="text"),
            r"others of these weights: .*chat template",
        ),
        "other dtype": (
            job("train", "x3", reference__on_missing="stop", model__dtype="bfloat16"),
            r"has values for .*other dtype",
        ),
        "tampered": (
            job("train", "x4", store="tampered"),
            r"does not agree with the stored reference.*tolerance 0.0001",
        ),
    }
    file = tmp_path / "cases.json"
    file.write_text(json.dumps({name: options for name, ((options, *_), _) in cases.items()}))
    run_ranks(2, "tests/distributed/refusal_cases.py", file, tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    for name, (_, pattern) in cases.items():
        printed = [message for message, was_printed in (rank[name] for rank in ranks) if was_printed]
        assert len(printed) == 1, name
        assert all(rank[name][0] is not None for rank in ranks), name
        assert re.search(pattern, printed[0]), printed[0]


def test_a_damaged_shard_is_recomputed(setting, passes):
    folder, job = setting
    (namespace,) = [path for path in (folder / "empty-store").iterdir() if path.is_dir()]
    before = stored(folder / "empty-store")
    shard = sorted(namespace.glob("*.arrow"))[0]
    lost = len(open_shard(shard, namespace.name).keys)
    shard.write_bytes(shard.read_bytes()[:-64])
    output = run_cases(2, [job("precompute", "repair", store="empty-store")])
    assert computed(output)[0] >= lost
    assert "is damaged" in output
    assert len(list((namespace / SET_ASIDE).iterdir())) == 1
    after = stored(folder / "empty-store")
    assert before.keys() <= after.keys()
    torch.testing.assert_close(
        torch.tensor([after[key] for key in before]), torch.tensor(list(before.values())), rtol=1e-5, atol=0
    )
