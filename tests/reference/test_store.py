"""The store: nothing is lost, nothing wrong is read."""

import json
import os
import random
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from hafrm_ds.data.content_keys import KEY_DTYPE, content_key, unique_keys
from hafrm_ds.reference import store as module
from hafrm_ds.reference.store import (
    NAMESPACE_FILE,
    SCHEMA,
    SET_ASIDE,
    Namespace,
    ReferenceStore,
    ShardWriter,
    StoreError,
    write_shard,
)

NAMESPACE = Namespace(weights="a" * 64, dtype="float32", version=1)


def some_keys(number: int, seed: int = 0) -> np.ndarray:
    return np.frombuffer(random.Random(seed).randbytes(16 * number), dtype=KEY_DTYPE)


def value_of(keys: np.ndarray) -> np.ndarray:
    """A value that a key determines, to recognise it by."""
    return -(keys["low"] % np.uint64(1000)).astype(np.float32)


def fill(root: Path, keys: np.ndarray, shard_size: int = 10, namespace: Namespace = NAMESPACE) -> ReferenceStore:
    store = ReferenceStore(root, namespace)
    with ShardWriter(store.folder, namespace.name, {"layout": "packed"}, flush_values=shard_size) as writer:
        for key, value in zip(keys, value_of(keys), strict=True):
            writer.add(key.tobytes(), float(value), 3)
    store.refresh()
    return store


def reopen(root: Path, namespace: Namespace = NAMESPACE) -> tuple[ReferenceStore, list[str]]:
    warnings: list[str] = []
    return ReferenceStore(root, namespace, warn=warnings.append), warnings


def test_values_are_found_by_key_in_any_order(tmp_path):
    keys = some_keys(95)
    store = fill(tmp_path, keys)
    assert len(store.shards) == 10
    assert len(store) == 95
    asked = np.concatenate([keys[::-3], some_keys(5, seed=1)])
    values = store.logprobs(asked)
    np.testing.assert_array_equal(values[:-5], value_of(keys[::-3]))
    assert np.isnan(values[-5:]).all()
    np.testing.assert_array_equal(store.missing(asked), np.isnan(values))
    assert json.loads(store.shards[0].table.schema.metadata[b"provenance"]) == {"layout": "packed"}
    assert all((shard.num_tokens == 3).all() for shard in store.shards)


def test_an_empty_store_misses_everything(tmp_path):
    store, _ = reopen(tmp_path)
    assert len(store) == 0
    assert np.isnan(store.logprobs(some_keys(3))).all()
    assert len(store.logprobs(some_keys(0))) == 0


def write_values(folder: Path, keys: np.ndarray, logprobs: list[float]) -> Path:
    """A shard of these values, in this order."""
    columns = [pa.array([key.tobytes() for key in keys], pa.binary(16)), pa.array(logprobs, pa.float32())]
    columns.append(pa.array([3] * len(keys), pa.int32()))
    schema = SCHEMA.with_metadata({"namespace": NAMESPACE.name, "provenance": "{}"})
    return write_shard(folder, pa.Table.from_arrays(columns, schema=schema))


@pytest.mark.parametrize("block", [1, 2, 100])
def test_keys_with_equal_upper_halves_are_told_apart(tmp_path, monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK_VALUES", block)
    keys = np.array([(7, 3), (7, 1), (2, 9), (7, 2), (9, 0)], dtype=KEY_DTYPE)
    store = ReferenceStore(tmp_path, NAMESPACE)
    write_values(store.folder, keys[:2], [0.0, 1.0])
    write_values(store.folder, keys[2:], [2.0, 3.0, 4.0])
    store.refresh()
    asked = np.array([(7, 2), (7, 4), (9, 0), (7, 3), (0, 0), (7, 1), (2, 9), (7, 3), (7, 2)], dtype=KEY_DTYPE)
    none = np.nan
    np.testing.assert_array_equal(store.logprobs(asked), [3, none, 4, 0, none, 1, 2, 0, 3])


@pytest.mark.parametrize("block", [1, 2, 100])
def test_of_equal_keys_the_first_value_counts(tmp_path, monkeypatch, block):
    """By the order of the shards' names, and of the values in a shard."""
    monkeypatch.setattr(module, "BLOCK_VALUES", block)
    one, other = some_keys(2)
    store = ReferenceStore(tmp_path, NAMESPACE)
    shards = {
        write_values(store.folder, np.array([one, other, one]), [-1.0, -2.0, -3.0]): [-1.0, -2.0],
        write_values(store.folder, np.array([other, one, other]), [-4.0, -5.0, -6.0]): [-5.0, -4.0],
    }
    store.refresh()
    assert store.logprobs(np.array([one, other])).tolist() == shards[min(shards)]
    assert len(store) == 2


def test_unique_keys_equal_those_of_numpy():
    keys = np.concatenate([some_keys(50), some_keys(50), some_keys(20, seed=2)])
    keys = keys[np.random.default_rng(0).permutation(len(keys))]
    unique, place = unique_keys(keys)
    assert len(unique) == 70
    np.testing.assert_array_equal(unique[place], keys)
    assert set(unique.tolist()) == set(np.unique(keys).tolist())


def test_different_keys_with_equal_upper_halves_are_different():
    keys = np.array([(7, 3), (2, 9), (7, 1), (7, 3), (2, 9), (7, 2), (9, 0), (7, 1)], dtype=KEY_DTYPE)
    unique, place = unique_keys(keys)
    assert unique.tolist() == [(2, 9), (7, 1), (7, 2), (7, 3), (9, 0)]
    np.testing.assert_array_equal(unique[place], keys)


def test_a_key_names_the_tokens_and_the_boundary():
    key = content_key([1, 2, 3], [4, 5])
    assert len(key) == 16
    assert key == content_key([1, 2, 3], [4, 5])
    others = [content_key([1, 2], [3, 4, 5]), content_key([1, 2, 3], [4, 6]), content_key([1, 2, 3], [4, 5, 2])]
    assert len({key, *others}) == 4


def test_a_shard_with_the_log_prob_of_each_token_is_read_beside_others(tmp_path):
    """Written by older versions with reference.per_token."""
    store, keys = ReferenceStore(tmp_path, NAMESPACE), some_keys(2)
    columns = [
        pa.array([keys[:1].tobytes()], pa.binary(16)),
        pa.array([-3.5], pa.float32()),
        pa.array([2], pa.int32()),
        pa.array([[-1.5, -2.0]], pa.list_(pa.float32())),
    ]
    schema = SCHEMA.append(pa.field("token_logprobs", columns[-1].type, nullable=False))
    metadata = {"namespace": NAMESPACE.name, "provenance": "{}"}
    write_shard(store.folder, pa.Table.from_arrays(columns, schema=schema.with_metadata(metadata)))
    with ShardWriter(store.folder, NAMESPACE.name, {}) as writer:
        writer.add(keys[1:].tobytes(), -1.25, 3)
    store.refresh()
    assert store.logprobs(keys).tolist() == [-3.5, -1.25]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused(tmp_path, value):
    store = ReferenceStore(tmp_path, NAMESPACE)
    with pytest.raises(StoreError, match="not stored"), ShardWriter(store.folder, NAMESPACE.name, {}) as writer:
        writer.add(b"0" * 16, value, 1)


# ---- faults --------------------------------------------------------------------------------------------------------


def truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-200])


