"""What a saved model says of many pairs and questions, on any number of processes, kept in parts on disk.

AskedItems -> parts of SMALLEST_PART items -> FOLDER/NAME-ITEMS-NNNNNN.npy -> scores of each item
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.parts import work_through
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.saved.opening import Saved
from hafrm_ds.saved.sharded import load_for_job

SMALLEST_PART = 64


@dataclass(frozen=True)
class AskedItems:
    """Items that are reported together: the pairs of a set, or the questions of a benchmark.

    name: unique in the job. size: items. groups: position of an item -> what is scored of it: a pair is one group; the
    answers of a question are one, or several where the tokenizer ends their common prompt at different tokens.
    """

    name: str
    size: int
    groups: Callable[[int], list[PromptWithResponses]]

    def parts(self) -> list[range]:
        return [range(first, min(first + SMALLEST_PART, self.size)) for first in range(0, self.size, SMALLEST_PART)]


@dataclass(frozen=True)
class ModelAsked:
    """A saved model and how it is run. deepspeed: a DeepSpeed JSON to shard it by, or None."""

    saved: Saved
    deepspeed: Path | None
    max_tokens: int


def score_parts(
    name: str,
    model: ModelAsked,
    heads: tuple[str, ...],
    asked: Sequence[AskedItems],
    folder: Path,
    processes: Processes,
    log: Console,
) -> dict[str, list[np.ndarray]]:
    """What the model says of every response. All processes call this together; what `folder` has is not done again.

    Args:
        name: of the model in this job.
        heads: of "reward" and "logprob".

    Returns:
        Name of `asked` -> for each item [responses, heads] fp32. On the first process; {} on the others.
    """
    parts = {
        folder / f"{name}-{quote(each.name, safe='')}-{number:06}.npy": (each, part)
        for each in asked
        for number, part in enumerate(each.parts())
    }
    # Told by the first: a part that it has seen may be there for the others, or not, on a slow shared disk.
    missing = processes.from_first(
        f"{name}: missing", lambda: "\n".join(str(file) for file in parts if not file.exists())
    )
    todo = {Path(file): len(parts[Path(file)][1]) for file in missing.splitlines()}
    if todo:
        if len(todo) < len(parts):
            log.print(f"{len(parts) - len(todo):,} of {len(parts):,} parts of {name} are there already")
        scorer = load_for_job(model.saved, model.deepspeed, model.max_tokens, processes.for_job(name))

        def make(file: Path) -> bytes:
            items, part = parts[file]
            groups = [group for item in part for group in items.groups(item)]
            content = io.BytesIO()
            np.save(content, scorer.values(groups, heads))
            return content.getvalue()

        together = model.deepspeed is not None
        work_through(name, todo, make, processes, log, unit="items", together=together)
    if not processes.is_first:
        return {}
    results: dict[str, list[np.ndarray]] = {each.name: [] for each in asked}
    for file, (items, part) in parts.items():
        sizes = [sum(len(group.responses) for group in items.groups(item)) for item in part]
        results[items.name] += np.split(np.load(file), np.cumsum(sizes)[:-1])
    return results
