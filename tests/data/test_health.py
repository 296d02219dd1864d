"""Faults that no single row shows, in rows written so that each fault is there a known number of times."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from hafrm_ds.config import DataConfig
from hafrm_ds.data.content_keys import KEY_DTYPE
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.health import LengthBias, are_among, cut_shares, overlap, render_health, shared_pairs
from hafrm_ds.data.preparation import PreparedGroups, prepare_groups


@pytest.fixture
def prepare(make_tokenizer, tmp_path):
    """prepare(name, [(prompt, chosen, rejected), ...]) -> pairs, of at most 100 tokens."""
    formatter = ChatFormatter.create(make_tokenizer(), None, "2024-07-26")

    def run(name: str, *rows: tuple[str, str, str]) -> PreparedGroups:
        file = tmp_path / f"{name}.jsonl"
        named = [dict(zip(("prompt", "chosen", "rejected"), row)) for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in named))
        data = DataConfig(train=str(file), cache_dir=tmp_path / "cache", max_length=100, max_dropped_share=1.0)
        return prepare_groups(data.train, formatter=formatter, options=data.preparation, role="train", seed=0)

    return run


def test_overlap_of_prompts_conversations_and_pairs(prepare):
    train = prepare("train", ("p", "a", "b"), ("q", "c", "d"), ("p", "e", "f"))
    test = prepare(
        "test",
        ("other", "a", "b"),
        ("p", "x", "y"),  # the prompt alone
        ("p", "x", "a"),  # and a conversation
        ("q", "d", "c"),  # the pair, in the other order
        ("p", "a", "f"),  # both conversations, but of two pairs
    )
    found = overlap(train, test)
    assert (found.prompts, found.answers, found.pairs) == (4, 3, 1)
    assert found.first.endswith("test.jsonl:2")
    nothing = overlap(train, prepare("none", ("other", "a", "b")))
    assert (nothing.prompts, nothing.answers, nothing.pairs, nothing.first) == (0, 0, 0, "")


def test_length_bias_by_hand(prepare):
    bias = LengthBias.of(prepare("train", ("p", "aaaa", "b"), ("p", "aa", "bbb"), ("p", "a", "b"), ("p", "aaaaa", "b")))
    assert (bias.longer, bias.shorter, bias.equal) == (2, 1, 1)
    assert bias.share == pytest.approx(0.625) and bias.standard_error == pytest.approx(0.25)
    assert bias.mean_difference == pytest.approx((3 - 1 + 0 + 4) / 4)
    assert bias.in_words == "none that is clear"
    assert LengthBias(90, 10, 0, 5.0).in_words.startswith("longer answers win")
    assert LengthBias(10, 90, 0, -5.0).in_words.startswith("shorter answers win")


def test_cut_shares_count_pairs_that_a_limit_drops_too(prepare):
    pairs = prepare("train", ("p", "a", "b"), ("p" * 120, "a", "b"), ("p", "a" * 300, "b"), ("p", "a", "b" * 300))
    assert len(pairs) == 2  # answers of 300 tokens fit no limit of 100
    shares = dict(cut_shares(pairs))
    assert list(shares) == [128, 256, 512]
    assert [shares[length] for length in (128, 256, 512)] == [0.75, 0.5, 0.0]


def test_keys_are_found_whatever_their_order():
    source = np.random.default_rng(0)
    numbers = source.permutation(50).astype("<u8")
    keys = np.array(list(zip(numbers, numbers)), dtype=KEY_DTYPE)
    assert are_among(keys, keys[20:30]).sum() == 10
    pairs = keys.reshape(-1, 2)
    expected = [False] * 5 + [True] * 10 + [False] * 10
    assert shared_pairs(pairs[5:15, ::-1], pairs).tolist() == expected


def test_prompts_are_told_apart_by_their_tokens(prepare):
    keys = prepare("train", ("p", "a", "b"), ("p", "c", "d"), ("q", "a", "b")).prompt_keys
    assert keys[0] == keys[1] != keys[2]


def test_a_prompt_that_is_cut_differently_beside_each_pair_of_answers_is_one_prompt(prepare):
    prompt = "what is it? " * 20
    pairs = prepare("train", (prompt, "a", "b"), (prompt, "a much longer answer", "b"), (f"x{prompt}", "a", "b"))
    cut = [list(pairs[k].prompt_ids) for k in range(3)]
    assert cut[0] != cut[1] and cut[0] == cut[2]
    keys = pairs.prompt_keys
    assert keys[0] == keys[1] != keys[2]


def test_what_is_shown(prepare):
    train, test = prepare("train", ("p", "a", "b"), ("p", "b", "a")), prepare("test", ("p", "a", "c"))
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(render_health({"train": train, "held [out]": test}))
    text = console.export_text()
    for piece in ("in both orders", "held [out]", "Shared with train", "test.jsonl:1", "flatter a model"):
        assert piece in text
