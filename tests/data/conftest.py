import pytest

from tests.tiny_tokenizers import byte_level_tokenizer


@pytest.fixture
def make_tokenizer():
    return byte_level_tokenizer
