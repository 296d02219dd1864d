"""Scoring a file: every row once, in its place, whatever was done before."""

import gzip
import json
import random
import shutil

import pytest
import torch.distributed as dist

from hafrm_ds import HybridRewardModel
from hafrm_ds.errors import DataError
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.scoring import files as job
from hafrm_ds.scoring.files import ScoringOptions, score_file, split_into_parts
from tests.tiny_models import save_tiny_final


@pytest.fixture(scope="module")
def final(tmp_path_factory):
    return save_tiny_final(tmp_path_factory.mktemp("model") / "final")


@pytest.fixture
def options(final, tmp_path, monkeypatch):
    """A file of 40 rows of all forms, cut into 6 parts."""
    monkeypatch.setattr(job, "SMALLEST_PART", 7)
    source = random.Random(0)

    def text() -> str:
        return "".join(source.choice("abc ") for _ in range(source.randrange(1, 30)))

    rows = [
        {"id": number, "prompt": text()} | ({"response": text()} if number % 3 else {"responses": [text(), text()]})
        for number in range(40)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ScoringOptions(model=final, input=tmp_path / "in.jsonl", output=tmp_path / "out.jsonl")


def run(options: ScoringOptions) -> int:
    return score_file(options, Processes(rank=0, local_rank=0, world_size=1, store=dist.HashStore()))


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_row_comes_out_once_in_order_with_its_score(options):
    assert run(options) == 0
    rows, model = lines(options.output), HybridRewardModel.from_pretrained(options.model)
    assert [row["id"] for row in rows] == list(range(40))
    for row in rows:
        question = [{"role": "user", "content": row["prompt"]}]
        if "response" in row:
            assert row["score"] == pytest.approx(model.score(question, [row["response"]])[0], abs=1e-5)
        else:
            assert row["scores"] == pytest.approx(model.score(question, row["responses"]), abs=1e-5)
    assert sorted(path.name for path in options.output.parent.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_job_that_was_stopped_goes_on_with_what_is_missing(options, monkeypatch, tmp_path):
    assert run(options) == 0
    expected = options.output.read_bytes()
    options.output.unlink()
    whole, scored = job.score_part, []

    def stops_at_the_third(part, *rest):
        scored.append(part.first_line // 7)
        if len(scored) == 3:
            raise KeyboardInterrupt
        return whole(part, *rest)

    monkeypatch.setattr(job, "score_part", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(options)
    assert not options.output.exists()
    (tmp_path / "out.jsonl.parts" / ".part-000004.jsonl.123").write_bytes(b"half a li")  # as a kill leaves it
    assert run(options) == 0
    assert scored == [0, 1, 2, 2, 3, 4, 5]
    assert options.output.read_bytes() == expected


def test_a_kill_while_the_parts_are_removed_leaves_none_that_stand_in_the_way(options, monkeypatch):
    def killed(folder, **_):
        if folder.exists():
            (folder / "job.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", killed)
        run(options)
    expected = options.output.read_bytes()
    options.output.unlink()
    assert run(options) == 0 and options.output.read_bytes() == expected
    assert sorted(path.name for path in options.output.parent.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_parts_of_another_job_are_not_mixed_in(options, monkeypatch):
    monkeypatch.setattr(job, "join_parts", lambda *_: 0)
    run(options)
    options.input.write_text(options.input.read_text().replace("a", "b", 1))
    with pytest.raises(DataError, match=r"out.jsonl.parts holds parts of a job with another model, input or setting"):
        run(options)


def test_bad_rows_are_reported_by_line_and_the_rest_is_scored(options, capsys):
    good = options.input.read_text().splitlines()
    options.input.write_text("\n".join([*good[:9], "", "no json", *good[9:12], '{"id": "empty"}']))
    assert run(options) == 2
    rows = lines(options.output)
    assert [row.get("id") for row in rows] == [*range(9), None, *range(9, 12), "empty"]
    unscored = [row for row in rows if row.get("score") is None and row.get("scores") is None]
    assert [row["score_error"].split(": ")[0] for row in unscored] == ["in.jsonl:11", "in.jsonl:15"]
    printed = capsys.readouterr().out
    assert "2 rows could not be scored" in printed and "in.jsonl:11: is not valid JSON" in printed


def test_files_that_cannot_be_used_are_named(options, tmp_path):
    options.output.touch()
    with pytest.raises(DataError, match=r"out.jsonl is already there"):
        run(options)
    options.output.unlink()
    options.input.write_text("")
    with pytest.raises(DataError, match=r"in.jsonl is empty"):
        run(options)
    options.input.write_bytes(gzip.compress(b'{"messages": []}'))
    with pytest.raises(DataError, match=r"in.jsonl is compressed; unpack it first"):
        run(options)
    options.input.unlink()
    with pytest.raises(DataError, match=r"in.jsonl cannot be read: No such file"):
        run(options)


def test_parts_cover_every_line_and_are_few(tmp_path, monkeypatch):
    file = tmp_path / "in.jsonl"
    file.write_bytes(b"".join(b"%d\n" % number for number in range(1000)) + b"no newline at the end")
    for smallest, most, expected in ((64, 2000, 64), (64, 5, 201)):
        monkeypatch.setattr(job, "SMALLEST_PART", smallest)
        monkeypatch.setattr(job, "MOST_PARTS", most)
        parts = split_into_parts(file)
        assert {part.num_lines for part in parts[:-1]} == {expected}
        assert sum(part.num_lines for part in parts) == 1001
        content = file.read_bytes()
        for part in parts:
            assert content[part.start :].startswith(b"%d\n" % (part.first_line - 1)) or part.first_line == 1001
