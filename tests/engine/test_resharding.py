"""The files of a checkpoint, read without DeepSpeed's loader."""

from pathlib import Path

import pytest
import torch

from hafrm_ds.engine.checkpoint import CheckpointError
from hafrm_ds.engine.resharding import read, trained_weights


class Intruder:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_no_code_in_a_pickle_is_run(tmp_path):
    name = "causal_lm.model.norm.weight"
    file = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": {name: torch.ones(3)}}, file)
    assert torch.equal(trained_weights(tmp_path, 2, 2)[name], torch.ones(3))
    torch.save({"module": {name: torch.ones(3)}, "more": Intruder(tmp_path / "made")}, file)
    with pytest.raises(CheckpointError, match=r"model_states.pt holds something that DeepSpeed does not write"):
        trained_weights(tmp_path, 2, 2)
    assert not (tmp_path / "made").exists()


class ByName:
    """Is pickled as Python 3.11.0 to 3.11.3 do it with a member of an enum."""

    def __init__(self, kind: type, name: str):
        self.kind, self.name = kind, name

    def __reduce__(self):
        return getattr, (self.kind, self.name)


def test_a_stage_is_read_whichever_python_has_written_it(tmp_path):
    from deepspeed.runtime.zero.config import ZeroStageEnum

    file = tmp_path / "mp_rank_00_model_states.pt"
    for stage in (ZeroStageEnum.weights, ByName(ZeroStageEnum, "weights")):
        torch.save({"module": {}, "stage": stage}, file)
        assert read(tmp_path, file.name)["stage"] == 3
    torch.save({"module": {}, "stage": ByName(Path, "touch")}, file)
    with pytest.raises(CheckpointError, match="DeepSpeed does not write"):
        read(tmp_path, file.name)
