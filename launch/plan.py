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

import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator
from rich.console import Console

from hafrm_ds.config import Positive, PositiveInt, TrainConfig
from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.errors import run_alone

TABLE_WIDTH = 100
"""A table keeps its columns on a narrower terminal, and in a file."""
DEVICE_NUMBERS = ("peak_tflops", "memory_gib", "memory_gbs", "link_gbs", "host_gbs", "network_gbs")
SHORT = {"model": "model.name_or_path", "data": "data.train"}


class PlanOptions(TrainConfig):
    """The run that is planned, and the machines that it is to have."""

    output_dir: Path = Path("runs/planned")
    """Folder of the run, as a written recipe names it."""
    pairs: PositiveInt | None = None
    """Pairs there will be, instead of data."""
    mean_tokens: tuple[PositiveInt, PositiveInt] | None = None
    """PROMPT ANSWER: their mean lengths."""
    gpus: PositiveInt = 8
    """GPUs in one machine."""
    nodes: PositiveInt = 1
    """Machines."""
    device: str = "h100"
    """a100-40, a100-80, h100, h200, b200, l40s or rtx4090."""
    mfu: Annotated[float, Field(gt=0, le=1)] = 0.35
    """Share of the peak that forward and backward reach without recomputation."""
    price: Positive | None = None
    """Of one GPU for an hour."""
    write: Path | None = None
    """Keep what is recommended as a recipe."""
    peak_tflops: Positive | None = None
    """Dense, in the dtype of the run."""
    memory_gib: Positive | None = None
    """Memory of a GPU."""
    memory_gbs: Positive | None = None
    """GB/s of that memory."""
    link_gbs: Positive | None = None
    """GB/s between GPUs of a machine, in one direction."""
    host_gbs: Positive | None = None
    """GB/s between a GPU and its host, in one direction."""
    network_gbs: Positive | None = None
    """GB/s of the network for each GPU, in one direction."""

    @model_validator(mode="before")
    @classmethod
    def pairs_stand_for_data(cls, tree: Any) -> Any:
        data = tree.get("data") or {}
        if tree.get("pairs") and isinstance(data, dict) and not data.get("train"):
            tree = tree | {"data": data | {"train": "pairs that are not there yet"}}
        return tree

    def contradictions(self) -> list[str]:
        problems = super().contradictions()
        if (self.pairs is None) != (self.mean_tokens is None):
            problems.append("--pairs and --mean_tokens belong together")
        return problems


def main() -> None:
    options = load_config(sys.argv[1:], PlanOptions, about=__doc__, short=SHORT)
    from hafrm_ds.capacity.plan import Machines
    from hafrm_ds.capacity.planner import plan_run
    from hafrm_ds.hardware.devices import find_device

    device = find_device(options.device, {name: getattr(options, name) for name in DEVICE_NUMBERS})
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    machines = Machines(device, options.gpus, options.nodes, options.mfu, options.price)
    expected = (options.pairs, *options.mean_tokens) if options.pairs and options.mean_tokens else None
    plan_run(options.run, machines, expected, options.write, console)


if __name__ == "__main__":
    run_alone(main)
