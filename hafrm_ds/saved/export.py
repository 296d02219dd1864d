"""Exports: a trained model as a folder that other software loads without anything of ours.

    final/ -> HybridRewardModel -> tensors, config, tokenizer -> draft -> reopened by transformers -> folder

An export is reopened through the stock classes before it gets its name, and scores some conversations. Both sides
compute in fp32, into which bfloat16 weights go without loss: a difference is a fault of the export, not rounding.
"""

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from hafrm_ds.data.pairs import assistant, user
from hafrm_ds.durability import whole_folder
from hafrm_ds.errors import ModelError
from hafrm_ds.model.hybrid import HybridModel, tolerance_of
from hafrm_ds.model.loading import load_model_config
from hafrm_ds.model.reward_start import ATTRIBUTE_HEAD_FILE, REWARD_HEAD_FILE
from hafrm_ds.model.sizes import ModelSizes
from hafrm_ds.saved.classifier import LABEL_OFFSETS, REWARD_LABEL
from hafrm_ds.saved.folder import SavedModel
from hafrm_ds.saved.pad_token import PadToken, choose_pad_token
from hafrm_ds.saved.reward_model import HybridRewardModel
from hafrm_ds.saved.scorer import DEFAULT_MAX_TOKENS, NO_REWARD, Conversation, encode_for
from hafrm_ds.saved.tensor_files import TensorSource, publisher, tensors_of, write_sharded
from hafrm_ds.saved.writing import (
    ADAPTER_FOLDER,
    generation_config_of,
    write_beside_weights,
    write_tokenizer_and_card,
)

CONVERSATIONS: list[Conversation] = [
    [user(question), assistant(answer)]
    for question in ("Why is the sky blue?", "Write one line about rain.\nNo rhymes, please.")
    for answer in (
        "No idea.",
        "Air scatters short waves of light more than long ones; so what reaches us is blue.",
        "1 2 3",
    )
]
"""What a model and its export are compared on."""


@dataclass
class Exported:
    """What was written, for the user to read.

    pad_token: None if the tokenizer's own, or none, was left: that of a causal LM changes no log-prob.
    largest_difference: between the values of the live model and those of the reopened export, each relative to 1 + its
    size. `values` says what they are.
    """

    folder: Path
    pad_token: PadToken | None
    values: str
    largest_difference: float


def export_model(
    folder: Path, format: str, output_dir: Path, *, trust_remote_code: bool = False, trust_pickle: bool = False
) -> Exported:
    """Export the final/ folder of a training.

    Args:
        format: one of FORMATS.
        output_dir: must not exist.

    Raises:
        ModelError: the model has no such format, or the export does not give the scores of the model. DataError: its
            tokenizer is not that of its weights.
    """
    if output_dir.exists():
        raise ModelError(f"--output_dir {output_dir} is already there; choose another folder")
    saved = SavedModel.open(folder, trust_remote_code=trust_remote_code, trust_pickle=trust_pickle)
    formatter, sizes = saved.formatter(), ModelSizes.of(str(folder), load_model_config(saved.config))
    for conversation in CONVERSATIONS:  # before the weights are read
        encode_for(sizes, formatter, conversation, DEFAULT_MAX_TOKENS)
    model, attributes = saved.hybrid_model(torch.device("cpu")), saved.attributes
    live = HybridRewardModel(model, formatter, max_tokens=DEFAULT_MAX_TOKENS, attributes=attributes)
    return FORMATS[format](live, saved, output_dir)


# ---- the policy ----------------------------------------------------------------------------------------------------


def export_policy(live: HybridRewardModel, saved: SavedModel, output_dir: Path) -> Exported:
    """The causal LM alone."""
    causal_lm = live.model.causal_lm
    config, generation_config = copy.deepcopy(causal_lm.config), copy.deepcopy(generation_config_of(causal_lm))
    config.architectures = [type(causal_lm).__name__]
    num_embeddings = causal_lm.get_input_embeddings().num_embeddings
    found = choose_pad_token(live.formatter, num_embeddings)
    # One more row of the LM head would change every log-prob.
    pad = found if found.id < num_embeddings else None
    if pad is not None:
        config.pad_token_id = pad.id
        if generation_config is not None:
            generation_config.pad_token_id = pad.id
    with whole_folder(output_dir) as draft:
        write_sharded(tensors_of(causal_lm), draft, publish=publisher(causal_lm))
        metadata = saved.metadata | {"format": "policy"}
        write_beside_weights(draft, config, generation_config, padding_tokenizer(live, pad), metadata)
        expected = scores_in_fp32(live, lambda: cast(list[float], live.log_probs(CONVERSATIONS)))
        actual = stock_log_probs(draft, live, saved.config.trust_remote_code)
        difference = largest_difference(actual, expected, "log-probs", tolerance_of(live.model))
    return Exported(output_dir, pad, "log-probs", difference)


