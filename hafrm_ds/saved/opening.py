"""Any model that scores: what lies in a folder, what it was trained from, and the scorer for it."""

import json
from pathlib import Path
from typing import Any, Literal

import torch

from hafrm_ds.config import ModelConfig
from hafrm_ds.errors import ModelError
from hafrm_ds.hardware.devices import refuse_untried
from hafrm_ds.model.loading import load_model_config, load_tokenizer, local_folder
from hafrm_ds.objective import JudgeFit
from hafrm_ds.processes.parts import stamp
from hafrm_ds.saved.classifier import ClassifierModel, SavedClassifier
from hafrm_ds.saved.folder import SavedModel, refuse_pickles, refuse_run_folder
from hafrm_ds.saved.implicit import CombinedRewardModel, ImplicitRewardModel, SavedCombinedReward, SavedImplicitReward
from hafrm_ds.saved.policy import PolicyModel, SavedPolicy
from hafrm_ds.saved.reward_model import HybridRewardModel
from hafrm_ds.saved.scorer import DEFAULT_MAX_TOKENS, NO_REWARD, Scorer
from hafrm_ds.saved.writing import METADATA_FILE

Saved = SavedModel | SavedClassifier | SavedPolicy
SavedScorer = Saved | SavedImplicitReward
"""What `load_scorer` takes."""
SCORERS: dict[type, type[Scorer]] = {
    SavedModel: HybridRewardModel,
    SavedClassifier: ClassifierModel,
    SavedPolicy: PolicyModel,
    SavedImplicitReward: ImplicitRewardModel,
    SavedCombinedReward: CombinedRewardModel,
}
KINDS: tuple[tuple[str, type[SavedClassifier] | type[SavedPolicy]], ...] = (
    ("ForSequenceClassification", SavedClassifier),
    ("ForCausalLM", SavedPolicy),
    ("LMHeadModel", SavedPolicy),  # GPT-2
)
"""How the name of an architecture ends, and what it is."""
Judge = Literal["reward", "implicit", "combined"]
"""What scores: the reward head, the implicit reward of the policy, or both as one."""
BASE = "base"
"""As --reference: the weights that the training started from, as hafrm.json names them."""
DEFAULT_BETA = 0.1
"""Where the model does not say what it was trained with."""


def open_model(
    name_or_path: str | Path,
    *,
    dtype: str | None = None,
    chat_template: str | None = None,
    reasoning: str | None = None,
    trust_remote_code: bool = False,
    trust_pickle: bool = False,
) -> Saved:
    """Look at a model without loading its weights: the final/ folder of a training or an export of its adapter, a
    sequence-classification model with one label, or a causal LM.

    Args:
        name_or_path: a folder or a hub id.
        dtype: "bfloat16" or "float32". Default: that of the saved weights.
        chat_template: name or file of a template for a tokenizer without one; a training's own model has one.
        reasoning: "drop" takes it out of answers before they are rendered; a training's own model does as trained.

    Raises:
        ModelError: it is none of these, or cannot be used.
    """
    folder = local_folder(ModelConfig(name_or_path=str(name_or_path), trust_remote_code=trust_remote_code))
    metadata = read_json(folder / METADATA_FILE)
    if metadata.get("format") in ("hybrid", "adapter"):
        return SavedModel.open(folder, dtype=dtype, trust_pickle=trust_pickle, trust_remote_code=trust_remote_code)
    refuse_run_folder(folder)
    architectures = read_json(folder / "config.json").get("architectures") or [""]
    for ending, kind in KINDS:
        if architectures[0].endswith(ending):
            refuse_pickles(folder, trust_pickle)
            options = {"name_or_path": str(folder), "trust_remote_code": trust_remote_code}
            return kind.open(folder, options, dtype, metadata, chat_template, reasoning)
    raise ModelError(
        f"{folder} is no model that scores: it is neither the final/ folder of a training ({METADATA_FILE}) nor does "
        f"its config.json name a ...ForSequenceClassification or ...ForCausalLM (it names {architectures[0] or 'none'})"
        ". Of a checkpoint launch/export.py --format hybrid makes a folder like final/"
    )


