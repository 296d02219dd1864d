"""Whole jobs: training, and the reference pass before it."""

import json
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import yaml

from hafrm_ds.config import BatchConfig, ObjectiveConfig, TrainConfig, options_of
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.pairs import names_in_words
from hafrm_ds.data.preparation import PreparedGroups, fingerprints_of, prepare_groups
from hafrm_ds.engine.deepspeed_config import read_deepspeed_json, resolve_deepspeed_config, zero_stage
from hafrm_ds.engine.engine import (
    Engine,
    TrainingEngine,
    check_build_tools,
    load_scoring_engine,
    load_training_engine,
)
from hafrm_ds.engine.shapes import trained_share
from hafrm_ds.errors import ConfigError, DataError, UserError
from hafrm_ds.evaluation.combined import too_few
from hafrm_ds.evaluation.pair_scores import fixed_choice
from hafrm_ds.evaluation.report import writing as leaving
from hafrm_ds.evaluation.report.reading import STOPPED_FILE, SUMMARY_FILE
from hafrm_ds.evaluation.sets import EvaluatedSet
from hafrm_ds.hardware.measurement import peak_memory_bytes
from hafrm_ds.model.loading import check_runnable, fetch_model, load_model_config, local_folder
from hafrm_ds.model.reward_start import check_start
from hafrm_ds.model.sizes import ModelSizes
from hafrm_ds.processes.ranks import Processes, use_deterministic_algorithms
from hafrm_ds.processes.stopping import Stopped
from hafrm_ds.reference.provide import ReferenceSource, precompute, shared_namespace
from hafrm_ds.reference.store import Namespace
from hafrm_ds.saved.card import base_license
from hafrm_ds.saved.writing import save_hybrid_model
from hafrm_ds.training.final import DATA_REPORT_FILE, run_metadata
from hafrm_ds.training.logging import RunLog
from hafrm_ds.training.loop import Trainer
from hafrm_ds.training.preflight import check_budgets, settle_batch
from hafrm_ds.training.resume import ResumePoint, changed_since, find_resume_point
from hafrm_ds.training.saver import CheckpointSaver


def train(config: TrainConfig, processes: Processes) -> None:
    """Train one model and leave a run folder: config.yaml, environment.json, data_report.json, metrics.jsonl,
    tensorboard/, checkpoints/, summary.json, final/, report.html.

    Raises:
        Stopped: a signal has ended the run; stopped.json says where it resumes.
    """
    log = RunLog(config, processes)
    try:
        train_to_the_end(config, processes, log)
    except Stopped as stop:
        file = config.output_dir / STOPPED_FILE
        if stop.checkpoint or not file.exists():  # stopped before it had resumed: what it says still holds
            log.write_json(file, stop.to_json())
        leave_report(config, log)
        raise
    finally:
        log.close()


def train_to_the_end(config: TrainConfig, processes: Processes, log: RunLog) -> None:
    """Train to the last step; `train` around it leaves the report, however this ends."""
    check_options(config, processes)
    if config.deterministic:
        log.print(use_deterministic_algorithms())
    if is_finished(config, processes):
        log.print(f"the run in {config.output_dir} is finished ({SUMMARY_FILE}): there is nothing to resume")
        return
    config, resume_point = settle_resume_point(config, processes, log)
    formatter, train_groups, eval_groups = prepare_data(config, processes, log)
    base_licence = base_license(local_folder(config.model))  # now: the folder may be gone after days of training
    check_training_groups(train_groups, config, processes)
    check_combined_judge(eval_groups, config, log)
    sets = named_sets(train_groups, eval_groups)
    start = shared_namespace(config, processes)
    data = agree_on_content(sets, start, resume_point, processes)
    reference_source = ReferenceSource.open(config, start, processes, log) if config.objective.uses_reference else None
    log.write_json(config.output_dir / DATA_REPORT_FILE, {name: each.report.to_json() for name, each in sets.items()})

    processes.start_group()
    engine = load_training_engine(config, processes, attribute_means(train_groups, config.model.attributes))
    log.print(trained_share(engine.model))
    config = settle_batch(engine, list(sets.values()), config, log)
    saver = CheckpointSaver(config, engine, processes, log, data, start.name, resume_point)
    trainer = Trainer(config, engine, train_groups, eval_groups, reference_source, saver, log, formatter.tokenizer)
    trainer.load_reference()
    # What could be refused has been: from here on what an earlier start has left is touched, and a signal waits.
    processes.stopping.defer()
    trainer.run()

    final_step = trainer.choose_final_weights()
    counts = {name: each.report.total for name, each in {"train": train_groups, **eval_groups}.items()}
    state = saver.state
    metadata = run_metadata(
        config, base_licence, start, counts, final_step, state.last_evaluation, state.alpha, state.judge
    )
    save_final(config, engine, formatter, metadata, processes, log)
    log.write_json(config.output_dir / SUMMARY_FILE, trainer.summary(final_step) | {"data": data})
    leave_report(config, log)


