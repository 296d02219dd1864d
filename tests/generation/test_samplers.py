"""Who draws the answers where the user has not said; the draws themselves, tests/evaluation/best_of_n shows."""

from importlib.machinery import ModuleSpec

import pytest

from hafrm_ds.errors import ModelError
from hafrm_ds.generation import samplers
from hafrm_ds.generation.samplers import choose_sampler
from hafrm_ds.saved.opening import open_model
from tests.tiny_models import save_tiny_final, save_tiny_model


def test_what_vllm_cannot_load_is_drawn_from_by_transformers(tmp_path, monkeypatch):
    plain, final = open_model(save_tiny_model(tmp_path / "plain")), open_model(save_tiny_final(tmp_path / "final"))
    assert choose_sampler("auto", plain) == "transformers"
    monkeypatch.setattr(samplers.importlib.util, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setattr(samplers.torch.cuda, "is_available", lambda: True)
    assert choose_sampler("auto", plain) == "vllm"
    assert choose_sampler("auto", final) == "transformers"
    with pytest.raises(ModelError, match=r"vLLM cannot load .*final, which has a reward head beside the policy"):
        choose_sampler("vllm", final)
