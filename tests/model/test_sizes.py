"""What a model has room for, from its config alone, against prepared pairs."""

import json
import re

import pytest
from transformers import GPT2Config, LlamaConfig

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.preparation import PreparationOptions, prepare_groups
from hafrm_ds.data.sources import Source
from hafrm_ds.errors import DataError, ModelError
from hafrm_ds.model.sizes import ModelSizes, known_positions
from tests.tiny_tokenizers import byte_level_tokenizer

FITS = {"vocab_size": 10_000, "max_position_embeddings": 10_000}


@pytest.fixture(scope="module")
def formatter():
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return ChatFormatter.create(tokenizer, "chatml", "2024-07-26")


@pytest.fixture(scope="module")
def pairs(formatter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": "Why?", "chosen": "Because " * n, "rejected": "No."} for n in (1, 9, 3)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = PreparationOptions(max_length=500, truncation="drop", cache_dir=folder / "cache")
    return prepare_groups(
        [Source(path=str(folder / "pairs.jsonl"))], formatter=formatter, options=options, role="eval", seed=0
    )


def check(pairs, formatter, **changes) -> None:
    ModelSizes.of("tiny", LlamaConfig(**FITS | changes)).check({"train": pairs}, formatter.tokenizer)


def test_the_largest_token_id_is_compared_with_the_embedding(pairs, formatter):
    largest = int(max(max(pairs[n].prompt_ids.max(), *(ids.max() for ids in pairs[n].responses)) for n in range(3)))
    check(pairs, formatter, vocab_size=largest + 1)
    token = formatter.tokenizer.convert_ids_to_tokens(largest)
    said = f"train: token id {largest:,} ({token!r}) is beyond the embedding of tiny, which has {largest:,} rows (the "
    with pytest.raises(ModelError, match=re.escape(said)):
        check(pairs, formatter, vocab_size=largest)


def test_the_longest_pair_is_compared_with_the_positions(pairs, formatter):
    longest = max(len(pairs[n].prompt_ids) + max(map(len, pairs[n].responses)) for n in range(3))
    check(pairs, formatter, max_position_embeddings=longest)
    with pytest.raises(
        DataError,
        match=f"^train: the longest pair has {longest} tokens, but the model tiny knows {longest - 1} positions",
    ):
        check(pairs, formatter, max_position_embeddings=longest - 1)


def test_positions_of_learned_and_of_stretched_ones():
    assert known_positions(GPT2Config(n_positions=64)) == 64
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
    assert known_positions(LlamaConfig(max_position_embeddings=32768, rope_parameters=yarn)) == 131072
