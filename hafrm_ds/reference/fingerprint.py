"""The fingerprint of reference weights: by content, so that a copy has it too and other weights under the same path
do not."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hafrm_ds.config import ModelConfig
from hafrm_ds.durability import write_whole
from hafrm_ds.errors import DataError, ModelError
from hafrm_ds.model.loading import local_folder
from hafrm_ds.model.reward_start import ATTRIBUTE_HEAD_FILE, REWARD_HEAD_FILE

WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")
VOLATILE_CONFIG_KEYS = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
"""Keys of config.json that change no log-prob."""
FORMAT = 1


def fingerprint_weights(config: ModelConfig) -> str:
    """SHA-256 (64 hex digits) over the weight files and what config.json says of the architecture.

    Files are hashed in parallel, and a file's hash is remembered by path, size and modification time.

    Raises:
        ModelError: there are no weight files.
    """
    folder = local_folder(config)
    files = weight_files(folder)
    if not files:
        raise ModelError(f"model.name_or_path {config.name_or_path!r}: no weight files in {folder}")
    memory = HashMemory.load()
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(memory.hash_of, files))
    memory.save()
    architecture = json.loads((folder / "config.json").read_text())
    for key in VOLATILE_CONFIG_KEYS:
        architecture.pop(key, None)
    everything = {"format": FORMAT, "weights": sorted(hashes), "config": architecture}
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """Files that from_pretrained reads: safetensors if there are any, in order of name."""
    for pattern in WEIGHT_PATTERNS:
        if files := sorted(folder.glob(pattern)):
            # A trained model's own heads lie beside the policy, and are no part of it.
            return [file for file in files if file.name not in (REWARD_HEAD_FILE, ATTRIBUTE_HEAD_FILE)]
    return []


class HashMemory:
    """SHA-256 of files, remembered between runs by (path, inode, size, times of modification and of change in ns): the
    time of modification alone may be that of other weights, in images that set it for all files."""

    def __init__(self, file: Path, known: dict[str, str]):
        self.file, self.known = file, known
        self.grew = False

    @classmethod
    def load(cls) -> "HashMemory":
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hafrm_ds"
        file = cache / "weight-hashes.json"
        try:
            return cls(file, json.loads(file.read_text()))
        except (OSError, ValueError):  # not there, or cut short: it is only a memory
            return cls(file, {})

    def hash_of(self, path: Path) -> str:
        facts = path.resolve().stat()
        times = f"{facts.st_mtime_ns}:{facts.st_ctime_ns}"
        key = f"{path.resolve()}:{facts.st_ino}:{facts.st_size}:{times}"
        if key not in self.known:
            with path.open("rb") as handle:
                self.known[key] = hashlib.file_digest(handle, "sha256").hexdigest()
            self.grew = True
        return self.known[key]

    def save(self) -> None:
        if not self.grew:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.file, json.dumps(self.known).encode())
        except (OSError, DataError):
            pass  # a read-only home costs a second hashing, nothing else
