"""Look-up in a large store: seconds and peak memory.

    python tests/benchmarks/reference_lookup.py FOLDER [STORED [ASKED]]

Writes a store of random keys in shards of a million into FOLDER, unless it is there, opens it (which checks every
shard) and looks up an even sample of the keys, in random order, beside as many that it does not have. Defaults: 10
million, and all of them. Prints a Markdown table.
"""

import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from hafrm_ds.data.content_keys import KEY_BYTES, KEY_DTYPE, unique_keys
from hafrm_ds.hardware.measurement import peak_memory_bytes
from hafrm_ds.reference.store import SCHEMA, Namespace, ReferenceStore, write_shard

SHARD = 1_000_000
NAMESPACE = Namespace(weights="0" * 64, dtype="bfloat16", version=1)


def some_keys(shard: int, number: int) -> np.ndarray:
    """Keys that only this shard has, in the order of their bytes, as a ShardWriter writes them."""
    keys = np.frombuffer(np.random.default_rng(shard).bytes(KEY_BYTES * number), dtype=KEY_DTYPE)
    return keys[np.argsort(keys["high"].byteswap())]


def value_of(keys: np.ndarray) -> np.ndarray:
    return -(keys["low"] % np.uint64(1000)).astype(np.float32)


def write_store(root: Path, number: int) -> None:
    folder = ReferenceStore(root, NAMESPACE).folder
    metadata = {"namespace": NAMESPACE.name, "provenance": "{}"}
    for start in range(0, number, SHARD):
        keys = some_keys(start, min(SHARD, number - start))
        columns = [
            pa.FixedSizeBinaryArray.from_buffers(SCHEMA.field("key").type, len(keys), [None, pa.py_buffer(keys)]),
            pa.array(value_of(keys)),
            pa.array(np.full(len(keys), 100, dtype=np.int32)),
        ]
        write_shard(folder, pa.Table.from_arrays(columns, schema=SCHEMA.with_metadata(metadata)))


def question(stored: int, asked: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys [2 * asked], and the values that are to be found."""
    share = stored // asked
    here = np.concatenate([some_keys(start, min(SHARD, stored - start))[::share] for start in range(0, stored, SHARD)])
    keys = np.concatenate([here, some_keys(-1 % 2**32, len(here))])
    values = np.concatenate([value_of(here), np.full(len(here), np.nan, np.float32)])
    order = np.random.default_rng(0).permutation(len(keys))
    return keys[order], values[order]


def main() -> None:
    root = Path(sys.argv[1])
    stored = int(sys.argv[2]) if len(sys.argv) > 2 else 10_000_000
    rows = []

    def timed(what: str, work):
        started = time.perf_counter(), time.process_time()
        result = work()
        took = [now - then for now, then in zip((time.perf_counter(), time.process_time()), started)]
        rows.append((what, *took, peak_memory_bytes(torch.device("cpu")) / 2**30))
        return result

    if not root.exists():
        timed("write, in shards of a million", lambda: write_store(root, stored))
    keys, expected = timed(
        "(make the question)", lambda: question(stored, int(sys.argv[3]) if len(sys.argv) > 3 else stored)
    )
    store = timed("open: checksums", lambda: ReferenceStore(root, NAMESPACE))
    unique, place = timed("the different keys that are asked for", lambda: unique_keys(keys))
    values = timed("look them up", lambda: store.logprobs(unique))
    np.testing.assert_array_equal(values[place], expected)
    print(f"{stored:,} stored values, {store.num_bytes:,} bytes on disk; {len(unique):,} keys asked for\n")
    print("| step | seconds | of the processor | peak memory so far, GiB |\n|---|---|---|---|")
    for what, seconds, of_processor, memory in rows:
        print(f"| {what} | {seconds:.2f} | {of_processor:.2f} | {memory:.2f} |")


if __name__ == "__main__":
    main()
