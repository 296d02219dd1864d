"""Whole jobs: training, and the reference pass before it."""

import time

from hafrm_ds.capacity import peak_memory_bytes
from hafrm_ds.config import TrainConfig
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.micro_batches import make_micro_batch
from hafrm_ds.data.packing import token_costs
from hafrm_ds.data.planning import check_budget
from hafrm_ds.data.preparation import PreparedPairs, prepare_pairs
from hafrm_ds.errors import ConfigError, DataError
from hafrm_ds.model.hybrid import check_lm_head
from hafrm_ds.model.loading import load_tokenizer
from hafrm_ds.model.saving import save_hybrid_model
from hafrm_ds.reference.job import ReferenceSource, precompute
from hafrm_ds.training.engine import Engine, check_build_tools, load_scoring_engine, load_training_engine
from hafrm_ds.training.logging import RunLog, environment
from hafrm_ds.training.loop import Trainer
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
    if processes.device.type == "cpu":
        check_build_tools()
    log = RunLog(config, processes)
    log.write_json(config.output_dir / "environment.json", environment(processes.world_size))
    formatter, train_pairs, eval_pairs = prepare_data(config, processes, log)
    if len(train_pairs) < config.batch.global_batch_size:
        raise DataError(
            f"data.train has {len(train_pairs)} usable pairs, fewer than one global batch of "
            f"{config.batch.global_batch_size} (and this run has {processes.world_size} processes); "
            "lower --batch.global_batch_size or give more pairs"
        )

    processes.start_group()
    reference_source = ReferenceSource.open(config, processes, log) if config.objective.uses_reference else None
    engine = load_training_engine(config, processes.world_size)
    if config.objective.uses_policy:
        report_lm_head(engine, train_pairs, config.batch.layout, log)
    trainer = Trainer(config, engine, train_pairs, eval_pairs, reference_source, log)
    trainer.run()

    save_hybrid_model(
        engine.model,
        formatter.tokenizer,
        config.output_dir / "final",
        gathered=engine.gathered,
        is_writer=processes.is_first,
        metadata={"objective": config.objective.model_dump(), "base_model": config.model.name_or_path},
    )
    log.write_json(config.output_dir / "summary.json", trainer.summary())
    log.print(f"\nthe trained model is in {config.output_dir / 'final'}")
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
    if processes.device.type == "cpu":
        check_build_tools()
    log = RunLog(config, processes, files=False)
    _, train_pairs, eval_pairs = prepare_data(config, processes, log)
    sets = [train_pairs, *eval_pairs.values()]
    processes.start_group()

    def load_engine() -> Engine:
        engine = load_scoring_engine(config, processes.world_size)
        report_lm_head(engine, train_pairs, config.batch.layout, log)
        return engine

    started = time.perf_counter()
    figures = precompute(config, processes, sets, load_engine, log)
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
    formatter = ChatFormatter.create(load_tokenizer(config.model), config.data.chat_template, config.data.template_date)
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
        costs = token_costs(pairs.lengths, config.batch.layout)
        check_budget(costs, config.batch.max_tokens_per_micro_batch, pairs.pairs["id"])
    reports = {name: pairs.report.to_json() for name, pairs in sets.items()}
    log.write_json(config.output_dir / "data_report.json", reports)
    return formatter, train_pairs, eval_pairs


def report_lm_head(engine: Engine, pairs: PreparedPairs, layout: str, log: RunLog) -> None:
    """Compare the fused log-probs of two pairs with those from the stock model's logits, and say what came out."""
    sample = make_micro_batch(pairs, range(min(2, len(pairs))), layout).batch.to(engine.device)
    difference = check_lm_head(engine.model, engine, sample)
    log.print(f"log-probs against {type(engine.model.causal_lm).__name__}'s own logits: {difference:.2g} nats a token")
    if engine.model.uses_stock_logits:
        log.warn(
            "this LM head does something that hafrm_ds does not know: its own "
            "logits are used instead of the fused log-probs, which holds the logits of all tokens in memory"
        )
