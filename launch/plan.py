r"""Plan a run before paying for it: what fits, how long it takes, what it costs, and what to choose.

    python launch/plan.py --model NAME_OR_DIR --data SOURCE [SOURCE ...] --gpus 8 [--nodes 4] --device h100 \
        [--config RECIPE] [--section.key value ...] [--mfu 0.35] [--price PER_GPU_HOUR] [--write RECIPE.yaml]

Takes the options of training, so that the plan is of the run that would be started; --model and --data stand for
--model.name_or_path and --data.train. It reads the model's config.json and no weights. With --pairs N --mean_tokens
PROMPT ANSWER, instead of data, nothing but config.json is needed.

--gpus is the number in one machine (8), --nodes the number of machines (1). --device is a100-40, a100-80, h100 (the
default), h200, b200, l40s or rtx4090; what it has can be given or corrected by --peak_tflops (dense, in the dtype of
the run), --memory_gib, --memory_gbs, --link_gbs (between GPUs of a machine), --host_gbs and --network_gbs (for each
GPU), in GB/s of one direction. --mfu is the share of the peak that forward and backward reach without recomputation
(0.35). --write keeps what is recommended as a recipe.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from hafrm_ds.config import TrainConfig
from hafrm_ds.errors import ConfigError, run_alone
from hafrm_ds.options import load_config

TABLE_WIDTH = 100
"""A table keeps its columns on a narrower terminal, and in a file."""
DEVICE_NUMBERS = ("peak_tflops", "memory_gib", "memory_gbs", "link_gbs", "host_gbs", "network_gbs")


def read_command_line(arguments: list[str]) -> tuple[argparse.Namespace, TrainConfig]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model")
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--pairs", type=int)
    parser.add_argument("--mean_tokens", type=int, nargs=2, metavar=("PROMPT", "ANSWER"))
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--device", default="h100")
    parser.add_argument("--mfu", type=float, default=0.35)
    parser.add_argument("--price", type=float)
    parser.add_argument("--write", type=Path)
    for name in DEVICE_NUMBERS:
        parser.add_argument(f"--{name}", type=float)
    own, rest = parser.parse_known_args(arguments)
    numbers = {name: getattr(own, name) for name in ("gpus", "nodes", "pairs", "mfu", "price", *DEVICE_NUMBERS)}
    problems = [
        f"--{name} is {value}; it must be above 0"
        for name, value in numbers.items()
        if value is not None and value <= 0
    ]
    if own.mfu > 1:
        problems.append(f"--mfu is {own.mfu}; it is a share of the peak, so at most 1")
    if bool(own.pairs) != bool(own.mean_tokens):
        problems.append("--pairs and --mean_tokens belong together")
    names = {word.partition("=")[0] for word in rest}
    if not (own.data or own.pairs or names & {"--config", "--data.train", "--help", "-h"}):
        problems.append("give --data SOURCE, or --pairs N with --mean_tokens PROMPT ANSWER")
    if problems:
        raise ConfigError(problems)
    if "--config" not in rest:
        rest = ["--output_dir", "runs/planned", *rest]
    if own.model:
        rest += ["--model.name_or_path", own.model]
    if own.data or own.pairs:
        rest += ["--data.train", json.dumps(own.data or ["pairs that are not there yet"])]
    return own, load_config(rest, about=__doc__, own=vars(own))


def main() -> None:
    own, config = read_command_line(sys.argv[1:])
    from hafrm_ds.capacity.plan import Machines
    from hafrm_ds.capacity.planner import plan_run
    from hafrm_ds.hardware.devices import find_device

    device = find_device(own.device, {name: getattr(own, name) for name in DEVICE_NUMBERS})
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    machines = Machines(device, own.gpus, own.nodes, own.mfu, own.price)
    plan_run(config, machines, (own.pairs, *own.mean_tokens) if own.pairs else None, own.write, console)


if __name__ == "__main__":
    run_alone(main)
