import os
import shutil

import numpy as np
import pytest

from hafrm_ds.reference.maintenance import merge_stores, prune_store, verify_store
from hafrm_ds.reference.store import DRAFT_PREFIX, SET_ASIDE, StoreError
from tests.reference.test_store import NAMESPACE, fill, flip_a_bit, reopen, some_keys, truncate, value_of


def test_a_copied_folder_is_a_copied_store(tmp_path):
    keys = some_keys(20)
    fill(tmp_path / "a", keys)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    np.testing.assert_array_equal(reopen(tmp_path / "b")[0].logprobs(keys), value_of(keys))


def test_verify_counts_and_names_bad_files(tmp_path):
    folder = fill(tmp_path, some_keys(30)).folder
    truncate(sorted(folder.glob("*.arrow"))[0])
    (report,) = verify_store(tmp_path)
    assert (report.name, report.shards, report.values) == (NAMESPACE.name, 2, 20)
    assert len(report.bad) == 1
    assert "is damaged" in report.bad[0]
    assert len(list(folder.glob("*.arrow"))) == 3  # verifying moves nothing


def test_merge_takes_what_is_missing_and_leaves_the_source(tmp_path):
    one, two = some_keys(30), np.concatenate([some_keys(30)[:10], some_keys(20, seed=4)])
    fill(tmp_path / "one", one)
    fill(tmp_path / "two", two)
    merge_stores(tmp_path / "two", tmp_path / "one")
    store, warnings = reopen(tmp_path / "one")
    assert (len(store), warnings) == (50, [])
    np.testing.assert_array_equal(store.logprobs(two), value_of(two))
    assert len(reopen(tmp_path / "two")[0]) == 30


@pytest.mark.parametrize("work", [verify_store, prune_store, lambda folder: merge_stores(folder, folder / "new")])
def test_a_folder_that_is_no_store_is_refused_and_left_as_it_is(tmp_path, work):
    """Files that are no shards are set aside, and pruning deletes what was: neither may meet somebody's own files."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    for root in (tmp_path, tmp_path / "absent"):
        with pytest.raises(StoreError, match=f"{root.name} is no reference store"):
            work(root)
    fill(tmp_path, some_keys(30))
    work(tmp_path)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"
    assert not (tmp_path / "thesis" / SET_ASIDE).exists()


def test_prune_rewrites_doubles_and_removes_what_failed(tmp_path):
    keys = some_keys(30)
    folder = fill(tmp_path, keys).folder
    fill(tmp_path, keys[:15], shard_size=4)
    flip_a_bit(sorted(folder.glob("*.arrow"))[0])
    reopen(tmp_path)  # sets the damaged one aside
    draft = folder / f"{DRAFT_PREFIX}old"
    draft.write_bytes(b"x")
    os.utime(draft, (0, 0))
    before = reopen(tmp_path)[0]
    expected = before.logprobs(keys)
    prune_store(tmp_path)
    after, warnings = reopen(tmp_path)
    assert warnings == []
    np.testing.assert_array_equal(after.logprobs(keys), expected)
    assert len(after.shards) == 1
    assert sum(len(shard.keys) for shard in after.shards) == len(before)
    assert not draft.exists()
    assert not (folder / SET_ASIDE).exists()
