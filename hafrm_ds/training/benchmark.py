"""Speed and memory of a run, measured in a few steps of training and a reference pass of which nothing is kept."""

import statistics
import time

import numpy as np

from hafrm_ds.config import TrainConfig
from hafrm_ds.data.tables import Cell, Table
from hafrm_ds.engine.deepspeed_config import resolve_deepspeed_config
from hafrm_ds.engine.engine import check_build_tools, load_training_engine
from hafrm_ds.engine.scoring import score_groups
from hafrm_ds.errors import ConfigError
from hafrm_ds.model.loading import check_runnable
from hafrm_ds.processes.ranks import Processes, use_deterministic_algorithms
from hafrm_ds.reference.offline_pass import ReferenceLogprobs
from hafrm_ds.training.logging import RunLog
from hafrm_ds.training.loop import Trainer
from hafrm_ds.training.preflight import settle_batch
from hafrm_ds.training.run import prepare_data
from hafrm_ds.training.saver import CheckpointSaver

WARM_UP_STEPS = 2


def trainer_for_measuring(config: TrainConfig, num_steps: int, processes: Processes, log: RunLog) -> Trainer:
    """A trainer of the real pairs for `num_steps` steps, of which nothing is kept.

    The values of reference log-probs do not change what a step costs: zeros stand for them, and no store is touched.
    Nor does that of alpha: where a share would find it, 1 stands for it.
    """
    check_build_tools(processes.device, resolve_deepspeed_config(config, processes.world_size, processes.machine_size))
    check_runnable(config.model, config.batch.layout, processes.device)
    if config.deterministic:
        log.print(use_deterministic_algorithms())
    config = config.model_copy(update={"max_steps": num_steps})
    formatter, pairs, _ = prepare_data(config, processes, log)
    processes.start_group()
    engine = load_training_engine(config, processes)
    config = settle_batch(engine, [pairs], config, log)
    saver = CheckpointSaver(config, engine, processes, log, data={}, reference="", resume_point=None)
    trainer = Trainer(config, engine, pairs, {}, None, saver, log, formatter.tokenizer)
    saver.state.alpha = 1.0
    if config.objective.uses_reference:
        trainer.train_set.reference = ReferenceLogprobs(np.zeros(len(pairs.keys), dtype=np.float32))
    return trainer


def benchmark(config: TrainConfig, processes: Processes, num_steps: int) -> None:
    """Print speed and memory of training steps with this configuration, and of scoring the same pairs without
    gradients, as the reference pass and evaluation do.

    Raises:
        ConfigError: there is nothing to measure.
    """
    if num_steps < 1:
        raise ConfigError([f"--steps is {num_steps}; it must be at least 1"])
    log = RunLog(config, processes, files=False)
    trainer = trainer_for_measuring(config, WARM_UP_STEPS + num_steps, processes, log)
    config, groups, engine = trainer.config, trainer.train_set.groups, trainer.engine
    steps = [trainer.train_step(step) for step in range(WARM_UP_STEPS + num_steps)][WARM_UP_STEPS:]

    index = np.concatenate([trainer.plan.global_batch(step) for step in range(num_steps)])
    started = time.perf_counter()
    score_groups(
        engine,
        groups,
        index,
        config.objective.heads,
        layout=config.batch.layout,
        max_tokens=config.batch.token_budget,
    )
    seconds = time.perf_counter() - started
    tokens = int(groups.lengths.take(index).costs(config.batch.layout).sum())

    def median(name: str) -> float:
        return statistics.median(step[name] for step in steps)

    rows = {
        "processes": f"{processes.world_size}",
        f"{groups.unit} a step; micro-batches": f"{config.batch.global_batch_size}; {median('micro_batches'):.0f}",
        "tokens of a process a step": f"{median('tokens_per_rank'):,.0f}",
        "padding; waiting for the slowest process": f"{median('padding_share'):.1%}; {median('imbalance'):.1%}",
        "seconds a step": f"{median('seconds'):.3g}",
        "tokens/s": f"{median('tokens_per_second'):,.0f}",
        f"{groups.unit}/s": f"{median(f'{groups.unit}_per_second'):,.2f}",
        "MFU": f"{median('mfu'):.1%} of {trainer.peak_flops / 1e12:.3g} TFLOP/s a process",
        "mfu_measured": f"{median('mfu_measured'):.1%} of {trainer.measured_peak / 1e12:.3g} TFLOP/s, as measured here",
        f"without gradients: tokens/s; {groups.unit}/s": f"{tokens / seconds:,.0f}; {len(index) / seconds:,.2f}",
        "peak memory of the largest process": f"{steps[-1]['memory_gib']:.2f} GiB",
    }
    header = ("", f"median of {num_steps} steps")
    log.print(Table([(name, [Cell(value)]) for name, value in rows.items()], header, texts=1))