def check_options(config: TrainConfig, processes: Processes) -> None:
    """See that all hosts have read the same options, and that these processes and what is installed can run them.

    Raises:
        UserError: naming what differs or is missing.
    """
    compare_options(config, processes)
    if config.batch.global_batch_size < processes.world_size:
        raise ConfigError(
            [
                f"batch.global_batch_size is {config.batch.global_batch_size} pairs, fewer than the "
                f"{processes.world_size} processes of this run; every process needs a pair in each step"
            ]
        )
    check_build_tools(processes.device, deepspeed_config_of(config, processes))
    check_runnable(config.model, config.batch.layout, processes.device)


def deepspeed_config_of(config: TrainConfig, processes: Processes) -> dict:
    return resolve_deepspeed_config(config, processes.world_size, processes.machine_size)


def is_finished(config: TrainConfig, processes: Processes) -> bool:
    """Whether the run that is to be resumed has come to its end. The same on all ranks.

    Raises:
        UserError: it has, with other options than those that are asked for.
    """
    file = config.output_dir / SUMMARY_FILE
    if config.resume != "auto" or not processes.from_first("finished", file.exists):
        return False

    def look() -> dict[str, str]:
        saved = config.output_dir / "config.yaml"
        return changed_since(yaml.safe_load(saved.read_text()), config) if saved.exists() else {}

    if changed := processes.from_first("options of the finished run", look):
        lines = "".join(f"\n  - {text}" for text in changed.values())
        raise UserError(
            f"{config.output_dir} holds a run that has finished with other options:{lines}\nGive another --output_dir. "
            f"To go on from a checkpoint of it, add --resume {config.output_dir / 'checkpoints' / 'step-N'} "
            f"--checkpoint.allow_changed '[{', '.join(sorted(changed))}]'"
        )
    return True


def settle_resume_point(
    config: TrainConfig, processes: Processes, log: RunLog
) -> tuple[TrainConfig, ResumePoint | None]:
    """Where the run resumes, and its configuration with what `auto` leaves open decided as it was there.

    Raises:
        CheckpointError: the checkpoint cannot be used, or was written under other options.
    """
    resume_point = find_resume_point(config, processes, log)
    if resume_point is None:
        return config, None
    resume_point.check_stage(zero_stage(deepspeed_config_of(config, processes)))
    return resume_point.settle(config), resume_point


def check_training_groups(groups: PreparedGroups, config: TrainConfig, processes: Processes) -> None:
    """Raises DataError when there are too few for a step, or none has a margin or attribute that a loss is to use."""
    unit, size = groups.unit, config.batch.global_batch_size
    if len(groups) < size:
        raise DataError(
            f"data.train has {len(groups)} usable {unit}, fewer than one global batch of {size} (and this run has "
            f"{processes.world_size} processes); lower --batch.global_batch_size or give more {unit}"
        )
    if config.objective.use_margin and groups.report.margin_faults:
        raise DataError(f"objective.use_margin is true, but {groups.report.first_margin_fault}")
    if config.objective.use_margin and not groups.report.with_margin:
        raise DataError(
            f"objective.use_margin is true, but none of the {len(groups)} {unit} of data.train has a margin: the rows "
            "need a field `margin`, or `score_chosen` and `score_rejected`; or set --objective.use_margin false"
        )
    known = groups.report.attributes
    if missing := [name for name in config.model.attributes if name not in known]:
        raise DataError(
            f"model.attributes names {names_in_words(missing)}, of which none of the {len(groups)} {unit} of "
            f"data.train has a value in its field `attributes` (known: {names_in_words(known)})"
        )