def open_reward_model(
    name_or_path: str | Path, *, judge: Judge | None = None, reference: str | None = None, **loading: Any
) -> SavedScorer:
    """Look at a model that gives a reward.

    Args:
        judge: what gives it. Default: the reward head, and without one the implicit reward of the policy.
        reference: for the implicit reward and the combined judge, what the policy is measured against: a folder, a hub
            id or "base". Default: "base", if the model says what that is.
        loading: as for `open_model`.

    Raises:
        ModelError: it does not have this reward, or is scored by its reward head and given a reference.
    """
    saved = open_model(name_or_path, **loading)
    has_head = "reward" in saved.heads
    if judge == "reward" or (judge is None and has_head):
        if not has_head:
            raise ModelError(f"{name_or_path}: {NO_REWARD}; leave out --judge, or give --judge implicit")
        if reference is not None:
            raise ModelError(
                f"{name_or_path} has a reward head, which scores without a reference; leave it out, or give --judge "
                "combined or implicit"
            )
        return saved
    fit = judge_of(saved) if judge == "combined" else None
    if reference is None and not has_head and base_of(saved) is None:
        raise ModelError(f"{name_or_path}: {NO_REWARD}; give --reference")
    against = open_reference(reference or BASE, saved, **loading)
    assert not isinstance(saved, SavedClassifier)  # it has no policy to measure
    if fit is not None:
        return SavedCombinedReward(saved, against, fit.beta, fit)
    return SavedImplicitReward(saved, against, trained_beta(saved))


def load_judge(
    name_or_path: str | Path,
    judge: Judge | None = None,
    *,
    reference: str | None = None,
    device: torch.device | str | None = None,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    **loading: Any,
) -> Scorer:
    """Load any model that gives a reward, with the reference that it is measured against beside it, to score
    conversations (`Scorer.score`). Arguments and errors as for `open_reward_model`, and

    Args:
        device: default: the GPU if there is one.
        max_tokens: of one forward pass.
    """
    saved = open_reward_model(name_or_path, judge=judge, reference=reference, **loading)
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    refuse_untried(chosen)
    return load_scorer(saved, chosen, max_tokens)


def judge_of(saved: Saved) -> JudgeFit:
    """What either head of a model counts in the combined judge.

    Raises:
        ModelError: it does not have both heads, or no fit has been saved with it.
    """
    check_both_heads(saved)
    content, file = saved.metadata.get("judge"), saved.folder / METADATA_FILE
    if content is None:
        raise ModelError(
            f"{saved.folder} has no combined judge: {file} holds no fit of it. launch/evaluate.py --fit_judge SOURCE "
            "--save_judge true makes one, of pairs that you do not test on; a training does by itself where the first "
            "set of its data.eval has enough pairs"
        )
    try:
        return JudgeFit.from_json(content)
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"the combined judge in {file} cannot be read: {error!r}. launch/evaluate.py --fit_judge SOURCE "
            "--save_judge true puts another in its place"
        ) from error


def check_both_heads(saved: Saved) -> None:
    """Raises ModelError unless a model has a reward head and a policy, which judge together."""
    for head, name in (("reward", "trained reward head"), ("logprob", "LM head")):
        if head not in saved.heads:
            raise ModelError(f"{saved.folder} has no combined judge, which takes two heads: it has no {name}")


