"""What is said of attributes, against their definitions; and that a regression is learned."""

import numpy as np
import pandas as pd
import pytest
import torch

from hafrm_ds.data.packing import lay_out
from hafrm_ds.evaluation.attributes import attribute_table, r_squared, rank_correlation
from hafrm_ds.model.hybrid import HybridModel, make_attribute_head
from hafrm_ds.objective import attribute_loss
from tests.tiny_models import random_items, tiny_hybrid, use_layout


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
