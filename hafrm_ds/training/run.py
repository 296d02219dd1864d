"""A whole training run: data, model, loop, what is left behind."""

from hafrm_ds.config import TrainConfig
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.micro_batches import make_micro_batch
from hafrm_ds.data.preparation import PreparedPairs, prepare_pairs
from hafrm_ds.errors import ConfigError, DataError
from hafrm_ds.model.hybrid import check_lm_head
from hafrm_ds.model.loading import load_tokenizer
from hafrm_ds.model.saving import save_hybrid_model
from hafrm_ds.training.engine import Engine, check_build_tools, load_engine
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
    log = RunLog(config, processes.is_first)
    log.write_json(config.output_dir / "environment.json", environment(processes.world_size))

    formatter = ChatFormatter.create(load_tokenizer(config.model), config.data.chat_template, config.data.template_date)
    train_pairs, eval_pairs = processes.in_turns("data", lambda: prepare_data(config, formatter))
    reports = {"train": train_pairs.report, **{f"eval {name}": pairs.report for name, pairs in eval_pairs.items()}}
    for name, report in reports.items():
        log.print(f"\n[bold]{name}[/bold]")
        log.print(report.render(with_examples=name == "train"))
    log.write_json(config.output_dir / "data_report.json", {name: report.to_json() for name, report in reports.items()})

    if len(train_pairs) < config.batch.global_batch_size:
        raise DataError(
            f"data.train has {len(train_pairs)} usable pairs, fewer than one global batch of "
            f"{config.batch.global_batch_size} (and this run has {processes.world_size} processes); "
            "lower --batch.global_batch_size or give more pairs"
        )

    processes.start_group()
    engine = load_engine(config, processes.world_size)
    if config.objective.uses_policy:
        report_lm_head(engine, train_pairs, config.batch.layout, log)
    trainer = Trainer(config, engine, train_pairs, eval_pairs, log)
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


def prepare_data(config: TrainConfig, formatter: ChatFormatter) -> tuple[PreparedPairs, dict[str, PreparedPairs]]:
    """Training pairs, and the pairs of each evaluation set."""
    shared = {"formatter": formatter, "data": config.data, "seed": config.seed}
    return (
        prepare_pairs(config.data.train, role="train", **shared),
        {name: prepare_pairs(sources, role="eval", **shared) for name, sources in config.data.eval.items()},
    )


def report_lm_head(engine: Engine, pairs: PreparedPairs, layout: str, log: RunLog) -> None:
    """Compare the fused log-probs of two pairs with those from the stock model's logits, and say what came out."""
    sample = make_micro_batch(pairs, range(min(2, len(pairs))), layout).batch.to(engine.device)
    difference = check_lm_head(engine.model, engine, sample)
    log.print(f"log-probs against {type(engine.model.causal_lm).__name__}'s own logits: {difference:.2g} nats a token")
    if engine.model.uses_stock_logits:
        log.print(
            "[bold yellow]WARNING[/bold yellow] this LM head does something that hafrm_ds does not know: its own "
            "logits are used instead of the fused log-probs, which holds the logits of all tokens in memory"
        )