def attribute_means(groups: PreparedGroups, names: Sequence[str]) -> list[float]:
    """The mean of each attribute over the answers that have it."""
    values = groups.attributes_of(names, np.arange(len(groups.keys)))
    return [float(np.nanmean(column, dtype=np.float64)) for column in values.T]


def check_orders(sets: dict[str, PreparedGroups], objective: ObjectiveConfig) -> None:
    """Raises DataError where the loss is that of whole orders, but a set holds comparisons that make none."""
    if objective.ranking_loss == "pairwise":
        return
    for name, groups in sets.items():
        facts = groups.report.groups
        if facts is None:
            continue
        faults = {
            "groups whose comparisons contradict one another": facts.contradictory,
            "groups that have a part of the comparisons of their order": facts.partial,
            "comparisons with a probability below 1": facts.soft,
        }
        if any(faults.values()):
            what = " and ".join(f"{number:,} {kind}" for kind, number in faults.items() if number)
            raise DataError(
                f"{name} has {what}, of which objective.ranking_loss {objective.ranking_loss} cannot make an order; "
                "set --objective.ranking_loss pairwise"
            )


def check_combined_judge(eval_groups: dict[str, PreparedGroups], config: TrainConfig, log: RunLog) -> None:
    """Say so where the first evaluation set has too few pairs or prompts to fit both heads as one judge.

    Raises:
        DataError: evaluation.best_metric asks for that judge.
    """
    if not (eval_groups and config.objective.has_combined_judge):
        return
    name, groups = next(iter(eval_groups.items()))
    problem = too_few(EvaluatedSet(groups, fixed_choice(len(groups), config.evaluation.max_pairs)).prompts)
    if problem is None:
        return
    best = config.evaluation.best_metric
    if best is not None and best.endswith("/combined"):
        raise DataError(
            f"evaluation.best_metric is {best}, but of the first evaluation set, {name}, {problem}: give more pairs, "
            "or another best_metric"
        )
    log.print(f"the first evaluation set, {name}: {problem}; there will be none")


def agree_on_content(
    sets: dict[str, PreparedGroups], start: Namespace, resume_point: ResumePoint | None, processes: Processes
) -> dict[str, str]:
    """Fingerprints of the sets, the same on all ranks and those of the checkpoint, as the start weights are.

    Raises:
        UserError: naming what differs.
    """
    data = fingerprints_of(sets)
    processes.must_agree("data", data)
    if resume_point is not None:
        resume_point.check_content(data, start.name)
    return data


def save_final(
    config: TrainConfig,
    engine: TrainingEngine,
    formatter: ChatFormatter,
    metadata: dict[str, Any],
    processes: Processes,
    log: RunLog,
) -> None:
    """Write final/. All ranks call this together.

    Raises:
        UserError: it cannot be written.
    """
    final = config.output_dir / "final"
    try:
        save_hybrid_model(
            engine.model,
            formatter,
            final,
            gathered=engine.gathered,
            is_writer=processes.is_first,
            metadata=metadata,
        )
    except OSError as error:
        raise UserError(f"the trained model cannot be written to {final}: {error.strerror}") from error
    log.print(f"\nthe trained model, after step {metadata['training']['steps']}, is in {final}")


def leave_report(config: TrainConfig, log: RunLog) -> None:
    """Draw report.html of what the run has written, if it has written anything and the report is wanted."""
    if log.metrics_file is not None and config.logging.report:
        leaving.leave_report(config.output_dir, log)


