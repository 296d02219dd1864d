"""Which checkpoint a run resumes from, and what it refuses."""

import json
import re
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from hafrm_ds.config import TrainConfig, defaults_of, options_of
from hafrm_ds.data.content_keys import KEY_DTYPE
from hafrm_ds.data.prepared import fingerprint
from hafrm_ds.engine.checkpoint import CheckpointError, UnreadableError
from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.training import resume
from hafrm_ds.training.logging import truncate_rows
from hafrm_ds.training.resume import ResumePoint, changed_options, find_resume_point
from tests.engine.test_checkpoint import flip_a_byte, lose_a_file, save, state_at, truncate


class Log:
    def __init__(self):
        self.warnings = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def config_of(folder: Path, **changes):
    options = {"output_dir": folder, "model.name_or_path": "m", "data.train": "a.jsonl", "resume": "auto"}
    options |= {name.replace("__", "."): value for name, value in changes.items()}
    return load_config([word for name, value in options.items() for word in (f"--{name}", str(value))])


@pytest.fixture
def find(tmp_path, monkeypatch):
    """Looks for a resume point as one process; gives (point or None, warnings)."""
    monkeypatch.setattr(ResumePoint, "check_config", lambda self, config: None)

    def look(**changes) -> tuple[ResumePoint | None, list[str]]:
        log = Log()
        return find_resume_point(
            config_of(tmp_path, **changes), Processes(0, 0, 1, dist.HashStore()), log
        ), log.warnings

    return look


def test_auto_starts_when_there_is_nothing(find):
    assert find() == (None, [])


def test_auto_takes_the_newest_whole_one_and_says_why_it_passed_over_others(find, tmp_path):
    for step in (10, 20, 30):
        save(tmp_path / "checkpoints", step)
    flip_a_byte(tmp_path / "checkpoints/step-000030")
    truncate(tmp_path / "checkpoints/step-000020")
    point, warnings = find()
    assert point.state.step == 10
    assert "step-000030 is passed over: deepspeed/part.pt does not have the checksum" in warnings[0]
    assert "step-000020 is passed over: deepspeed/part.pt has" in warnings[1]


def test_auto_does_not_start_anew_over_checkpoints_of_which_none_is_whole(find, tmp_path):
    truncate(save(tmp_path / "checkpoints", 10))
    with pytest.raises(CheckpointError, match=r"none of the checkpoints in .*checkpoints, .* Give --resume PATH of"):
        find()
    (tmp_path / "checkpoints/step-000010").rename(tmp_path / "away")
    assert find() == (None, [])


READ_MANIFEST = resume.read_manifest


@pytest.fixture
def find_on_two_ranks(find, tmp_path, monkeypatch):
    """Looks for a resume point as two ranks, the second of which has another disk under the path of the checkpoints;
    gives what each finds or raises."""

    def look(disk_of_second: Path, **changes) -> list[ResumePoint | CheckpointError | None]:
        store = dist.HashStore()

        def of_rank(rank: int) -> ResumePoint | CheckpointError | None:
            try:
                return find_resume_point(config_of(tmp_path, **changes), Processes(rank, rank, 2, store), Log())
            except CheckpointError as error:
                return error

        def read_manifest(folder: Path):
            is_second = threading.current_thread() is second
            return READ_MANIFEST(disk_of_second / folder.relative_to(tmp_path) if is_second else folder)

        monkeypatch.setattr(resume, "read_manifest", read_manifest)
        found = []
        second = threading.Thread(target=lambda: found.append(of_rank(1)))
        second.start()
        found.insert(0, of_rank(0))
        second.join()
        return found

    return look


@pytest.mark.parametrize("asked", ["auto", "checkpoints/step-000020"])
def test_a_checkpoint_that_only_another_rank_cannot_read_is_refused_on_all(find_on_two_ranks, tmp_path, asked):
    for step in (10, 20):
        save(tmp_path / "checkpoints", step)
    for error in find_on_two_ranks(tmp_path / "not mounted", resume=asked if asked == "auto" else tmp_path / asked):
        assert isinstance(error, CheckpointError)
        assert re.search(
            r"step-000020 cannot be resumed: rank 0 finds it whole, but rank 1 cannot read it: its manifest.json "
            r"cannot be read: No such file or directory. Nothing was changed. All hosts must share the disk",
            str(error),
        )


def test_a_file_that_no_rank_can_read_is_passed_over(find_on_two_ranks, tmp_path):
    for step in (10, 20):
        save(tmp_path / "checkpoints", step)
    lose_a_file(tmp_path / "checkpoints/step-000020")
    assert [point.state.step for point in find_on_two_ranks(tmp_path)] == [10, 10]


