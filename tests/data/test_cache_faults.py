"""The cache of prepared data: what goes wrong with it is one message, or mended; what has changed is read anew."""

import errno
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from hafrm_ds.data import preparation
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.preparation import PreparationOptions, prepare_groups
from hafrm_ds.data.sources import Source
from hafrm_ds.errors import DataError, in_own_names


@pytest.fixture
def file(tmp_path):
    def write(word: str = "Yes"):
        file = tmp_path / "pairs.jsonl"
        rows = [{"prompt": f"Q{n}", "chosen": word, "rejected": "No."} for n in range(9)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    write()
    return write


@pytest.fixture
def prepare(tmp_path, make_tokenizer, file):
    formatter = ChatFormatter.create(make_tokenizer(), None, "2024-07-26")

    def prepared(cache_dir=tmp_path / "cache", role="eval", seed=0, **options):
        options = PreparationOptions(max_length=200, truncation="drop", cache_dir=cache_dir, **options)
        sources = [Source(path=str(tmp_path / "pairs.jsonl"))]
        return prepare_groups(sources, formatter=formatter, options=options, role=role, seed=seed)

    return prepared


def test_a_cache_that_cannot_be_written_is_one_message(prepare, tmp_path):
    (tmp_path / "taken").write_text("")
    for folder in ("/proc/nope", tmp_path / "taken"):
        with pytest.raises(DataError) as caught:
            prepare(folder)
        said = str(caught.value)
        assert said.startswith("the cache") and str(folder) in said and "\n" not in said
        assert "--data.cache_dir" in said and "HF_HOME" in said
        assert " --cache_dir" in in_own_names(caught.value)


@pytest.mark.parametrize("step", ["read_groups", "tokenize_rows"])
def test_a_full_disk_is_one_message(prepare, monkeypatch, step):
    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(preparation, step, fail)
    with pytest.raises(DataError, match="cannot be used: No space left on device"):
        prepare()


def test_runs_that_start_together_prepare_once(prepare, monkeypatch, capfd):
    """As a job array does, with a seed each: runs of one seed share what is prepared, those of others the tokens."""
    begun, arrived, tokenize, alone = [], [], preparation.tokenize_batch, preparation.one_at_a_time

    def one_at_a_time(result):
        arrived.extend([result] * result.name.startswith("prepared-"))
        return alone(result)

    def after_all_have_arrived(batch, **arguments):
        begun.append(len(batch["id"]))
        end = time.monotonic() + 60
        while len(arrived) < 6 and time.monotonic() < end:
            time.sleep(0.01)
        return tokenize(batch, **arguments)

    monkeypatch.setattr(preparation, "one_at_a_time", one_at_a_time)
    monkeypatch.setattr(preparation, "tokenize_batch", after_all_have_arrived)
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda seed: prepare(role="train", seed=seed), [0, 0, 1, 1, 2, 2]))
    assert begun == [9]
    assert {groups.fingerprint for groups in together} == {prepare(role="train").fingerprint}
    assert "waiting for another process that prepares the same data: " in capfd.readouterr().err


def test_damaged_tokens_are_made_anew(prepare, tmp_path):
    whole = prepare().rows.to_list()
    [tokens] = (tmp_path / "cache").glob("tokenized-*.arrow")
    for content in (tokens.read_bytes()[:700], b"", b"no arrow file"):
        tokens.unlink()  # the old one is mapped into memory
        tokens.write_bytes(content)
        assert prepare().rows.to_list() == whole


def test_a_file_that_has_changed_under_the_same_size_and_time_is_read_anew(prepare, file):
    facts = file().stat()
    before = prepare()
    assert before.report.examples[0].chosen != (changed := before.report.examples[0].chosen.replace("Yes", "Nay"))
    os.utime(file("Nay"), ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert prepare().report.examples[0].chosen == changed


def test_later_processes_map_what_the_first_has_counted(prepare, tmp_path, monkeypatch):
    first = prepare()
    monkeypatch.setattr(preparation, "read_groups", None)  # no row is read again
    again = prepare()
    assert again.report == first.report
    assert again.fingerprint == first.fingerprint
    assert again.rows.to_list() == first.rows.to_list()
    lengths = (again.lengths.prompt, again.lengths.response, again.lengths.first, again.first_comparison)
    mapped = (*lengths, *again.table, again.keys, again.prompt_keys, again.uncut_lengths)
    assert all(isinstance(column.base, np.memmap) and not column.flags.writeable for column in mapped)


@pytest.mark.parametrize("name", ["keys.npy", "facts.json", "response.npy", "better.npy", "kept.arrow"])
@pytest.mark.parametrize("damage", [b"", b"{}", None])
def test_damaged_counts_are_made_anew(prepare, tmp_path, file, name, damage):
    with (tmp_path / "pairs.jsonl").open("a") as more:
        more.write(json.dumps({"prompt": "Q", "chosen": "x" * 300, "rejected": "No."}) + "\n")
    prepare = partial(prepare, max_dropped_share=0.2)
    whole = prepare()
    [folder] = (tmp_path / "cache").glob("prepared-*")
    (folder / name).unlink()  # the old one is mapped into memory
    if damage is not None:
        (folder / name).write_bytes(damage)
    again = prepare()
    assert len(again) == 9
    assert again.rows.to_list() == whole.rows.to_list()
    assert np.array_equal(again.keys, whole.keys) and again.report == whole.report
