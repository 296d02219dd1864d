"""Whole jobs: training, and the reference pass before it."""

import time

from hafrm_ds.capacity import peak_memory_bytes
from hafrm_ds.config import BatchConfig, TrainConfig
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.preparation import PreparedPairs, prepare_pairs
from hafrm_ds.errors import ConfigError, DataError, UserError
from hafrm_ds.model.loading import fetch_model
from hafrm_ds.model.saving import save_hybrid_model
from hafrm_ds.reference.job import ReferenceSource, precompute
from hafrm_ds.training.engine import Engine, check_build_tools, load_scoring_engine, load_training_engine
from hafrm_ds.training.logging import RunLog
from hafrm_ds.training.loop import Trainer
from hafrm_ds.training.preflight import check_budgets, settle_batch
from hafrm_ds.training.processes import Processes


def train(config: TrainConfig, processes: Processes) -> None:
    """Train one model and leave a run folder: config.yaml, environment.json, data_report.json, metrics.jsonl,
    tensorboard/, summary.json, final/."""
    if config.batch.global_batch_size < processes.world_size:
        raise ConfigError(
            [
                f"batch.global_batch_size is {config.batch.global_batch_size} pairs, fewer than the "
                f"{processes.world_size} processes of this run; every process needs a pair in each step"
            ]
        )
    check_build_tools(processes.device)
    log = RunLog(config, processes)
    formatter, train_pairs, eval_pairs = prepare_data(config, processes, log)
    if len(train_pairs) < config.batch.global_batch_size:
        raise DataError(
            f"data.train has {len(train_pairs)} usable pairs, fewer than one global batch of "
            f"{config.batch.global_batch_size} (and this run has {processes.world_size} processes); "
            "lower --batch.global_batch_size or give more pairs"
        )

    reference_source = ReferenceSource.open(config, processes, log) if config.objective.uses_reference else None
    processes.start_group()
    engine = load_training_engine(config, processes)
    config = settle_batch(engine, [train_pairs, *eval_pairs.values()], config, log)
    log.write_config(config)
    trainer = Trainer(config, engine, train_pairs, eval_pairs, reference_source, log)
    trainer.run()

    final = config.output_dir / "final"
    try:
        save_hybrid_model(
            engine.model,
            formatter.tokenizer,
            final,
            gathered=engine.gathered,
            is_writer=processes.is_first,
            metadata={"objective": config.objective.model_dump(), "base_model": config.model.name_or_path},
        )
    except OSError as error:
        raise UserError(f"the trained model cannot be written to {final}: {error.strerror}") from error
    log.write_json(config.output_dir / "summary.json", trainer.summary())
    log.print(f"\nthe trained model is in {final}")
    log.close()


def precompute_reference(config: TrainConfig, processes: Processes) -> None:
    """Put the reference log-probs of every pair of a config, training and evaluation, into its store."""
    if not config.objective.uses_reference:
        raise ConfigError(
            [
                f"objective.policy_loss {config.objective.policy_loss} with objective.alpha {config.objective.alpha} "
                "uses no reference log-probs: there is nothing to compute"
            ]
        )
    check_build_tools(processes.device)
    log = RunLog(config, processes, files=False)
    _, train_pairs, eval_pairs = prepare_data(config, processes, log)
    sets = [train_pairs, *eval_pairs.values()]
    source = ReferenceSource.open(config, processes, log)
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


def prepare_data(
    config: TrainConfig, processes: Processes, log: RunLog
) -> tuple[ChatFormatter, PreparedPairs, dict[str, PreparedPairs]]:
    """The formatter, the training pairs, and the pairs of each evaluation set; reported and checked."""
    # Fetched from the hub by one rank of each node, and before the process group: a download outlasts a collective.
    tokenizer = processes.in_turns("model", lambda: fetch_model(config.model))
    formatter = ChatFormatter.create(tokenizer, config.data.chat_template, config.data.template_date)
    shared = {"formatter": formatter, "data": config.data, "seed": config.seed}

    def prepare() -> tuple[PreparedPairs, dict[str, PreparedPairs]]:
        return (
            prepare_pairs(config.data.train, role="train", **shared),
            {name: prepare_pairs(sources, role="eval", **shared) for name, sources in config.data.eval.items()},
        )

    train_pairs, eval_pairs = processes.in_turns("data", prepare)
    sets = {"train": train_pairs, **{f"eval {name}": pairs for name, pairs in eval_pairs.items()}}
    for name, pairs in sets.items():
        log.print(f"\n[bold]{name}[/bold]")
        log.print(pairs.report.render(with_examples=name == "train"))
    check_budgets(sets.values(), config.batch)
    reports = {name: pairs.report.to_json() for name, pairs in sets.items()}
    log.write_json(config.output_dir / "data_report.json", reports)
    return formatter, train_pairs, eval_pairs
