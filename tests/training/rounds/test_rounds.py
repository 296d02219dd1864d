"""What rounds refuse before anything is computed; that they run, tests/distributed/test_rounds.py shows."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.errors import DataError, ModelError
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.training.rounds import rounds
from hafrm_ds.training.rounds.options import RoundsOptions
from hafrm_ds.training.rounds.rounds import run_rounds
from tests.data.row_files import rows_of, write_lines
from tests.tiny_models import save_tiny_final, save_tiny_model

TRAIN_SCRIPT = Path("launch/train.py")


def run(folder: Path, model: Path, **changes: str) -> None:
    given = {
        "output_dir": str(folder / "out"),
        "model.name_or_path": str(model),
        "data.train": str(folder / "train.jsonl"),
        "data.eval": str(folder / "test.jsonl"),
        "rounds.prompts": str(folder / "prompts.jsonl"),
        "rounds.evaluation_prompts": str(folder / "held.jsonl"),
    } | {name.replace("__", "."): value for name, value in changes.items()}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    options = load_config(words, RoundsOptions)
    run_rounds(options, TRAIN_SCRIPT, Processes(rank=0, local_rank=0, world_size=1, store=dist.HashStore()))


@pytest.fixture
def folder(tmp_path):
    for name, word in (("prompts", "a"), ("held", "b")):
        write_lines(tmp_path / f"{name}.jsonl", [{"prompt": f"{word} {n}"} for n in range(4)])
    for name in ("train", "test"):
        write_lines(tmp_path / f"{name}.jsonl", rows_of(4))
    return tmp_path


def test_a_model_without_a_trained_head_cannot_rank_its_own_answers(folder):
    model = save_tiny_model(folder / "plain")
    with pytest.raises(ModelError, match="plain has no reward head that was trained, and ranks its own answers"):
        run(folder, model)
    dpo = save_tiny_final(folder / "dpo", objective={"rm_weight": 0.0})
    with pytest.raises(ModelError, match="dpo has no reward head that was trained"):
        run(folder, dpo)
    assert not (folder / "out" / "round-0").exists()


def test_an_implicit_reward_needs_to_know_what_the_start_was_trained_from(folder):
    final = save_tiny_final(folder / "final")
    metadata = json.loads((final / "hafrm.json").read_text())
    del metadata["base"]
    (final / "hafrm.json").write_text(json.dumps(metadata))
    with pytest.raises(ModelError, match="does not say what it was trained from, so its implicit reward has no ref"):
        run(folder, final, rounds__judge="implicit")


def test_the_combined_judge_needs_pairs_that_each_round_can_fit_it_on(folder):
    final = save_tiny_final(folder / "final", base=save_tiny_model(folder / "base", "llama-tied"))
    with pytest.raises(DataError, match=r"of the first set of data\.eval, \w+, 4 pairs of 4 prompts are too few"):
        run(folder, final, rounds__judge="combined")
    write_lines(folder / "test.jsonl", rows_of(60))
    with pytest.raises(ModelError, match=r"has no combined judge: .* holds no fit of it"):
        run(folder, final, rounds__judge="combined")
    assert not (folder / "out").exists()


def test_a_start_that_is_a_revision_is_one_folder_for_all_that_open_it(folder, monkeypatch):
    final, opened = save_tiny_final(folder / "final"), []

    def fetched(config):
        assert config.revision == "v2"
        return final

    def see(self):
        opened.append((self.model(0), self.config_of(1).model, rounds.rewards_of(self.options)["reward"]["model"]))

    monkeypatch.setattr(rounds, "local_folder", fetched)
    monkeypatch.setattr(rounds.Rounds, "run", see)
    run(folder, Path("example/tiny"), model__revision="v2")
    [[sampled, trained, judge]] = opened
    assert sampled == trained.name_or_path == str(judge) == str(final) and trained.revision is None


def test_a_prompt_that_is_held_out_is_refused_before_the_folder_is_claimed(folder):
    write_lines(folder / "test.jsonl", [{"prompt": "a 2", "chosen": "x", "rejected": "y"}])
    with pytest.raises(DataError, match=r"1 of 4 prompts are trained on and measured: rounds\.prompts \(.*:3\)"):
        run(folder, save_tiny_final(folder / "final"))
    assert not (folder / "out").exists()


def test_rounds_resume_with_other_costs_alone_and_name_any_other_option(folder, monkeypatch):
    model = save_tiny_final(folder / "final")
    monkeypatch.setattr(rounds, "starter", lambda *_: pytest.raises(RuntimeError))  # stops where the rounds begin
    monkeypatch.setattr(rounds.Rounds, "run", lambda self: (_ for _ in ()).throw(RuntimeError))
    run(folder, model)
    run(folder, model, checkpoint__every_steps="3", rounds__num_rounds="5", data__num_proc="2")
    with pytest.raises(DataError, match=r"holds rounds with other options: rounds\.num_candidates: 4 there, 6 here"):
        run(folder, model, rounds__num_candidates="6")
    write_lines(folder / "held.jsonl", [{"prompt": "b"}])
    with pytest.raises(DataError, match="holds parts of a job with another model, input or setting"):
        run(folder, model)


def test_a_head_that_gets_no_gradient_is_warned_of(folder, monkeypatch, capsys):
    monkeypatch.setattr(rounds, "starter", lambda *_: pytest.raises(RuntimeError))
    monkeypatch.setattr(rounds.Rounds, "run", lambda self: (_ for _ in ()).throw(RuntimeError))
    run(folder, save_tiny_final(folder / "final"), rounds__replay="0")
    assert "the body moves under a head that gets no gradient" in " ".join(capsys.readouterr().out.split())
