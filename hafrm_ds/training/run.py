"""Whole jobs: training, and the reference pass before it."""

import time
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from hafrm_ds.capacity import peak_memory_bytes
from hafrm_ds.config import TrainConfig
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.packing import from_pairs, lay_out, token_costs
from hafrm_ds.data.planning import check_budget
from hafrm_ds.data.preparation import PreparedPairs, prepare_pairs
from hafrm_ds.errors import ConfigError, DataError, ModelError, UserError
from hafrm_ds.model.card import base_license
from hafrm_ds.model.hybrid import layout_difference, lm_head_difference, tolerance_of
from hafrm_ds.model.loading import fetch_model, local_folder
from hafrm_ds.model.saving import save_hybrid_model
from hafrm_ds.reference.job import ReferenceSource, precompute
from hafrm_ds.training.engine import Engine, check_build_tools, load_scoring_engine, load_training_engine
from hafrm_ds.training.logging import RunLog
from hafrm_ds.training.loop import Trainer
from hafrm_ds.training.processes import Processes

CHECKED_PAIRS = 2


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
    formatter, train_pairs, eval_pairs = prepare_data(config, processes, log)
    base_licence = base_license(
        local_folder(config.model)
    )  # now, as the folder of a base may be gone after days of training
    if len(train_pairs) < config.batch.global_batch_size:
        raise DataError(
            f"data.train has {len(train_pairs)} usable pairs, fewer than one global batch of "
            f"{config.batch.global_batch_size} (and this run has {processes.world_size} processes); "
            "lower --batch.global_batch_size or give more pairs"
        )

    reference_source = ReferenceSource.open(config, processes, log) if config.objective.uses_reference else None
    processes.start_group()
    engine = load_training_engine(config, processes.world_size)
    check_model(engine, train_pairs, config, log)
    trainer = Trainer(config, engine, train_pairs, eval_pairs, reference_source, log)
    trainer.run()

    final = config.output_dir / "final"
    try:
        save_hybrid_model(
            engine.model,
            formatter,
            final,
            layout=config.batch.layout,
            gathered=engine.gathered,
            is_writer=processes.is_first,
            metadata=run_metadata(config, base_licence, {"train": train_pairs, **eval_pairs}, trainer),
        )
    except OSError as error:
        raise UserError(f"the trained model cannot be written to {final}: {error.strerror}") from error
    log.write_json(config.output_dir / "summary.json", trainer.summary())
    log.print(f"\nthe trained model is in {final}")
    log.close()


def run_metadata(
    config: TrainConfig, base_licence: str | None, sets: dict[str, PreparedPairs], trainer: Trainer
) -> dict[str, Any]:
    """What a saved model says of the run that made it, in hafrm.json and in its card."""
    counted = {name: pairs.report.total for name, pairs in sets.items()}
    return {
        "base": {"model": config.model.name_or_path, "revision": config.model.revision, "license": base_licence},
        "training": {"steps": trainer.num_steps, "pairs": trainer.num_steps * config.batch.global_batch_size},
        "data": {
            name: {
                "read": total.read,
                "kept": total.kept,
                "dropped": sum(total.dropped.values()),
                "cut": total.cut,
            }
            for name, total in counted.items()
        },
        "evaluation": trainer.last_evaluation,
        "config": config.model_dump(mode="json"),
    }


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
    source = ReferenceSource.open(config, processes, log)
    processes.start_group()

    def load_engine() -> Engine:
        engine = load_scoring_engine(config, processes.world_size)
        check_model(engine, train_pairs, config, log)
        return engine

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
        costs = token_costs(pairs.lengths, config.batch.layout)
        check_budget(costs, config.batch.max_tokens_per_micro_batch, pairs.pairs["id"])
    reports = {name: pairs.report.to_json() for name, pairs in sets.items()}
    log.write_json(config.output_dir / "data_report.json", reports)
    return formatter, train_pairs, eval_pairs


def check_model(engine: Engine, pairs: PreparedPairs, config: TrainConfig, log: RunLog) -> None:
    """Two checks of a freshly loaded model on the shortest pairs, before anything rests on it; says what came out.

    Its scores in the run's layout are compared with those of padded, separate sequences under its own attention, and
    the fused log-probs, where the objective uses them, with those of its own logits.

    Raises:
        ModelError: the scores are not finite, or the layout changes them.
    """
    layout, with_logprob, model = config.batch.layout, config.objective.uses_policy, engine.model
    shortest = np.argsort(token_costs(pairs.lengths, layout))[:CHECKED_PAIRS]
    items = from_pairs([pairs[int(index)] for index in shortest])
    name, tolerance = type(model.causal_lm).__name__, tolerance_of(model)
    largest = partial(over_all_ranks, dist.ReduceOp.MAX, engine.device)

    difference = largest(layout_difference(model, engine, items, layout, with_logprob))
    log.print(f"{layout} against padded, separate sequences: {difference:.2g} in a reward or a token's log-prob")
    if not difference <= tolerance:
        raise ModelError(
            f"the scores of {name} change by {difference:.3g} in the layout {layout} (tolerance {tolerance:g}): it "
            "does not keep packed answers apart. Set --batch.layout padded"
        )
    if not with_logprob:
        return
    difference = largest(lm_head_difference(model, engine, lay_out(items, layout).to(engine.device)))
    log.print(f"log-probs against {name}'s own logits: {difference:.2g} nats a token")
    if not difference <= tolerance:
        model.uses_stock_logits = True
        log.warn(
            f"the LM head of {name} does something that hafrm_ds does not know: its own logits are used instead of "
            "the fused log-probs, which holds the logits of all tokens in memory"
        )


def over_all_ranks(operation, device: torch.device, value: float) -> float:
    on_device = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(on_device, op=operation)
    return on_device.item()