def flip_a_bit(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)


def empty(shard: Path) -> None:
    shard.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty])
def test_a_damaged_shard_is_set_aside_and_only_its_values_are_missing(tmp_path, damage):
    keys = some_keys(40)
    folder = fill(tmp_path, keys).folder
    damage(sorted(folder.glob("*.arrow"))[1])
    store, warnings = reopen(tmp_path)
    assert len(store) == 30
    values = store.logprobs(keys)
    assert np.isnan(values).sum() == 10
    np.testing.assert_array_equal(values[~np.isnan(values)], value_of(keys)[~np.isnan(values)])
    assert len(warnings) == 1
    assert "is damaged" in warnings[0]
    assert len(list((folder / SET_ASIDE).iterdir())) == 1
    assert reopen(tmp_path)[1] == []


def test_foreign_files_are_set_aside(tmp_path):
    keys = some_keys(10)
    folder = fill(tmp_path, keys).folder
    other = Namespace(weights="b" * 64, dtype="float32", version=1)
    stranger = next(fill(tmp_path / "elsewhere", some_keys(10, seed=3), namespace=other).folder.glob("*.arrow"))
    (folder / stranger.name).write_bytes(stranger.read_bytes())
    (folder / "notes.txt").write_text("hello")
    plain = module.write_shard(folder, pa.table({"x": [1]}))
    store, warnings = reopen(tmp_path)
    assert len(store) == 10
    text = "\n".join(warnings)
    assert "another namespace, bbbbbbbbbbbb" in text
    assert "notes.txt is no shard" in text
    assert f"{plain.name} does not have the columns" in text


def test_a_lost_namespace_file_loses_nothing(tmp_path):
    keys = some_keys(10)
    folder = fill(tmp_path, keys).folder
    (folder / NAMESPACE_FILE).unlink()
    store, warnings = reopen(tmp_path)
    assert (len(store), warnings) == (10, [])
    assert (folder / NAMESPACE_FILE).exists()


def test_a_draft_of_a_killed_writer_is_not_read(tmp_path):
    folder = fill(tmp_path, some_keys(10)).folder
    (folder / f"{module.DRAFT_PREFIX}123").write_bytes(b"half a shard")
    store, warnings = reopen(tmp_path)
    assert (len(store), warnings) == (10, [])


def test_other_weights_dtype_or_version_are_other_namespaces(tmp_path):
    fill(tmp_path, some_keys(10))
    for changed in (
        Namespace("b" * 64, "float32", 1),
        Namespace("a" * 64, "bfloat16", 1),
        Namespace("a" * 64, "float32", 2),
    ):
        assert len(reopen(tmp_path, changed)[0]) == 0
    text = module.describe_namespaces(tmp_path, Namespace("a" * 64, "bfloat16", 1))
    assert "other dtype" in text


def test_a_failed_write_leaves_a_good_store_and_says_so(tmp_path, monkeypatch):
    keys = some_keys(10)
    store = fill(tmp_path, keys)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(StoreError, match=r"disk is full.*stored before is good"):
        fill(tmp_path, some_keys(5, seed=1))
    monkeypatch.undo()
    assert not list(store.folder.glob(f"{module.DRAFT_PREFIX}*"))
    again, warnings = reopen(tmp_path)
    assert (len(again), warnings) == (10, [])


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_really_full_disk(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)], check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        fill(mount, some_keys(100), shard_size=100)
        with pytest.raises(StoreError, match="disk is full"):
            fill(mount, some_keys(50_000, seed=1), shard_size=50_000)
        store, warnings = reopen(mount)
        assert (len(store), warnings) == (100, [])
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


def test_two_writers_at_once(tmp_path):
    shared, first, second = some_keys(50), some_keys(100, seed=1), some_keys(100, seed=2)
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(fill, tmp_path, np.concatenate([shared, own])) for own in (first, second)]
        for job in jobs:
            job.result()
    store, warnings = reopen(tmp_path)
    assert (len(store), warnings) == (250, [])
    every = np.concatenate([first, shared, second])
    np.testing.assert_array_equal(store.logprobs(every), value_of(every))
