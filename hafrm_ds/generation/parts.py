"""One answer of a policy to each of many prompts, on any number of processes, kept in parts on disk.

    token ids -> parts of PART prompts -> FOLDER/NAME-NNNNNN.json -> answers

What is drawn together lies within a part: the answers depend neither on kills nor on the number of processes.
"""

import gc
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.errors import DataError
from hafrm_ds.generation.samplers import GREEDY, SAMPLERS, Answer, choose_sampler, one_each
from hafrm_ds.model.loading import load_model_config
from hafrm_ds.model.sizes import ModelSizes
from hafrm_ds.processes.console import Console
from hafrm_ds.processes.parts import work_through
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.saved.folder import SavedModel
from hafrm_ds.saved.policy import SavedPolicy

PART = 16


def answers_in_parts(
    name: str,
    policy: SavedModel | SavedPolicy,
    formatter: ChatFormatter,
    prompts: Sequence[Sequence[int]],
    folder: Path,
    processes: Processes,
    log: Console,
    *,
    max_new_tokens: int,
    temperature: float = GREEDY,
    seed: int = 0,
) -> list[Answer]:
    """What the policy writes behind each prompt, the same on all processes, which call this together. What `folder`
    has is not done again.

    Args:
        name: unique in the job.
        prompts: token ids of each.

    Raises:
        DataError: a prompt leaves no room for it.
    """
    positions = ModelSizes.of(str(policy.folder), load_model_config(policy.config)).positions
    longest = max(map(len, prompts), default=0)
    if longest + max_new_tokens > positions:
        raise DataError(
            f"{policy.folder} knows {positions:,} positions, and a prompt of {longest:,} tokens leaves no room for "
            f"{max_new_tokens:,} new ones ({name})"
        )
    parts = {
        folder / f"{name}-{number:06}.json": (number, prompts[first : first + PART])
        for number, first in enumerate(range(0, len(prompts), PART))
    }

    def load() -> Callable[[Path], bytes]:
        sampler = SAMPLERS[choose_sampler("auto", policy)](policy, formatter, processes, max_new_tokens=max_new_tokens)

        def make(file: Path) -> bytes:
            number, own = parts[file]
            answers = one_each(sampler, own, temperature, seed + number * PART)
            return json.dumps(answers).encode()

        return make

    work_through(
        name,
        {file: len(own) for file, (_, own) in parts.items()},
        load,
        processes,
        log,
        unit="answers",
        together=False,
        what=f"parts of {name}",
    )
    gc.collect()  # the memory of the policy is for what scores now
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    written = processes.from_first(
        f"{name}: answers", lambda: [each for file in parts for each in json.loads(file.read_bytes())]
    )
    return [Answer(*each) for each in written]
