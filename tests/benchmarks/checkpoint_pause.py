"""Pause of a save and bytes written, against DeepSpeed's own save_checkpoint.

    deepspeed --num_gpus 2 tests/benchmarks/checkpoint_pause.py --config launch/recipes/NAME.yaml --output_dir OUT \
        --objective.alpha 0 [--section.key value ...]

Makes one step, so that the optimizer has its state, then saves three times each way, in turns, and prints a Markdown
table. OUT is a folder on the disk that is measured.
"""

import os
import shutil
import time
from pathlib import Path

import torch.distributed as dist

from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.engine.engine import load_training_engine
from hafrm_ds.processes.ranks import Processes, run_entry
from hafrm_ds.training.logging import RunLog
from hafrm_ds.training.loop import Trainer
from hafrm_ds.training.preflight import settle_batch
from hafrm_ds.training.run import prepare_data
from hafrm_ds.training.saver import CheckpointSaver

REPEATS = 3


def main(arguments: list[str], processes: Processes) -> None:
    config = load_config(arguments)
    log = RunLog(config, processes)
    formatter, train_pairs, _ = prepare_data(config, processes, log)
    processes.start_group()
    engine = load_training_engine(config, processes)
    config = settle_batch(engine, [train_pairs], config, log)
    saver = CheckpointSaver(config, engine, processes, log, data={}, reference="", resume_point=None)
    trainer = Trainer(config, engine, train_pairs, {}, None, saver, log, formatter.tokenizer)
    log.start(config, 0)
    trainer.train_step(0)

    def plain(step: int) -> None:
        engine.deepspeed.save_checkpoint(config.output_dir / "plain", tag=f"step-{step}")

    def synced(step: int) -> None:
        plain(step)
        for path in (config.output_dir / "plain" / f"step-{step}").glob(f"*zero_pp_rank_{processes.rank}_*"):
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def own(step: int) -> None:
        saver.state.step = step
        saver.save()

    plain_folder, own_folder = config.output_dir / "plain", config.output_dir / "checkpoints"
    ways = {
        "DeepSpeed, into the page cache": (plain, plain_folder),
        "DeepSpeed, then fsync": (synced, plain_folder),
        "hafrm_ds, synced, with checksums": (
            own,
            own_folder,
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    sizes: dict[str, int] = {}
    for step in range(REPEATS + 1):  # the first round warms up
        for name, (save, folder) in ways.items():
            os.sync()
            dist.barrier()
            started = time.perf_counter()
            save(step)
            dist.barrier()
            seconds[name].append(time.perf_counter() - started)
            sizes[name] = size_of(folder)
            dist.barrier()
            if processes.is_first:
                shutil.rmtree(folder)
            dist.barrier()
    lines = ["| way | seconds of each save | bytes of one |", "|---|---|---|"]
    for name, values in seconds.items():
        lines.append(f"| {name} | {', '.join(f'{value:.2f}' for value in values[1:])} | {sizes[name]:,} |")
    log.print("\n".join(lines))


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


if __name__ == "__main__":
    run_entry(main)
