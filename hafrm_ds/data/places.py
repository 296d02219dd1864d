"""What the path of a source can name: data on this machine, a data set on the Hugging Face hub, or a file of one."""

import re
from pathlib import Path

DATA_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
HUB_FILE = re.compile(r"hf://datasets/([^/]+/[^/]+)/(.+)")
HUB_FIELDS = ("config", "data_dir", "revision", "split")
"""Fields of a `Source` that say which part of a hub data set is meant."""


def is_hub_id(path: str) -> bool:
    return HUB_ID.fullmatch(path) is not None and not path.endswith(DATA_SUFFIXES) and not Path(path).exists()


def has_splits(path: Path) -> bool:
    """Whether save_to_disk wrote this folder from a DatasetDict."""
    return (path / "dataset_dict.json").is_file()
