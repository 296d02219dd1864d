"""Look-up of 10 million keys: seconds and peak memory.

    python tests/benchmarks/reference_lookup.py [NUM_KEYS]

Writes a store of random keys in shards of a million, opens it (checksums and index), looks every key up in random order
and joins the values to pairs. Prints a Markdown table.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from hafrm_ds.data.content_keys import KEY_DTYPE, unique_keys
from hafrm_ds.hardware.measurement import peak_memory_bytes
from hafrm_ds.reference.store import SCHEMA, Namespace, ReferenceStore, write_shard

SHARD = 1_000_000
NAMESPACE = Namespace(weights="0" * 64, dtype="bfloat16", version=1)


def write_store(root: Path, keys: np.ndarray) -> None:
    folder = ReferenceStore(root, NAMESPACE).folder
    metadata = {"namespace": NAMESPACE.name, "provenance": "{}"}
    for start in range(0, len(keys), SHARD):
        part = keys[start : start + SHARD]
        columns = [
            pa.FixedSizeBinaryArray.from_buffers(SCHEMA.field("key").type, len(part), [None, pa.py_buffer(part)]),
            pa.array(np.arange(start, start + len(part), dtype=np.float32)),
            pa.array(np.full(len(part), 100, dtype=np.int32)),
        ]
        write_shard(folder, pa.Table.from_arrays(columns, schema=SCHEMA.with_metadata(metadata)))


def main() -> None:
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000
    generator = np.random.default_rng(0)
    keys = np.frombuffer(generator.bytes(16 * number), dtype=KEY_DTYPE).copy()
    rows = []

    def timed(what: str, work):
        started = time.perf_counter()
        result = work()
        rows.append((what, time.perf_counter() - started, peak_memory_bytes(torch.device("cpu")) / 2**30))
        return result

    with tempfile.TemporaryDirectory() as folder:
        timed("write, in shards of a million", lambda: write_store(Path(folder), keys))
        order = generator.permutation(number)
        asked = keys[order]
        store = timed("open: checksums and index", lambda: ReferenceStore(Path(folder), NAMESPACE))
        values = timed("look up every key, in random order", lambda: store.logprobs(asked))
        unique, place = timed("the different keys among the pairs' keys", lambda: unique_keys(asked))
        joined = timed("join to pairs", lambda: store.logprobs(unique)[place].reshape(-1, 2))
        size = store.num_bytes
    expected = order.astype(np.float32)
    assert np.array_equal(values, expected)
    assert np.array_equal(joined.reshape(-1), expected)
    print(f"{number:,} keys, {size:,} bytes on disk ({size / number:.1f} a value)\n")
    print("| step | seconds | peak memory so far, GiB |\n|---|---|---|")
    for what, seconds, memory in rows:
        print(f"| {what} | {seconds:.2f} | {memory:.2f} |")


if __name__ == "__main__":
    main()