def open_reference(name: str, saved: Saved, **loading: Any) -> SavedPolicy:
    """The reference policy of a model, which sees the model's tokens in the model's layout.

    The final/ of a training, from which another one started, is one too: its reward head is left where it lies.

    Args:
        name: a folder, a hub id or "base". loading: as for `open_model`; the dtype is that of the model.

    Raises:
        ModelError: it is no causal LM of the same architecture and vocabulary, or the model has no policy or does not
            say what it started from.
    """
    if "logprob" not in saved.heads:
        raise ModelError(f"{saved.folder} has no LM head, so no implicit reward that needs a --reference")
    if name == BASE:
        name = base_of(saved) or ""
        if not name:
            raise ModelError(f"{saved.folder} does not say what it was trained from; give --reference a model")
    try:
        reference = open_model(name, **loading | {"dtype": saved.config.dtype})
    except ModelError as error:
        raise ModelError(f"the reference of {saved.folder} cannot be used (--reference): {error}") from error
    if isinstance(reference, SavedModel) and reference.metadata["format"] == "hybrid":
        reference = SavedPolicy(reference.folder, reference.config, {}, None)
    if not isinstance(reference, SavedPolicy):
        raise ModelError(f"--reference {name} is no causal LM with weights of its own")
    check_comparable(saved, reference)
    known: dict[str, Any] = {
        key: saved.metadata[key] for key in ("layout", "uses_stock_logits") if key in saved.metadata
    }
    return SavedPolicy(reference.folder, reference.config, known, reference.chat_template, reference.reasoning)


def check_comparable(saved: Saved, reference: SavedPolicy) -> None:
    """Raises ModelError if the reference would take the tokens of the model for others, or its layout is of another
    kind of network."""
    kinds = [load_model_config(each.config).model_type for each in (saved, reference)]
    if kinds[0] != kinds[1]:
        raise ModelError(
            f"--reference {reference.folder} is a {kinds[1]} model, {saved.folder} a {kinds[0]} model; an implicit "
            "reward needs a reference of the same architecture"
        )
    fewer, more = sorted((vocabulary(each) for each in (saved, reference)), key=len)
    if not fewer.items() <= more.items():  # a training may have added a pad token
        raise ModelError(
            f"--reference {reference.folder} has another vocabulary than {saved.folder}: it would read other tokens"
        )


def vocabulary(saved: Saved) -> dict[str, int]:
    """Tokens and their ids."""
    return load_tokenizer(saved.config.model_copy(update={"name_or_path": str(saved.folder)})).get_vocab()


def base_of(saved: Saved) -> str | None:
    """Name of the weights that a training started from; None of a model that does not say. Of an adapter alone these
    are the weights that it is put on."""
    if isinstance(saved, SavedModel) and saved.metadata["format"] == "adapter":
        return saved.config.name_or_path
    return saved.metadata.get("base", {}).get("model")


def trained_with(saved: Saved, section: str) -> dict[str, Any]:
    """A section of the configuration that a model was trained with; {} where it does not say."""
    return saved.metadata.get("config", {}).get(section, {})


def trained_beta(saved: Saved) -> float:
    """Scale of the implicit reward."""
    return trained_with(saved, "objective").get("beta", DEFAULT_BETA)


def load_scorer(saved: SavedScorer, device: torch.device, max_tokens: int) -> Scorer:
    """Load what `open_model` or `open_reward_model` has looked at."""
    kind: Any = SCORERS[type(saved)]  # each loads its own kind of folder
    return kind.load(saved, device, max_tokens)


def read_json(file: Path) -> dict[str, Any]:
    """Content of a JSON object; {} where there is no such file."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error


def identity_of_model(saved: SavedScorer) -> dict[str, Any]:
    """Facts of a model that its scores depend on, for the identity of a job."""
    if isinstance(saved, SavedImplicitReward):
        models = {"policy": saved.policy, "reference": saved.reference}
        fit = {"judge": saved.fit.to_json()} if isinstance(saved, SavedCombinedReward) else {}
        return {name: identity_of_model(each) for name, each in models.items()} | {"beta": saved.beta} | fit
    folders = dict.fromkeys([saved.folder, local_folder(saved.config)])  # an adapter's base lies elsewhere
    files = [
        file
        for folder in folders
        for kind in ("safetensors", "bin", "json")
        for file in sorted(folder.glob(f"*.{kind}"))
    ]
    return {"files": [stamp(file) for file in files], "dtype": saved.config.dtype}
