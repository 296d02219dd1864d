"""Content keys: a 128-bit name for a response in its context, made of its tokens alone.

Legend: Q keys, U different keys.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

KEY_BYTES = 16
KEY_DTYPE = np.dtype([("high", "<u8"), ("low", "<u8")])


def content_key(prompt_ids: Sequence[int], response_ids: Sequence[int]) -> bytes:
    """Key of a response: the exact token ids of prompt and response, and the place where the response begins."""
    digest = hashlib.blake2b(len(prompt_ids).to_bytes(8, "little"), digest_size=KEY_BYTES)
    digest.update(np.asarray([*prompt_ids, *response_ids], dtype="<i4").tobytes())
    return digest.digest()


def keys_of_column(column: pa.ChunkedArray) -> np.ndarray:
    """A binary column whose values all have KEY_BYTES bytes -> [Q] KEY_DTYPE."""
    return column_view(column.cast(pa.binary(KEY_BYTES)), KEY_DTYPE)


def column_view(column: pa.ChunkedArray, dtype: np.dtype) -> np.ndarray:
    """A column of fixed-size values as numpy, without a copy where it is one chunk."""
    parts = [
        np.frombuffer(chunk.buffers()[1], dtype=dtype, count=len(chunk), offset=chunk.offset * dtype.itemsize)
        for chunk in column.chunks
        if len(chunk)
    ]
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype), *parts])


def unique_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys [Q] KEY_DTYPE -> (different keys [U] in order, place [Q] of each key among them).

    np.unique does the same by comparing records one by one, many times slower.
    """
    order = np.argsort(np.ascontiguousarray(keys["high"]))
    ordered = keys[order]
    new_high, new_low = (ordered[half][1:] != ordered[half][:-1] for half in ("high", "low"))
    if (new_low & ~new_high).any():  # different keys with equal upper halves: hardly ever
        order = np.lexsort((keys["low"], keys["high"]))
        ordered = keys[order]
    is_new = np.ones(len(keys), dtype=bool)
    is_new[1:] = ordered[1:] != ordered[:-1]
    place = np.empty(len(keys), dtype=np.int64)
    place[order] = np.cumsum(is_new) - 1
    return ordered[is_new], place
