"""The same weights and the same conversations through TRL's trainers: equal token ids, log-probs, losses, gradients."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hafrm_ds.data.comparisons import Comparisons
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.packing import lay_out
from hafrm_ds.data.pairs import Comparison
from hafrm_ds.model.hybrid import HybridModel, disable_dropout, make_reward_head
from hafrm_ds.objective import bradley_terry_loss, centering_penalty, dpo_loss, hinge_loss
from tests.tiny_models import tiny_causal_lm, use_layout
from tests.tiny_tokenizers import byte_level_tokenizer, tokenize_pair

trl = pytest.importorskip("trl")

BETA = 0.1
TOLERANCE = {"rtol": 0, "atol": 1e-4}


def pair(question: str, chosen: str, rejected: str, margin: float = 0.0) -> dict:
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "margin": margin,
    }


PAIRS = [
    pair("Why?", " Because.", " It rains, and nobody knows why.", 0.5),
    pair("How are you?", "Fine", "Fine, thank you", 1.0),
    pair("Name a colour.", "Blue is one.", " No", -0.25),  # only one answer merges with the end of the prompt
]
COMPARISONS = Comparisons.of([(2, [Comparison(0, 1, row["margin"])]) for row in PAIRS])


@pytest.fixture(scope="module")
def tokenizer():
    """A pad token that ends no text; one token that crosses from the template's `assistant:` into an answer."""
    return byte_level_tokenizer(merges=((":", "Ġ"),), pad_token="<pad>")


@pytest.fixture(scope="module")
def pair_ids(tokenizer):
    formatter = ChatFormatter.create(tokenizer, None, "2024-07-26")
    outcomes = [tokenize_pair(formatter, row["prompt"], row["chosen"], row["rejected"], 512, "drop") for row in PAIRS]
    assert not any(outcome.outcome for outcome in outcomes)
    return [outcome.ids for outcome in outcomes]


@pytest.fixture(scope="module")
def folders(tokenizer, tmp_path_factory):
    """A policy and a reference of other weights, saved as a user would find them."""
    paths = []
    for seed, name in enumerate(("policy", "reference")):
        path = tmp_path_factory.mktemp(name)
        tiny_causal_lm("llama", seed, vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(path)
        tokenizer.save_pretrained(path)
        paths.append(path)
    return paths


def hybrid(folder) -> HybridModel:
    causal_lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    disable_dropout(causal_lm)
    model = HybridModel(causal_lm, make_reward_head(32, bias=False, init="normal", dtype=torch.float32, seed=0))
    use_layout(model, "shared_prefix")
    return model


def batch_of(pair_ids):
    return lay_out(pair_ids, "shared_prefix")


def arguments(folder) -> dict:
    return {
        "output_dir": str(folder),
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": len(PAIRS),
    }


def collated(trainer) -> dict:
    return trainer.data_collator(list(trainer.train_dataset))


@pytest.fixture
def make_reward_trainer(folders, tokenizer, tmp_path):
    def make(rows: list[dict], **options):
        classifier = AutoModelForSequenceClassification.from_pretrained(folders[0], num_labels=1, dtype=torch.float32)
        with torch.no_grad():
            classifier.score.weight.copy_(hybrid(folders[0]).reward_head.weight)
        return trl.RewardTrainer(
            classifier,
            trl.RewardConfig(**arguments(tmp_path), **options),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )

    return make


@pytest.fixture(scope="module")
def dpo_trainer(folders, tokenizer, tmp_path_factory):
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders)
    return trl.DPOTrainer(
        policy,
        reference,
        trl.DPOConfig(**arguments(tmp_path_factory.mktemp("dpo")), beta=BETA),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )


def test_the_pairs_test_the_boundary(pair_ids, tokenizer):
    """In the pairs with a leading space the answer takes the last character of the rendered prompt with it."""
    assert [tokenizer.decode(ids.prompt)[-1] for ids in pair_ids] == ["t", ":", "t"]


def test_reward_trainer_scores_the_same_ids(make_reward_trainer, pair_ids):
    dataset = make_reward_trainer(PAIRS).train_dataset
    assert list(dataset["chosen_ids"]) == [ids.prompt + ids.responses[0] for ids in pair_ids]
    assert list(dataset["rejected_ids"]) == [ids.prompt + ids.responses[1] for ids in pair_ids]


def test_dpo_trainer_splits_at_the_same_token(dpo_trainer, pair_ids):
    dataset = dpo_trainer.train_dataset
    assert list(dataset["prompt_ids"]) == [ids.prompt for ids in pair_ids]
    assert list(dataset["chosen_ids"]) == [ids.responses[0] for ids in pair_ids]
    assert list(dataset["rejected_ids"]) == [ids.responses[1] for ids in pair_ids]


def assert_same_gradients(ours: HybridModel, theirs: torch.nn.Module) -> None:
    """Of every parameter that TRL's model has, relative to the largest entry of all."""
    expected = {name.replace("score.", "reward_head."): p.grad for name, p in theirs.named_parameters()}
    actual = {name.removeprefix("causal_lm."): p.grad for name, p in ours.named_parameters()}
    scale = max(gradient.abs().max().item() for gradient in expected.values())
    assert scale > 1e-3
    for name, gradient in expected.items():
        assert (actual[name] - gradient).abs().max().item() <= 1e-4 * scale, name


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "margin and centering"])
def test_bradley_terry_loss(make_reward_trainer, folders, pair_ids, extras):
    rows = PAIRS if extras else [{key: value for key, value in row.items() if key != "margin"} for row in PAIRS]
    trainer = make_reward_trainer(rows, center_rewards_coefficient=0.01 if extras else None)
    theirs = trainer.compute_loss(trainer.model, collated(trainer))
    theirs.backward()

    model = hybrid(folders[0])
    reward = model(batch_of(pair_ids), with_logprob=False).reward
    per_pair = bradley_terry_loss(reward, COMPARISONS, use_margin=extras, label_smoothing=0.0)
    ours = (per_pair + 0.01 * centering_penalty(reward, COMPARISONS) if extras else per_pair).mean()
    ours.backward()
    assert abs(ours.item() - math.log(2)) > 1e-3
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    assert_same_gradients(model, trainer.model)


def test_summed_logprobs(dpo_trainer, folders, pair_ids):
    batch = collated(dpo_trainer)
    for folder, model in zip(folders, (dpo_trainer.model, dpo_trainer.ref_model), strict=True):
        theirs = torch.stack(dpo_trainer.compute_ref_log_probs(model, batch), dim=1).flatten()
        with torch.no_grad():
            ours = hybrid(folder)(batch_of(pair_ids), with_reward=False).logprob
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


@pytest.mark.parametrize(("name", "loss"), [("sigmoid", dpo_loss), ("hinge", hinge_loss)])
def test_policy_losses(dpo_trainer, folders, pair_ids, name, loss):
    dpo_trainer.loss_types = [name]
    dpo_trainer.model.zero_grad()
    theirs = dpo_trainer.compute_loss(dpo_trainer.model, collated(dpo_trainer))
    theirs.backward()

    model, batch = hybrid(folders[0]), batch_of(pair_ids)
    with torch.no_grad():
        reference = hybrid(folders[1])(batch, with_reward=False).logprob
    ours = loss(model(batch, with_reward=False).logprob, reference, COMPARISONS, beta=BETA).mean()
    ours.backward()
    assert abs(ours.item() - loss(reference, reference, COMPARISONS, beta=BETA).mean().item()) > 1e-3
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    assert_same_gradients(model, dpo_trainer.model)