def stock_log_probs(folder: Path, live: HybridRewardModel, trust_remote_code: bool) -> list[float]:
    """Summed log-probs of the answers of CONVERSATIONS from the reopened causal LM, one after another."""
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    values = []
    for conversation in CONVERSATIONS:
        ids = rendered(tokenizer, conversation)["input_ids"]
        length = len(live.encode(conversation).responses[0])
        with torch.no_grad():
            logprobs = stock.eval()(ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        values.append(logprobs.gather(1, ids[0, 1:, None])[-length:].sum().item())
    return values


# ---- the reward model ----------------------------------------------------------------------------------------------


def export_classifier(live: HybridRewardModel, saved: SavedModel, output_dir: Path) -> Exported:
    """The body with the reward head as AutoModelForSequenceClassification: one label, whose logit is the reward. Behind
    it stand attributes, whose bias is in config.json."""
    if "reward" not in saved.heads:
        raise ModelError(f"{saved.folder}: {NO_REWARD}; export the policy")
    if live.model.reward_head.bias is not None:
        raise ModelError(
            "the reward head has a bias (model.reward_head_bias true), for which a sequence-classification model has "
            "no place: its scores would be shifted. Train with model.reward_head_bias false; a bias cancels in every "
            "pair"
        )
    causal_lm = live.model.causal_lm
    embedding = causal_lm.get_input_embeddings()
    pad = choose_pad_token(live.formatter, embedding.num_embeddings)
    config = copy.deepcopy(causal_lm.config)
    config.num_labels = 1
    if (attribute_head := live.model.attribute_head) is not None:
        config.id2label = dict(enumerate((REWARD_LABEL, *saved.attributes)))
        config.label2id = {name: place for place, name in config.id2label.items()}
        setattr(config, LABEL_OFFSETS, [0.0, *attribute_head.bias.tolist()])
    config.problem_type = "regression"  # vLLM applies a sigmoid to the score of any other
    config.pad_token_id = pad.id
    if pad.id >= embedding.num_embeddings:
        config.vocab_size = pad.id + 1
    for name, value in reward_moments(saved.metadata).items():
        setattr(config, name, value)
    stock_class = classifier_class(config)
    config.architectures = [stock_class.__name__]
    tensors = classifier_tensors(live.model, stock_class, config)
    with whole_folder(output_dir) as draft:
        write_sharded(tensors, draft, publish=publisher(causal_lm))
        metadata = saved.metadata | {"format": "sequence-classification"}
        write_beside_weights(draft, config, None, padding_tokenizer(live, pad), metadata)
        expected = scores_in_fp32(live, lambda: values_of(live))
        actual = stock_scores(draft, saved.config.trust_remote_code)
        difference = largest_difference(actual, expected * 2, "scores", tolerance_of(live.model))
    return Exported(output_dir, pad, "scores", difference)


def reward_moments(metadata: dict[str, Any]) -> dict[str, float]:
    """Mean and deviation of the reward on the first evaluation set, where there is one, as OpenRLHF names them."""
    metrics: dict[str, float] = next(iter(metadata.get("evaluation", {}).values()), {})
    return {name: metrics[f"reward/{name}"] for name in ("mean", "std") if f"reward/{name}" in metrics}


def classifier_class(config: PretrainedConfig) -> type[nn.Module]:
    """The stock class of a family; raises ModelError where transformers has none."""
    classes = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    if type(config) not in classes:
        raise ModelError(
            f"transformers has no sequence-classification model for {config.model_type}: this model has no such "
            "export. HybridRewardModel and launch/score.py score with the final/ folder"
        )
    return classes[type(config)]


def classifier_tensors(model: HybridModel, stock_class, config: PretrainedConfig) -> dict[str, TensorSource]:
    """Tensors of the export under the names of the stock class.

    Raises:
        ModelError: the stock class is not the body of the causal LM with a linear `score` on top.
    """
    with torch.device("meta"):
        stock = stock_class(config)
    score = torch.cat([head.weight for head in model.score_heads])
    available = tensors_of(model.causal_lm) | {"score.weight": TensorSource.of(score)}
    embedding = model.causal_lm.get_input_embeddings().weight
    name_of = {id(parameter): name for name, parameter in model.causal_lm.named_parameters()}
    expected = {name: source.shape for name, source in tensors_of(stock).items()}
    if expected[name_of[id(embedding)]][0] > embedding.shape[0]:
        available[name_of[id(embedding)]] = TensorSource.of(with_empty_rows(embedding, config.vocab_size))
    found = {name: source.shape for name, source in available.items() if name in expected}
    if found != expected:
        wrong = sorted(name for name in expected if found.get(name) != expected[name])
        raise ModelError(
            f"{stock_class.__name__} is not the body of {type(model.causal_lm).__name__} with a linear score: "
            f"{', '.join(wrong[:5])} have no counterpart. This model has no sequence-classification export"
        )
    return {name: available[name] for name in expected}


def with_empty_rows(embedding: Tensor, num_rows: int) -> Tensor:
    """[V, H] -> [num_rows, H]: the rows of tokens that are never read, as they are padding."""
    return torch.cat([embedding, embedding.new_zeros(num_rows - len(embedding), embedding.shape[1])])


def stock_scores(folder: Path, trust_remote_code: bool) -> list[float]:
    """Scores of CONVERSATIONS from the reopened classifier: one after another, then all in one padded batch."""
    stock = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=trust_remote_code
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    batches = [rendered(tokenizer, conversation) for conversation in CONVERSATIONS]
    batches.append(rendered(tokenizer, CONVERSATIONS, padding=True))
    with torch.no_grad():
        logits = torch.cat([stock(**batch).logits for batch in batches])
    return (logits + torch.tensor(getattr(stock.config, LABEL_OFFSETS, [0.0]))).flatten().tolist()


# ---- the adapter ---------------------------------------------------------------------------------------------------


def export_adapter(live: HybridRewardModel, saved: SavedModel, output_dir: Path) -> Exported:
    """The adapter of a LoRA training with the reward head, without the base. Reopened it is merged as the model was, so
    its scores are compared in their own dtype."""
    source = saved.folder / ADAPTER_FOLDER
    if not source.is_dir():
        raise ModelError(f"{saved.folder} has no {ADAPTER_FOLDER}/: it was not trained with adapters (model.lora.rank)")
    quantize = saved.metadata.get("config", {}).get("model", {}).get("lora", {}).get("quantize", "none")
    if quantize != "none":
        raise ModelError(
            f"{source} was trained on weights in {quantize}, and on those of its base it would score otherwise: "
            "export the policy, which is merged from the quantised weights"
        )
    with whole_folder(output_dir) as draft:
        heads = [saved.folder / name for name in (REWARD_HEAD_FILE, ATTRIBUTE_HEAD_FILE)]
        for file in (*source.iterdir(), *filter(Path.is_file, heads)):
            shutil.copyfile(file, draft / file.name)
        write_tokenizer_and_card(draft, live.formatter.tokenizer, saved.metadata | {"format": "adapter"})
        expected = values_of(live)
        tolerance = tolerance_of(live.model)
        live.model.to("meta")
        reopened = HybridRewardModel.from_pretrained(
            draft, device="cpu", trust_remote_code=saved.config.trust_remote_code
        )
        difference = largest_difference(values_of(reopened), expected, "scores", tolerance)
    return Exported(output_dir, None, "scores", difference)


# ---- what they share -----------------------------------------------------------------------------------------------


def padding_tokenizer(live: HybridRewardModel, pad: PadToken | None) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer with the pad token, or as it is."""
    tokenizer = copy.deepcopy(live.formatter.tokenizer)
    if pad is None:
        return tokenizer
    tokenizer.padding_side = "right"
    if pad.is_new:
        tokenizer.add_special_tokens({"pad_token": pad.text})
    else:
        tokenizer.pad_token = pad.text
    if tokenizer.pad_token_id != pad.id:
        raise RuntimeError(f"the pad token {pad.text!r} has the id {tokenizer.pad_token_id} instead of {pad.id}")
    return tokenizer


def rendered(tokenizer, conversations, **options):
    """Messages as whoever uses the export tokenises them: by the tokenizer's own template, without code of ours."""
    return tokenizer.apply_chat_template(conversations, return_tensors="pt", return_dict=True, **options)


def values_of(live: HybridRewardModel) -> list[float]:
    """The rewards of CONVERSATIONS, and after each the attributes."""
    return [value for values in live.rate_ids(map(live.encode, CONVERSATIONS)) for value in values]


def scores_in_fp32(live: HybridRewardModel, score: Callable[[], list[float]]) -> list[float]:
    """What `score` gives after the live model has been turned to fp32. The model is emptied then, to make room."""
    live.model.float()
    values = score()
    live.model.to("meta")
    return values


def largest_difference(actual: list[float], expected: list[float], values: str, tolerance: float) -> float:
    """Largest difference relative to 1 + the expected value; raises ModelError when it is above the tolerance."""
    ours, stock = torch.tensor(expected), torch.tensor(actual)
    difference = ((stock - ours).abs() / (1 + ours.abs())).max().item()
    if not difference <= tolerance:
        raise ModelError(
            f"the reopened export gives other {values} than the model: they differ by {difference:.3g} (tolerance "
            f"{tolerance:g}); no export was written"
        )
    return difference


FORMATS: dict[str, Callable[[HybridRewardModel, SavedModel, Path], Exported]] = {
    "policy": export_policy,
    "sequence-classification": export_classifier,
    "adapter": export_adapter,
}
