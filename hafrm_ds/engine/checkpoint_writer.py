"""How DeepSpeed's files reach the disk: synced, with their checksums, and without an exception on one rank alone."""

import os
from pathlib import Path
from typing import IO, cast

import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from hafrm_ds.engine.checkpoint import Checksums, FileFacts


class HashingFile:
    """A file that is hashed while it is written, so that it is never read again."""

    def __init__(self, path: Path):
        self.raw = path.open("wb")
        self.checksums = Checksums()
        self.error: OSError | None = None

    def write(self, data) -> int:
        try:
            self.raw.write(data)
        except OSError as error:
            self.error = error
            raise
        self.checksums.update(data)
        return memoryview(data).nbytes

    def flush(self) -> None:
        self.raw.flush()


class CheckpointWriter(TorchCheckpointEngine):
    """Takes the place of DeepSpeed's own writer while a checkpoint is saved.

    files: path -> facts of what this rank has written.
    error: the first thing that went wrong. It is not raised: the other ranks would wait for this one in a barrier.
    """

    def __init__(self):
        self.name = "CheckpointWriter"
        self.files: dict[Path, FileFacts] = {}
        self.error: Exception | None = None

    def create(self, info) -> None:
        pass  # announces every save on the screen

    def save(self, state_dict, path: str) -> None:
        if self.error is not None:
            return
        file = None
        try:
            file = HashingFile(Path(path))
            with file.raw:
                torch.save(state_dict, cast(IO[bytes], file))
                file.raw.flush()
                os.fsync(file.raw.fileno())
        except (OSError, RuntimeError) as error:  # torch hides the reason behind an error of its own
            self.error = (file.error if file else None) or error
        else:
            self.files[Path(path)] = file.checksums.facts()
