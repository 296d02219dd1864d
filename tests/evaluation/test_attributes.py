"""What is said of attributes, against their definitions; and that a regression is learned."""

import json
import random

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist

from hafrm_ds import HybridRewardModel
from hafrm_ds.config import DataConfig
from hafrm_ds.data.packing import lay_out
from hafrm_ds.data.pairs import user
from hafrm_ds.evaluation.attributes import attribute_table, r_squared, rank_correlation
from hafrm_ds.evaluation.evaluate import evaluate
from hafrm_ds.evaluation.options import EvaluationOptions
from hafrm_ds.model.hybrid import HybridModel, make_attribute_head
from hafrm_ds.objective import attribute_loss
from hafrm_ds.processes.ranks import Processes
from tests.tiny_models import random_items, save_tiny_final, tiny_hybrid, use_layout


def test_r_squared_compares_with_the_mean():
    values = np.array([1.0, 2.0, 4.0, 5.0])
    assert r_squared(values, values) == 1
    assert r_squared(np.full(4, 3.0), values) == 0
    assert r_squared(6 - values, values) == pytest.approx(-3)
    assert r_squared(values, np.full(4, 3.0)) is None


def test_rank_correlation_with_ties():
    random = np.random.default_rng(0)
    for size in (2, 5, 60):
        predicted, expected = random.integers(0, 6, size).astype(float), random.normal(size=size)
        theirs = pd.DataFrame({"a": predicted, "b": expected}).corr("spearman").loc["a", "b"]
        assert rank_correlation(predicted, expected) == pytest.approx(0 if np.isnan(theirs) else theirs)
    assert rank_correlation(np.exp(expected), expected) == pytest.approx(1)
    assert rank_correlation(np.zeros(60), expected) == 0
    assert rank_correlation(expected, np.zeros(60)) is None


def test_a_table_names_each():
    measured = {"helpfulness": {"answers": 1200, "r2": 0.5, "spearman": None}}
    table = attribute_table(measured)
    assert table.header == ("attribute", "answers", "R2", "Spearman")
    assert [(name, [cell.text for cell in cells]) for name, cells in table.rows] == [
        ("helpfulness", ["1,200", "0.5", "-"])
    ]


def test_an_evaluation_says_what_it_measures_and_score_gives_the_same_values(tmp_path):
    final = save_tiny_final(tmp_path / "final", attributes=["x", "y", "z"], pad_token="</s>")
    model, source = HybridRewardModel.from_pretrained(final), random.Random(0)
    groups, expected = [], {"x": ([], []), "y": ([], [])}
    for number in range(12):
        answers = ["".join(source.choice("abcd ") for _ in range(source.randrange(3, 20))) + "." for _ in range(3)]
        rated = model.rate([user(f"q{number}")], answers)
        known = [{"x": each["x"] + source.random(), "y": each["y"]} for each in rated]
        known[0]["y"] = None
        groups.append({"prompt": f"q{number}", "responses": answers, "scores": [1, 2, 3], "attributes": known})
        for name, (predicted, values) in expected.items():
            predicted += [each[name] for each, of_data in zip(rated, known) if of_data[name] is not None]
            values += [each[name] for each in known if each[name] is not None]
    (tmp_path / "groups.jsonl").write_text("".join(json.dumps(row) + "\n" for row in groups))
    data = DataConfig(train="unused", eval={"held out": str(tmp_path / "groups.jsonl")}).eval
    options = EvaluationOptions(model=str(final), output_dir=tmp_path / "out", data=data, max_length=200)
    evaluate(options, Processes(rank=0, local_rank=0, world_size=1, store=dist.HashStore()))
    found = json.loads((tmp_path / "out/evaluation.json").read_text())["sets"]["held out"]["attributes"]
    assert found.keys() == {"x", "y"} and [each["answers"] for each in found.values()] == [36, 24]
    for name, of_both in expected.items():
        assert found[name]["r2"] == pytest.approx(r_squared(*map(np.array, of_both)), abs=1e-4)
        assert found[name]["spearman"] == pytest.approx(rank_correlation(*map(np.array, of_both)), abs=1e-4)
    assert found["y"]["r2"] == pytest.approx(1, abs=1e-4) and found["x"]["spearman"] < 1
    assert "Spearman" in (tmp_path / "out/report.html").read_text()


def test_a_regression_is_learned():
    """The length of an answer, and the number of its first token, half of which are unknown."""
    items = random_items(seed=5, num_items=24, prompt_lengths=(3,), response_lengths=(1, 3, 6, 9))
    answers = [answer for item in items for answer in item.responses]
    values = torch.tensor([[float(len(answer)), answer[0] / 10] for answer in answers])
    known = values.clone()
    known[::2, 1] = torch.nan
    plain = tiny_hybrid("llama-tied")
    model = HybridModel(plain.causal_lm, plain.reward_head, make_attribute_head(32, ["length", "first"], torch.float32))
    with torch.no_grad():
        model.attribute_head.bias.copy_(known.nanmean(0))
    use_layout(model, "shared_prefix")
    batch = lay_out(items, "shared_prefix")
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    r2 = []
    for _ in range(150):
        predicted = model(batch, with_logprob=False).attributes
        r2.append(r_squared(predicted.detach().numpy()[:, 0], values.numpy()[:, 0]))
        attribute_loss(predicted, known, batch.group, batch.num_groups).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert r2[0] == pytest.approx(0, abs=1e-4)
    assert r2[-1] > 0.9
    learned = ~known[:, 1].isnan().numpy()
    assert r_squared(predicted.detach().numpy()[learned, 1], values.numpy()[learned, 1]) > 0.9
