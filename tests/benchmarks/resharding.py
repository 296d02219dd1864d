"""Bytes that each rank reads when a checkpoint is resumed by another number of ranks under ZeRO-3.

    python tests/benchmarks/resharding.py RUN/checkpoints/step-N [RANKS]
    python tests/benchmarks/resharding.py plan

The first form is one rank after another in one process, each with a cold page cache: its part of the check, and its
shares of weights and moments. `system calls` are the bytes that it asked for, `disk` those that came from the disk. The
second plans a model of the shapes of Llama-3.1-70B without any file.
"""

import math
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from hafrm_ds.engine.checkpoint import (
    BLOCK_BYTES,
    DEEPSPEED_FOLDER,
    FileFacts,
    checked_parts,
    damaged_file,
    read_manifest,
    read_state,
)
from hafrm_ds.engine.resharding import KEYS, Layout, Shards

HIDDEN, LAYERS, KEY_VALUES, INTERMEDIATE, VOCABULARY = 8192, 80, 1024, 28672, 128256
MIB, GIB = 2**20, 2**30


def counted(folder: Path, work: Callable[[], object]) -> tuple[int, int]:
    """(bytes asked for by system calls, bytes read from the disk) while something is done."""

    def counters() -> tuple[int, int]:
        facts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        return int(facts["rchar"]), int(facts["read_bytes"])

    for file in folder.rglob("*.*"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    before = counters()
    work()
    after = counters()
    return after[0] - before[0], after[1] - before[1]


def shares(layout: Layout, num_ranks: int, rank: int) -> Iterator[tuple[str, int, int]]:
    """(parameter, start, numel) of what a rank takes under stage 3."""
    for name in layout.pieces:
        share = math.ceil(layout.numel(name) / num_ranks)
        yield name, rank * share, share


def measure(checkpoint: Path, num_ranks: int) -> None:
    state, files = read_state(checkpoint), read_manifest(checkpoint)
    total = sum(facts.bytes for facts in files.values())
    print(f"{total / MIB:,.1f} MiB, written by {state.world_size} ranks under stage {state.zero_stage}\n")
    print("| rank of | check, system calls, MiB | shares, system calls, MiB | shares, disk, MiB |\n|---|---|---|---|")
    for rank in range(num_ranks):

        def take(rank: int = rank) -> None:
            shards = Shards(checkpoint / DEEPSPEED_FOLDER, state.zero_stage, state.world_size)
            for name, start, numel in shares(shards.layout, num_ranks, rank):
                for key in KEYS:
                    shards.copy_into(torch.zeros(numel), name, key, start)

        check, _ = counted(checkpoint, partial(damaged_file, checkpoint, files.items(), rank, num_ranks))
        asked, from_disk = counted(checkpoint, take)
        print(f"| {rank} of {num_ranks} | {check / MIB:,.1f} | {asked / MIB:,.1f} | {from_disk / MIB:,.1f} |")


def shapes_of_70b() -> list[dict[str, tuple[int, ...]]]:
    """The groups of the optimizer: matrices, vectors and the reward head."""
    matrices: dict[str, tuple[int, ...]] = {name: (VOCABULARY, HIDDEN) for name in ("embed_tokens", "lm_head")}
    vectors: dict[str, tuple[int, ...]] = {"norm": (HIDDEN,)}
    for layer in range(LAYERS):
        matrices |= {f"{layer}.{name}": (HIDDEN, HIDDEN) for name in ("q", "o")}
        matrices |= {f"{layer}.{name}": (KEY_VALUES, HIDDEN) for name in ("k", "v")}
        matrices |= {f"{layer}.{name}": (INTERMEDIATE, HIDDEN) for name in ("gate", "up", "down")}
        vectors |= {f"{layer}.{name}": (HIDDEN,) for name in ("before", "after")}
    return [matrices, vectors, {"reward_head": (1, HIDDEN)}]


def plan(written_by: int, num_ranks: int) -> None:
    groups = shapes_of_70b()
    layout = Layout.of_stage_3(groups, written_by)
    numbers, opened = [], []
    for rank in range(num_ranks):
        parts = [part for share in shares(layout, num_ranks, rank) for _, part in layout.parts(*share)]
        numbers.append(sum(part.numel for part in parts))
        opened.append(len({part.rank for part in parts}))
    whole = sum(math.prod(shape) for shapes in groups for shape in shapes.values())
    assert sum(numbers) == whole
    own = 12 * sum(layout.pieces[name][0].numel for name in layout.pieces)
    files = [
        (f"optimizer of rank {rank}", FileFacts(own, "", [""] * math.ceil(own / BLOCK_BYTES)))
        for rank in range(written_by)
    ]
    checked = [stop - start for _, start, stop, _ in checked_parts(files)]
    checks = [sum(checked[rank::num_ranks]) / GIB for rank in range(num_ranks)]
    low, high = (12 * each(numbers) / GIB for each in (min, max))
    print(
        f"| {written_by} to {num_ranks} | {12 * whole / GIB:,.1f} | {low:,.2f} to {high:,.2f} | "
        f"{min(checks):,.2f} to {max(checks):,.2f} | {max(opened)} |"
    )


def main() -> None:
    if sys.argv[1] != "plan":
        measure(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 8)
        return
    print("| ranks | weights and moments, GiB | read by a rank, GiB | checked by a rank, GiB | files it opens |")
    print("|---|---|---|---|---|")
    for written_by, num_ranks in ((64, 64), (128, 64), (8, 64), (64, 1024), (1024, 64)):
        plan(written_by, num_ranks)


if __name__ == "__main__":
    main()
