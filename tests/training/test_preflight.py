"""What the self-test of a layout finds, on a model whose window a layout does not see."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hafrm_ds.data.pairs import OF_A_PAIR
from hafrm_ds.data.tokenization import TokenizedGroup
from hafrm_ds.errors import ModelError
from hafrm_ds.model import attention
from hafrm_ds.model.hybrid import HybridModel
from hafrm_ds.training import preflight
from hafrm_ds.training.preflight import check_layout, longest_items
from tests.tiny_models import random_items, tiny_hybrid, use_layout
from tests.training.test_token_budget import Pairs, pairs_of

WINDOW = 16


def random_pairs(*lengths: int) -> Pairs:
    """Pairs whose prompt and responses have so many tokens each."""
    return Pairs(
        TokenizedGroup(item.prompt, item.responses, OF_A_PAIR, source="", id="")
        for length in lengths
        for item in random_items(length, 1, prompt_lengths=(length,), response_lengths=(length,))
    )


def config_with(layout: str, budget: int | str = "auto"):
    return SimpleNamespace(
        batch=SimpleNamespace(layout=layout, max_tokens_per_micro_batch=budget),
        model=SimpleNamespace(attention="auto"),
        objective=SimpleNamespace(uses_policy=True),
    )


class Engine(SimpleNamespace):
    """Runs a model as it is."""

    def __call__(self, batch, **heads):
        return self.model(batch, **heads)


class Log(list):
    def print(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        self.append(text)


@pytest.fixture(autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def model() -> HybridModel:
    model = tiny_hybrid("qwen2-moe", sliding_window=WINDOW)
    use_layout(model, "shared_prefix")
    return model


def check(model: HybridModel, pairs: Pairs, config) -> list[str]:
    log = Log()
    check_layout(Engine(model=model, device=torch.device("cpu")), pairs, config, log)
    return log


def test_auto_goes_over_to_padded_where_the_layer_refuses(model):
    (warning,) = check(model, random_pairs(2, 3), config_with("auto"))
    assert "Qwen2MoeAttention is sliding_attention by its attention mask alone" in warning
    assert (model.layout, model.causal_lm.config._attn_implementation) == ("padded", "sdpa")


def test_a_layout_that_was_asked_for_is_refused(model):
    with pytest.raises(ModelError, match="Qwen2MoeAttention is sliding_attention"):
        check(model, random_pairs(2, 3), config_with("shared_prefix"))


@pytest.fixture
def ignored_window(monkeypatch):
    """As if the configuration had not told."""
    monkeypatch.setattr(attention, "masked_type", lambda module, length: None)


def test_a_window_that_nobody_told_of_is_found_by_the_longest_pair(model, ignored_window):
    (warning,) = check(model, random_pairs(2, 3, 30, 10), config_with("auto"))
    assert "the scores of Qwen2MoeForCausalLM change by" in warning
    assert model.layout == "padded"


def test_the_longest_pair_that_the_budget_holds_is_taken(model, ignored_window):
    """Of 30 + 30 tokens in two rows, which are above the budget, nothing is computed; 5 + 5 are within the window."""
    assert check(model, random_pairs(2, 3, 30, 5), config_with("auto", budget=119)) == []
    assert model.layout == "shared_prefix"


def test_long_pairs_are_not_taken_under_eager_attention(model, ignored_window, monkeypatch):
    monkeypatch.setattr(preflight, "CHECKED_EAGER_TOKENS", 119)
    monkeypatch.setattr(type(model.causal_lm), "_supports_sdpa", False)
    assert check(model, random_pairs(2, 3, 30, 5), config_with("auto")) == []


def test_the_longest_pair_is_measured_in_padded_rows():
    pairs = pairs_of([10, 40, 20])  # tokens with a shared prompt, of which each response has one
    costs = np.array([18, 78, 38])
    for most_tokens in (78, 77, 38, 18):
        (item,) = longest_items(pairs, most_tokens)
        assert len(item.prompt) == (costs[costs <= most_tokens].max() - 2) // 2
    assert longest_items(pairs, 17) == []