def test_a_share_that_cannot_be_read_by_anyone_is_damage(find_on_two_ranks, tmp_path, monkeypatch):
    """A sector of the disk is bad, in what the second rank reads."""
    for step in (10, 20):
        save(tmp_path / "checkpoints", step)

    def damaged_file(folder: Path, files, rank: int, world_size: int) -> None:
        if (rank, folder.name) == (1, "step-000020"):
            raise UnreadableError("part.pt cannot be read: Input/output error")

    monkeypatch.setattr(resume, "damaged_file", damaged_file)
    assert [point.state.step for point in find_on_two_ranks(tmp_path)] == [10, 10]


def test_a_path_is_taken_or_refused_but_never_replaced(find, tmp_path):
    for step in (10, 20):
        save(tmp_path / "checkpoints", step)
    assert find(resume=tmp_path / "checkpoints/step-000010")[0].state.step == 10
    assert find(resume=tmp_path / "checkpoints/latest")[0].state.step == 20
    truncate(tmp_path / "checkpoints/step-000020")
    with pytest.raises(CheckpointError, match=r"step-000020 cannot be resumed: .* bytes instead of"):
        find(resume=tmp_path / "checkpoints/latest")
    with pytest.raises(CheckpointError, match=r"none cannot be resumed: its manifest.json cannot be read"):
        find(resume=tmp_path / "none")


def point_of(config, **state) -> ResumePoint:
    saved = replace(state_at(5), config=config.model_dump(mode="json"), **state)
    return ResumePoint(Path("step-000005"), saved, tuple(config.checkpoint.allow_changed))


def test_options_that_differ_are_named(tmp_path):
    point = point_of(config_of(tmp_path))
    changed = config_of(tmp_path, seed=3, optimizer__learning_rate=1e-4, data__max_length=512)
    with pytest.raises(CheckpointError) as error:
        point.check_config(changed)
    assert "  - seed: 0 there, 3 here" in str(error.value)
    assert "  - optimizer.learning_rate: 1e-05 there, 0.0001 here" in str(error.value)
    assert "--checkpoint.allow_changed '[data.max_length, optimizer.learning_rate, seed]'" in str(error.value)


def test_options_of_a_section_inside_a_section_are_named_too(tmp_path):
    point = point_of(config_of(tmp_path, model__lora__rank=8))
    changed = config_of(tmp_path, model__lora__rank=8, model__lora__alpha=32)
    with pytest.raises(CheckpointError, match=r"\n  - model.lora.alpha: 16.0 there, 32.0 here\n") as error:
        point.check_config(changed)
    assert "--checkpoint.allow_changed '[model.lora.alpha]'" in str(error.value)
    replace(point, allow_changed=("model.lora.alpha",)).check_config(changed)


def test_options_are_allowed_to_change_by_name(tmp_path):
    changed = config_of(tmp_path, seed=3, optimizer__learning_rate=1e-4)
    allowing = replace(point_of(config_of(tmp_path)), allow_changed=("seed", "optimizer.learning_rate"))
    allowing.check_config(changed)
    with pytest.raises(CheckpointError, match=r"\n  - optimizer.learning_rate: (?!.*seed)"):
        replace(allowing, allow_changed=("seed",)).check_config(changed)


def test_what_changes_no_number_may_change(tmp_path):
    point_of(config_of(tmp_path)).check_config(
        config_of(
            tmp_path / "elsewhere",
            deepspeed="ds_configs/zero1.json",
            checkpoint__every_steps=7,
            logging__every_steps=3,
            batch__max_tokens_per_micro_batch=4096,
            data__train="moved.jsonl",
            model__name_or_path="moved",
            model__revision="main",
            reference__store="moved",
        )
    )


def test_a_checkpoint_from_before_an_option_was_there_has_its_default(tmp_path):
    point = point_of(config_of(tmp_path))
    for name in ("policy_share", "policy_share_every"):
        del point.state.config["objective"][name]
    del point.state.config["logging"]["gradient_shares_every"]
    point.check_config(config_of(tmp_path))
    changed = config_of(tmp_path, objective__policy_share=0.5)
    with pytest.raises(
        CheckpointError, match=r"alpha: 0.2 there, null here\n  - objective.policy_share: null there, 0.5"
    ):
        point.check_config(changed)


def test_what_auto_left_open_is_decided_as_it_was(tmp_path):
    point = point_of(config_of(tmp_path, batch__layout="packed", batch__max_tokens_per_micro_batch=2048))
    asked = config_of(tmp_path, batch__layout="auto", batch__max_tokens_per_micro_batch="auto")
    settled = point.settle(asked)
    assert (settled.batch.layout, settled.batch.max_tokens_per_micro_batch) == ("packed", 2048)
    point.check_config(asked)
    given = config_of(tmp_path, batch__layout="packed", batch__max_tokens_per_micro_batch=4096)
    assert point.settle(given) == given
    with pytest.raises(CheckpointError, match=r'batch.layout: "packed" there, "padded" here'):
        point.check_config(config_of(tmp_path, batch__layout="padded"))