def precompute_reference(config: TrainConfig, processes: Processes) -> None:
    """Put the reference log-probs of every pair of a config, training and evaluation, into its store."""
    if not config.objective.uses_reference:
        raise ConfigError(
            [
                f"objective.policy_loss {config.objective.policy_loss} with objective.alpha {config.objective.alpha} "
                "uses no reference log-probs: there is nothing to compute"
            ]
        )
    compare_options(config, processes)
    check_build_tools(processes.device)
    check_runnable(config.model, config.batch.layout, processes.device)
    log = RunLog(config, processes, files=False)
    if config.deterministic:
        log.print(use_deterministic_algorithms())
    _, train_groups, eval_groups = prepare_data(config, processes, log)
    processes.must_agree("data", fingerprints_of(named_sets(train_groups, eval_groups)))
    sets = [train_groups, *eval_groups.values()]
    source = ReferenceSource.open(config, shared_namespace(config, processes), processes, log)
    processes.start_group()

    def load_engine() -> tuple[Engine, BatchConfig]:
        engine = load_scoring_engine(config, processes)
        return engine, settle_batch(engine, sets, config, log).batch

    started = time.perf_counter()
    figures = precompute(source, processes, sets, load_engine, log)
    seconds = figures["compute_seconds"]
    speed = f", {figures['tokens'] / seconds:,.0f} tokens/s" if seconds else ""
    log.print(
        f"{figures['pairs']:,} pairs, {figures['responses']:,} different responses: {figures['computed']:,} computed "
        f"({figures['tokens']:,} tokens) in {seconds:.1f} s{speed}; {time.perf_counter() - started:.1f} s in all "
        f"(look-up {figures['look_up_seconds']:.1f} s)\n"
        f"store {config.reference.store}: {figures.get('stored_bytes', 0):,} bytes; "
        f"peak memory of rank 0 {peak_memory_bytes(processes.device) / 2**30:.2f} GiB"
    )


def compare_options(config: TrainConfig, processes: Processes) -> None:
    """See that all hosts have read the same files of options.

    Raises:
        UserError: with the hosts and the options that differ.
    """
    options = {f"--{name}": json.dumps(value) for name, value in options_of(config.model_dump(mode="json"))}
    content, _ = read_deepspeed_json(config.deepspeed)
    processes.must_agree("options", {**options, f"the content of {config.deepspeed}": json.dumps(content)})


def prepare_data(
    config: TrainConfig, processes: Processes, log: RunLog
) -> tuple[ChatFormatter, PreparedGroups, dict[str, PreparedGroups]]:
    """The formatter, the training groups, and those of each evaluation set; reported and checked."""
    # Fetched from the hub by one rank of each node, and before the process group: a download outlasts a collective.
    tokenizer = processes.in_turns("model", lambda: fetch_model(config.model))
    stock = load_model_config(config.model)
    if warning := check_start(config.model, local_folder(config.model), stock):
        log.warn(warning)
    formatter = config.data.formatter(tokenizer)
    prepared = partial(prepare_groups, formatter=formatter, options=config.data.preparation, seed=config.seed)

    def prepare() -> tuple[PreparedGroups, dict[str, PreparedGroups]]:
        return (
            prepared(config.data.train, role="train"),
            {name: prepared(sources, role="eval") for name, sources in config.data.eval.items()},
        )

    train_groups, eval_groups = processes.in_turns("data", prepare)
    sets = named_sets(train_groups, eval_groups)
    check_orders(sets, config.objective)
    for name, groups in sets.items():
        log.print(f"\n[bold]{name}[/bold]")
        log.print(groups.report.render(with_examples=name == "train"))
    ModelSizes.of(config.model.name_or_path, stock).check(sets, tokenizer)
    check_budgets((train_groups, *eval_groups.values()), config)
    return formatter, train_groups, eval_groups


def named_sets(train_groups: PreparedGroups, eval_groups: dict[str, PreparedGroups]) -> dict[str, PreparedGroups]:
    return {"train": train_groups, **{f"eval {name}": each for name, each in eval_groups.items()}}
