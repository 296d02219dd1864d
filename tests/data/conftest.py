import pytest

from hafrm_ds.config import DataConfig
from hafrm_ds.data.preparation import progress_bars_on_a_terminal
from hafrm_ds.data.reading import read_groups
from tests.tiny_tokenizers import byte_level_tokenizer


@pytest.fixture
def make_tokenizer():
    return byte_level_tokenizer


@pytest.fixture
def read(tmp_path, monkeypatch):
    """read(source, ...) in a folder of its own, with a cache of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*given, role="train", seed=0):
        return read_groups(DataConfig(train=list(given)).train, role=role, seed=seed, cache_dir=tmp_path / "cache")

    with progress_bars_on_a_terminal():
        yield run