def test_other_pairs_and_other_reference_weights_are_refused(tmp_path):
    point = point_of(config_of(tmp_path), data={"train": "a", "eval held_out": "b"}, reference="n")
    point.check_content({"train": "a", "eval held_out": "b"}, "n")
    with pytest.raises(CheckpointError, match=r"data.train: the pairs of 'train' have changed"):
        point.check_content({"train": "z", "eval held_out": "b"}, "n")
    with pytest.raises(CheckpointError, match=r"data.eval: the pairs of 'eval held_out' have changed"):
        point.check_content({"train": "a"}, "n")
    with pytest.raises(CheckpointError, match=r"model.name_or_path: .* of m here, of n there"):
        point.check_content({"train": "a", "eval held_out": "b"}, "m")
    replace(point, allow_changed=("data.train",)).check_content({"train": "z", "eval held_out": "b"}, "n")


@pytest.mark.parametrize(("saved", "current"), [(0, 3), (2, 0)])
def test_stage_0_is_refused_by_name(tmp_path, saved, current):
    point = point_of(config_of(tmp_path), zero_stage=saved)
    with pytest.raises(CheckpointError, match=f"ZeRO stage {saved}, and this run has stage {current}"):
        point.check_stage(current)
    point.check_stage(saved)


def test_an_unknown_option_cannot_be_allowed(tmp_path):
    with pytest.raises(Exception, match=r"checkpoint.allow_changed .*'optimizer.lr'"):
        config_of(tmp_path, checkpoint__allow_changed="[optimizer.lr]")


def test_the_fingerprint_of_pairs_knows_their_order_margins_and_losses():
    def print_of(order: list[int], margins: list[float | None], trains_reward: tuple[bool, bool] = (True, True)) -> str:
        keys = np.zeros((len(order), 2), KEY_DTYPE)
        keys["low"] = np.array([order, order]).T
        number = len(order)
        ones = np.ones(number, dtype=np.float32)
        places = {"better": np.zeros(number, np.int32), "worse": np.ones(number, np.int32)}
        sizes = {"num_responses": np.full(number, 2), "num_comparisons": np.full(number, 1)}
        known = {
            "keys": keys.reshape(-1),
            "margin": np.array(margins, dtype=np.float32),
            "target": ones,
            "weight": ones,
            "trains_reward": np.array(trains_reward),
        }
        return fingerprint(sizes | places | known, {})

    prints = [
        print_of(*given)
        for given in (([1, 2], [None, None]), ([1, 2], [None, None]), ([2, 1], [None, None]), ([1, 2], [None, 0.5]))
    ]
    prints += [print_of([1, 2], [None, None], each) for each in ((True, False), (False, True))]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 5


@pytest.mark.parametrize(
    ("step", "is_due", "left"),
    [
        (0, False, []),
        (2, False, ["0 eval", "1 train", "2 train", "2 eval"]),
        (2, True, ["0 eval", "1 train", "2 train"]),
        (3, False, ["0 eval", "1 train", "2 train", "2 eval", "3 train"]),
    ],
)
def test_rows_after_a_step_are_truncated(tmp_path, step, is_due, left):
    file = tmp_path / "metrics.jsonl"
    names = ["0 eval", "1 train", "2 train", "2 eval", "3 train"]
    rows = [json.dumps({"step": int(name[0]), "kind": name[2:]}) + "\n" for name in names]
    file.write_text("".join(rows) + '{"step": 4, "ki')
    truncate_rows(file, step, is_due)
    assert [f"{row['step']} {row['kind']}" for row in map(json.loads, file.read_text().splitlines())] == left


def options_with(**objective: object) -> dict:
    made = TrainConfig(output_dir="run", model={"name_or_path": "m"}, data={"train": "t.jsonl"}, objective=objective)
    return made.model_dump(mode="json")


def test_defaults_are_those_of_a_configuration_without_options():
    given = {"output_dir", "model.name_or_path", "data.train"}
    found = {name: value for name, value in options_of(options_with()) if name not in given}
    assert dict(defaults_of(TrainConfig)) == found


@pytest.mark.parametrize("name", ["ranking_loss", "normalize_by", "policy_share_every"])
def test_an_option_that_an_older_checkpoint_does_not_know_had_its_default(name):
    saved = options_with()
    del saved["objective"][name]
    assert changed_options(saved, options_with()) == {}


def test_a_younger_option_that_is_not_left_at_its_default_has_changed():
    saved = options_with()
    del saved["objective"]["ranking_loss"]
    changed = changed_options(saved, options_with(ranking_loss="best"))
    assert changed == {"objective.ranking_loss": 'objective.ranking_loss: "pairwise" there, "best" here'}
