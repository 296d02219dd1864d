"""Plan a run before paying for it: what fits, how long it takes, what it costs, and what to choose.

    python launch/plan.py --model NAME_OR_DIR --data SOURCE [SOURCE ...] --gpus 8 [--nodes 4] --device h100 \
        [--config RECIPE] [--section.key value ...] [--mfu 0.35] [--price PER_GPU_HOUR] [--write RECIPE.yaml]

Takes the options of training, so that the plan is of the run that would be started; --model and --data stand for
--model.name_or_path and --data.train. It reads the model's config.json and no weights. With --pairs N --mean_tokens
PROMPT ANSWER, instead of data, nothing but config.json is needed.

--gpus is the number in one machine, --nodes the number of machines. --device names one of the known devices; what it
has can be given or corrected by --peak_tflops (dense, in the dtype of the run), --memory_gib, --memory_gbs, --link_gbs
(between GPUs of a machine), --host_gbs and --network_gbs (for each GPU), in GB/s of one direction. --mfu is the share
of the peak that forward and backward reach without recomputation. --write keeps what is recommended as a recipe.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from hafrm_ds.capacity.devices import DEVICES, Device
from hafrm_ds.config import TrainConfig
from hafrm_ds.errors import ConfigError, UserError
from hafrm_ds.options import load_config

OVERRIDES = {
    "peak_tflops": ("peak_flops", 1e12),
    "memory_gib": ("memory_gib", 1),
    "memory_gbs": ("memory_bandwidth", 1e9),
    "link_gbs": ("link_bandwidth", 1e9),
    "host_gbs": ("host_bandwidth", 1e9),
    "network_gbs": ("network_bandwidth", 1e9),
}
"""Option -> (field of Device, its unit)."""


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
    for name in OVERRIDES:
        parser.add_argument(f"--{name}", type=float)
    own, rest = parser.parse_known_args(arguments)
    if {"--help", "-h"} & set(rest):
        print(__doc__)
    if bool(own.pairs) != bool(own.mean_tokens):
        raise ConfigError(["--pairs and --mean_tokens belong together"])
    if "--config" not in rest:
        rest = ["--output_dir", "runs/planned", *rest]
    if own.model:
        rest += ["--model.name_or_path", own.model]
    if own.data or own.pairs:
        rest += ["--data.train", f"[{', '.join(map(repr, own.data or ['pairs that are not there yet']))}]"]
    return own, load_config(rest)


def device_of(own: argparse.Namespace) -> Device:
    given = {field: getattr(own, name) * unit for name, (field, unit) in OVERRIDES.items() if getattr(own, name)}
    known = {} if own.device not in DEVICES else vars(DEVICES[own.device])
    if missing := [name for name, (field, _) in OVERRIDES.items() if field not in known | given]:
        named = ", ".join(f"--{name}" for name in missing)
        raise ConfigError([f"--device {own.device} is not known ({', '.join(DEVICES)}), so it needs {named}"])
    return Device(**known | {"name": own.device} | given)


def main() -> int:
    try:
        own, config = read_command_line(sys.argv[1:])
        device = device_of(own)
        from hafrm_ds.capacity.job import plan_run  # after the options are known to be right
        from hafrm_ds.capacity.plan import Machines

        machines = Machines(device, own.gpus, own.nodes, own.mfu, own.price)
        plan_run(config, machines, (own.pairs, *own.mean_tokens) if own.pairs else None, own.write, Console())
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
