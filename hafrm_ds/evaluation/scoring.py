"""What a saved model says of many pairs and questions, on any number of processes, kept in parts on disk.

AskedItems -> parts of SMALLEST_PART of them -> FOLDER/MODEL-NAME-NNNNNN.npy -> scores of each item
"""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

import numpy as np

from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.parts import work_through
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.saved.opening import Saved
from hafrm_ds.saved.sharded import load_for_job

SMALLEST_PART = 64


class AskedItems(Protocol):
    """Items that are reported together, each as the groups that it is scored in: the pairs of a set are one group each;
    the answers of a benchmark's question one, or several where the tokenizer ends their common prompt at different
    tokens."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> list[PromptWithResponses]: ...


def score_parts(
    name: str,
    saved: Saved,
    heads: tuple[str, ...],
    asked: Mapping[str, AskedItems],
    folder: Path,
    processes: Processes,
    log: Console,
    *,
    deepspeed: Path | None,
    max_tokens: int,
) -> dict[str, list[np.ndarray]]:
    """What the model says of every response. All processes call this together; what `folder` has is not done again.

    Args:
        name: of the model in this job.
        heads: of "reward" and "logprob".
        asked: name, unique in the job -> items.
        deepspeed: a DeepSpeed JSON to shard the model by, or None.

    Returns:
        Name of `asked` -> for each item [responses, heads] fp32. On the first process; {} on the others.
    """
    parts = {
        folder / f"{name}-{quote(each, safe='')}-{number:06}.npy": (
            each,
            range(len(items))[first : first + SMALLEST_PART],
        )
        for each, items in asked.items()
        for number, first in enumerate(range(0, len(items), SMALLEST_PART))
    }

    def load() -> Callable[[Path], bytes]:
        scorer = load_for_job(saved, deepspeed, max_tokens, processes.for_job(name))

        def make(file: Path) -> bytes:
            each, part = parts[file]
            content = io.BytesIO()
            np.save(content, scorer.values([group for place in part for group in asked[each][place]], heads))
            return content.getvalue()

        return make

    work_through(
        name,
        {file: len(part) for file, (_, part) in parts.items()},
        load,
        processes,
        log,
        unit="items",
        together=deepspeed is not None,
        what=f"parts of {name}",
    )
    if not processes.is_first:
        return {}
    results: dict[str, list[np.ndarray]] = {each: [] for each in asked}
    for file, (each, part) in parts.items():
        sizes = [sum(len(group.responses) for group in asked[each][place]) for place in part]
        results[each] += np.split(np.load(file), np.cumsum(sizes)[:-1])
    return results
