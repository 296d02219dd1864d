"""Prepared pairs by the million: seconds and memory of the processes of one host, from tokenised rows to a first batch.

    python -m tests.benchmarks.many_pairs FOLDER [NUM_PAIRS] [RANKS]

Writes made-up tokenised rows into FOLDER (about 200 bytes a pair; reading and tokenising are timed by reading.py), then
starts one process after another, as a run does, each of which prepares the set, plans the first step and lays out a
micro-batch. Private memory is what a process holds for itself beyond its imports; that of the host also counts what all
share, once. Prints a Markdown table.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import datasets
import numpy as np
import pyarrow as pa

from hafrm_ds.data import preparation
from hafrm_ds.data.content_keys import KEY_BYTES
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.micro_batches import make_micro_batch
from hafrm_ds.data.planning import BatchPlan, partition_into_micro_batches
from hafrm_ds.data.preparation import FATE_FEATURES, GROUP_FEATURES, PreparationOptions, fingerprints_of, prepare_groups
from hafrm_ds.data.sources import Source
from tests.tiny_tokenizers import byte_level_tokenizer

WRITTEN_AT_ONCE, ROWS_OF_A_BATCH = 500_000, 1000  # the latter as datasets writes them
GLOBAL_BATCH_SIZE, NUM_RANKS, MAX_TOKENS = 1024, 64, 8192
FEATURES = datasets.Features(GROUP_FEATURES | FATE_FEATURES)


def write_tokens(file: Path, num_pairs: int) -> None:
    """Rows as `tokenize_rows` leaves them; every fiftieth was dropped."""
    schema = FEATURES.arrow_schema
    generator = np.random.default_rng(0)
    with pa.ipc.new_stream(str(file), schema) as writer:
        for start in range(0, num_pairs, WRITTEN_AT_ONCE):
            number = min(WRITTEN_AT_ONCE, num_pairs - start)
            rows = np.arange(start, start + number)
            dropped = rows % 50 == 49

            def ids(dropped: np.ndarray) -> pa.Array:
                lengths = np.where(dropped, 0, generator.integers(4, 12, len(dropped)))
                offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
                return pa.ListArray.from_arrays(offsets, pa.array(np.full(offsets[-1], 7, np.int32)))

            def keys(number: int) -> pa.Array:
                offsets = np.arange(0, KEY_BYTES * (number + 1), KEY_BYTES, dtype=np.int32)
                content = generator.bytes(KEY_BYTES * number)
                return pa.Array.from_buffers(pa.binary(), number, [None, pa.py_buffer(offsets), pa.py_buffer(content)])

            def text(value: str, number: int = number) -> pa.Array:
                return pa.repeat(pa.scalar(value, pa.string()), number)

            def listed(values: pa.Array, each: int, dropped: np.ndarray = dropped) -> pa.Array:
                """Some values of each row that is kept; none of others."""
                sizes = np.where(dropped, 0, each)
                return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32), values)

            kept = number - int(dropped.sum())
            comparison = {
                "better": np.zeros(kept, np.int32),
                "worse": np.ones(kept, np.int32),
                "margin": pa.nulls(kept, pa.float32()),
                "target": np.ones(kept, np.float32),
                "weight": np.ones(kept, np.float32),
            }
            columns = {"prompt_ids": ids(dropped), "prompt_key": keys(number)}
            columns["response_ids"] = listed(ids(np.zeros(2 * kept, bool)), 2)
            columns["response_keys"] = listed(keys(2 * kept), 2)
            arrays = [pa.array(column) for column in comparison.values()]
            columns["comparisons"] = listed(pa.StructArray.from_arrays(arrays, list(comparison)), 1)
            nothing = pa.array([], FEATURES.arrow_schema.field("attributes").type.value_type.value_type)
            columns["attributes"] = listed(pa.ListArray.from_arrays(np.zeros(2 * kept + 1, np.int32), nothing), 2)
            columns |= {name: text("") for name in ("deselected", "remarks", "lost", "left_out", "marks")}
            columns |= {
                "source": text("made up"),
                "id": pa.array([f"pairs.jsonl:{row + 1}" for row in rows.tolist()]),
                "format": text("explicit_prompt"),
                "dropped": pa.array(np.where(dropped, "identical answers", "").tolist(), pa.string()),
                "cut": pa.array(np.zeros(number, bool)),
                "trains_reward": pa.array(np.ones(number, bool)),
                "uncut_length": pa.array(np.where(dropped, 0, 30)),
            }
            table = pa.table({name: columns[name] for name in schema.names}).cast(schema)
            writer.write_table(table, max_chunksize=ROWS_OF_A_BATCH)


def memory() -> dict[str, float]:
    """GiB of this process: private to it, and its share of what it shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    facts = {line.split(":")[0]: int(line.split()[1]) / 2**20 for line in lines}
    return {"private": facts["Private_Clean"] + facts["Private_Dirty"], "pss": facts["Pss"]}


