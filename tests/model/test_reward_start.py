"""Finished reward models as a start: the head is taken over, said not to be, or the model is refused."""

import pytest
import torch
import transformers

from hafrm_ds.config import ModelConfig
from hafrm_ds.errors import ModelError
from hafrm_ds.model.loading import load_hybrid_model, load_model_config
from hafrm_ds.model.reward_start import REWARD_HEAD_FILE, check_start, reward_head_of
from hafrm_ds.saved.export import export_model
from hafrm_ds.saved.folder import read_head
from tests.tiny_models import SHAPE, save_tiny_final, save_tiny_model


def save_classifier(folder, **changes):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**SHAPE | {"num_key_value_heads": 2, "num_labels": 1} | changes)
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


def start(folder, **options) -> tuple[str, ModelConfig]:
    """The warning, and the options."""
    config = ModelConfig(name_or_path=str(folder), dtype="float32", **options)
    return check_start(config, folder, load_model_config(config)), config


def load(config: ModelConfig):
    return load_hybrid_model(config, layout="padded", seed=0, device=torch.device("cpu"))


def test_a_classifier_with_tied_embeddings_gives_body_and_score(tmp_path):
    folder = save_classifier(tmp_path / "model", tie_word_embeddings=True)
    warning, config = start(folder, reward_head_init="from_model")
    assert warning == ""
    model = load(config).eval()
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([[1, 7, 9, 4]])
    states = model.causal_lm.get_decoder()(ids).last_hidden_state[:, -1]
    torch.testing.assert_close(model.reward_head(states), stock(ids).logits[:, 0])
    with pytest.raises(ModelError, match=r"whose score would be lost: set --model\.reward_head_init from_model"):
        start(folder)


def test_a_classifier_without_an_lm_head_is_refused(tmp_path):
    folder = save_classifier(tmp_path / "model", tie_word_embeddings=False)
    for init in ("normal", "from_model"):
        with pytest.raises(
            ModelError, match=r"has a score and no LM head .*\. Start from the causal LM that it was made"
        ):
            start(folder, reward_head_init=init)


def test_several_labels_are_no_reward_model(tmp_path):
    folder = save_classifier(tmp_path / "model", tie_word_embeddings=True, num_labels=2)
    with pytest.raises(ModelError, match="LlamaForSequenceClassification with 2 labels"):
        start(folder, reward_head_init="from_model")


def test_a_training_of_ours_gives_both_heads_or_says_that_it_does_not(tmp_path):
    folder = save_tiny_final(tmp_path / "final")
    warning, config = start(folder, reward_head_init="zero")
    assert "has a reward head of its own, which is not used" in warning and "from_model takes it over" in warning
    saved = read_head(folder, REWARD_HEAD_FILE)
    assert not torch.equal(load(config).reward_head.weight, saved["weight"])
    warning, config = start(folder, reward_head_init="from_model", reward_head_bias="bias" in saved)
    assert warning == "" and torch.equal(load(config).reward_head.weight, saved["weight"])


def test_a_bias_is_not_lost(tmp_path):
    folder = save_tiny_final(tmp_path / "final", bias=True)
    with pytest.raises(ModelError, match=r"has a bias: set --model\.reward_head_bias true"):
        start(folder, reward_head_init="from_model")
    _, config = start(folder, reward_head_init="from_model", reward_head_bias=True)
    assert torch.equal(load(config).reward_head.bias, read_head(folder, REWARD_HEAD_FILE)["bias"])


def test_an_earlier_export_gives_its_score(tmp_path):
    final = save_tiny_final(tmp_path / "final", pad_token="</s>")
    export_model(final, "sequence-classification", tmp_path / "export")
    head = reward_head_of(tmp_path / "export")
    torch.testing.assert_close(head["weight"].float(), read_head(final, REWARD_HEAD_FILE)["weight"].float())


def test_a_plain_causal_lm_has_no_head_to_take_over(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    assert start(folder)[0] == ""
    with pytest.raises(ModelError, match=r"has no reward head .*: set it to normal or zero"):
        start(folder, reward_head_init="from_model")


def test_an_adapter_is_no_start(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter, not a whole model: start from the final/ folder"):
        start(folder)
