"""What measuring the pull of either loss costs: seconds of steps that measure and of steps that do not, by turns.

    OMP_NUM_THREADS=1 deepspeed --num_gpus N tests/benchmarks/share_cost.py --config FILE.yaml \
        --deepspeed ds_configs/zeroK.json [--section.key value ...]

Prints a row of a Markdown table. On a CPU it counts the time that the process has computed: other work on the machine
does not count.
"""

import statistics
import time

from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.processes.ranks import Processes, run_entry
from hafrm_ds.training.benchmark import trainer_for_measuring
from hafrm_ds.training.logging import RunLog

WARM_UP, ROUNDS = 2, 8


def main(arguments: list[str], processes: Processes) -> None:
    config = load_config([*arguments, "--logging.gradient_shares_every", "2"])
    log = RunLog(config, processes, files=False)
    trainer = trainer_for_measuring(config, WARM_UP + 2 * ROUNDS, processes, log)
    clock = time.process_time if processes.device.type == "cpu" else time.perf_counter
    seconds = []
    for step in range(WARM_UP + 2 * ROUNDS):
        started = clock()
        trainer.train_step(step)
        seconds.append(clock() - started)
    plain, measuring = (statistics.median(seconds[first::2]) for first in (WARM_UP, WARM_UP + 1))
    stage, ranks, dtype = trainer.engine.stage, processes.world_size, config.model.dtype
    log.print("| ZeRO, processes, dtype | plain step, s | measuring step, s | more |")
    log.print(
        f"| {stage}, {ranks}, {dtype} | {plain:.3f} | {measuring:.3f} | {measuring / plain - 1:.0%} |",
    )


if __name__ == "__main__":
    run_entry(main)