def rank(folder: Path) -> None:
    """One process of a run: prints its figures, and waits until it is told to measure its memory and to end."""
    formatter = ChatFormatter.create(byte_level_tokenizer(), None, "2026-01-01")
    options = PreparationOptions(max_length=100, truncation="drop", cache_dir=folder)
    rows, seconds, start = SimpleNamespace(_fingerprint="made up"), {}, memory()["private"]

    def timed(what: str, work):
        started = time.perf_counter()
        result = work()
        seconds[what] = time.perf_counter() - started
        return result

    replaced: dict[str, Any] = {
        "read_groups": lambda *_, **__: rows,
        "selection_key": lambda *_, **__: rows._fingerprint,
        "tokenize_rows": lambda *_, **__: datasets.Dataset.from_file(str(folder / "tokens.arrow")),
    }
    with mock.patch.multiple(preparation, **replaced):
        sources = [Source(path="pairs.jsonl")]
        pairs = timed(
            "prepare", lambda: prepare_groups(sources, formatter=formatter, options=options, role="train", seed=0)
        )
    timed("fingerprint", lambda: fingerprints_of({"train": pairs}))

    def first_step() -> None:
        index = BatchPlan(len(pairs), GLOBAL_BATCH_SIZE, 0).global_batch(0)
        costs = pairs.lengths.take(index).costs("shared_prefix")
        parts = partition_into_micro_batches(costs, NUM_RANKS, MAX_TOKENS)
        make_micro_batch(pairs, index[parts[0][0]], "shared_prefix")

    timed("first step", first_step)
    print(json.dumps({"seconds": seconds, "pairs": len(pairs)}), flush=True)
    sys.stdin.readline()
    found = memory()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps(found | {"start": start, "peak": int(peak.split()[1]) / 2**20}), flush=True)
    sys.stdin.readline()


def told(process: subprocess.Popen) -> dict[str, Any]:
    """The next figures that a process prints."""
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    if len(sys.argv) > 2 and sys.argv[2] == "rank":
        rank(folder)
        return
    num_pairs = int(sys.argv[2]) if len(sys.argv) > 2 else 1_000_000
    num_ranks = int(sys.argv[3]) if len(sys.argv) > 3 else 4
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokens.arrow").exists():
        started = time.perf_counter()
        write_tokens(folder / "draft.arrow", num_pairs)
        (folder / "draft.arrow").rename(folder / "tokens.arrow")
        print(f"rows written in {time.perf_counter() - started:.0f} s")
    ranks, figures = [], []
    for _ in range(num_ranks):
        command = [sys.executable, "-m", "tests.benchmarks.many_pairs", str(folder), "rank"]
        ranks.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        figures.append(told(ranks[-1]))
    for each in ("measure\n", "end\n"):
        for process in ranks:
            assert process.stdin is not None
            process.stdin.write(each)
            process.stdin.flush()
        if each == "measure\n":
            for process, found in zip(ranks, figures):
                found.update(told(process))
    size = (folder / "tokens.arrow").stat().st_size
    print(f"{figures[0]['pairs']:,} pairs, {size / 2**30:.2f} GiB of tokenised rows\n")
    names = list(figures[0]["seconds"])
    print(f"| process | {', s | '.join(names)}, s | peak, GiB | private memory beyond the imports, GiB |")
    print("|---|" + "---|" * (len(names) + 2))
    for number, found in enumerate(figures):
        times = " | ".join(f"{found['seconds'][name]:.2f}" for name in names)
        print(f"| {number} | {times} | {found['peak']:.2f} | {found['private'] - found['start']:.2f} |")
    print(f"\nThe host: {sum(found['pss'] for found in figures):.2f} GiB, imports among them")


if __name__ == "__main__":
    main()
