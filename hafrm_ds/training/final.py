"""The trained model as a folder: what final/ says of its run, and the same folder made of a checkpoint.

    checkpoint + start weights -> HybridModel on the CPU -> folder like final/

A checkpoint holds what was trained, in DeepSpeed's files. The rest is loaded as the run has loaded it. No launcher and
no GPU are needed, and no pickle is read but of tensors and of the few classes that DeepSpeed puts beside them.
"""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hafrm_ds.config import ModelConfig, TrainConfig
from hafrm_ds.data.report import Counts, DataReport
from hafrm_ds.engine.checkpoint import (
    DEEPSPEED_FOLDER,
    CheckpointError,
    TrainingState,
    damaged_file,
    read_manifest,
    read_state,
)
from hafrm_ds.engine.resharding import trained_weights
from hafrm_ds.errors import ModelError
from hafrm_ds.model.hybrid import HybridModel, freeze_unused_heads
from hafrm_ds.model.loading import load_hybrid_model, load_tokenizer, local_folder
from hafrm_ds.model.lora import add_adapters, check_packages
from hafrm_ds.reference.provide import namespace_of
from hafrm_ds.reference.store import Namespace
from hafrm_ds.saved.card import base_license
from hafrm_ds.saved.writing import save_hybrid_model

DATA_REPORT_FILE = "data_report.json"


def run_metadata(
    config: TrainConfig,
    base_licence: str | None,
    start: Namespace,
    data: Mapping[str, Counts],
    step: int,
    evaluation: Mapping[str, Mapping[str, float]],
    alpha: float | None = None,
    judge: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What a saved model says of the run that made it, in hafrm.json and in its card.

    Args:
        start: what the reference log-probs of the start weights belong to.
        data: set -> what became of its pairs.
        step: the weights are those after it.
        evaluation: set -> its metrics after this step.
        alpha: the weight of the policy loss at this step, where objective.policy_share has found it.
        judge: the combined judge that the evaluation after this step has fitted.
    """
    found = {} if alpha is None else {"alpha": alpha}
    return {
        "base": {
            "model": config.model.name_or_path,
            "revision": config.model.revision,
            "license": base_licence,
            "namespace": asdict(start),
        },
        **({"attributes": config.model.attributes} if config.model.attributes else {}),
        "training": {"steps": step, "pairs": step * config.batch.global_batch_size} | found,
        "data": {
            name: {
                "read": total.read,
                "kept": total.kept,
                "dropped": sum(total.dropped.values()),
                "cut": total.cut,
            }
            for name, total in data.items()
        },
        "evaluation": evaluation,
        **({} if judge is None else {"judge": judge}),
        "config": config.model_dump(mode="json"),
    }


def export_checkpoint(
    checkpoint: Path, output_dir: Path, *, base: str | None = None, trust_remote_code: bool = False
) -> int:
    """Make of a checkpoint the folder that the run would have left as final/ after its step, which is returned.

    Args:
        checkpoint: RUN/checkpoints/step-N, written by any number of processes under any ZeRO stage.
        output_dir: must not exist.
        base: folder or hub id of the weights that the run started from. Default: where they were.

    Raises:
        CheckpointError: the checkpoint is not whole, or belongs to other start weights.
        ModelError: the start weights cannot be loaded.
    """
    if output_dir.exists():
        raise ModelError(f"--output_dir {output_dir} is already there; choose another folder")
    checkpoint = checkpoint.resolve()  # `latest` is a link
    state = read_whole(checkpoint)
    config = TrainConfig.model_validate(state.config)
    # Kernels change no weight, and those of the run may need a GPU.
    kernels = {"attention": "auto", "log_probs": "torch", "fused": "off"}
    start = config.model.model_copy(update=kernels | {"trust_remote_code": trust_remote_code})
    if base is not None:
        start = start.model_copy(update={"name_or_path": base, "revision": None})
    namespace = check_start(checkpoint, state, config, start)
    model = load_model(checkpoint, state, config, start)
    formatter = config.data.formatter(load_tokenizer(start))
    report = checkpoint.parents[1] / DATA_REPORT_FILE
    save_hybrid_model(
        model,
        formatter,
        output_dir,
        gathered=lambda parameters: nullcontext(),
        is_writer=True,
        metadata=run_metadata(
            config,
            base_license(local_folder(start)),
            namespace,
            counts_of(json.loads(report.read_text())) if report.is_file() else {},
            state.step,
            state.evaluation_of_step,
            state.alpha,
            state.judge_of_step,
        ),
    )
    return state.step


def read_whole(checkpoint: Path) -> TrainingState:
    try:
        problem = damaged_file(checkpoint, read_manifest(checkpoint).items())
    except CheckpointError as error:
        problem = str(error)
    if problem:
        raise CheckpointError(f"{checkpoint} is no whole checkpoint: {problem}")
    return read_state(checkpoint)


def check_start(checkpoint: Path, state: TrainingState, config: TrainConfig, start: ModelConfig) -> Namespace:
    """What the reference log-probs of the start weights belong to.

    Raises:
        CheckpointError: these are not the weights of the run; what is frozen is taken from them.
    """
    check_packages(start.lora)
    try:
        found = namespace_of(config.model_copy(update={"model": start}))
    except ModelError as error:
        raise ModelError(f"the weights that {checkpoint} started from are needed (--base): {error}") from error
    if found.name != state.reference:
        raise CheckpointError(
            f"{checkpoint} was trained from other weights than {start.name_or_path} holds: give --base the folder of "
            f"those that the run started from ({state.reference} there, {found.name} here)"
        )
    return found


def load_model(checkpoint: Path, state: TrainingState, config: TrainConfig, start: ModelConfig) -> HybridModel:
    """The start weights on the CPU, with those that were trained put over them."""
    model = load_hybrid_model(start, layout=config.batch.layout, seed=config.seed, device=torch.device("cpu"))
    if start.lora.rank:
        add_adapters(model.causal_lm, start, config.seed)
    freeze_unused_heads(model, config.objective)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = set(parameters)
    with torch.no_grad():
        for name, values in trained_weights(checkpoint / DEEPSPEED_FOLDER, state.zero_stage, state.world_size):
            if name in parameters:
                parameters[name].copy_(values.view(parameters[name].shape))
                missing.discard(name)
    if missing:
        raise CheckpointError(f"{checkpoint} lacks {len(missing)} trained parameters: {', '.join(sorted(missing)[:3])}")
    model.uses_stock_logits = state.uses_stock_logits
    return model


def counts_of(data_report: Mapping[str, Any]) -> dict[str, Counts]:
    """Set -> what became of its pairs, from the content of a run's data_report.json."""
    return {name.removeprefix("eval "): DataReport.from_json(content).total for name, content in data_report.items()}
