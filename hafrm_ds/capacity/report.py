"""A plan as tables for a terminal."""

from collections.abc import Callable

from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from hafrm_ds.capacity.plan import USABLE_SHARE, Option, Plan
from hafrm_ds.data.tables import Cell, Table

GIB = 2**30
MEMORY = (
    "GiB of a GPU (* as configured; GC: gradient checkpointing, some: selective; buffers: gathered weights and "
    "buckets; budget: tokens of the largest micro-batch)"
)
TIME = (
    "Seconds of a step (batches: micro-batches; launch: the host starts the kernels; GB sent: by a GPU; host: Adam on "
    "the CPUs, which is not counted)"
)
SHORT = {False: "", "selective": "some", True: "yes"}


def render(plan: Plan) -> Group:
    """The run, what fits, and what to take."""
    return Group(
        run_table(plan),
        options_table(MEMORY, plan, memory),
        options_table(TIME, plan, lambda option: time(plan, option)),
        *map(Text, conclusion(plan)),
    )


def run_table(plan: Plan) -> Table:
    workload, machines, parameters = plan.workload, plan.machines, plan.parameters
    device, operations, configured = machines.device, plan.operations, plan.configured
    saved = 1 - workload.tokens / workload.separate_tokens
    rows = {
        "model": f"{parameters.all / 1e9:,.3f} billion parameters, {parameters.trained / parameters.all:.2%} trained, "
        f"{plan.config.model.dtype}",
        "machines": f"{machines.nodes} x {machines.gpus} {device.name}: {device.peak_flops / 1e12:,.4g} TFLOP/s and "
        f"{device.memory_gib:g} GiB each, of which {USABLE_SHARE:.0%} is planned with",
        "data": f"{workload.num_groups:,} {workload.unit}; {workload.num_steps:,} steps of "
        f"{workload.global_batch_size}",
        "tokens": f"{workload.tokens:,.0f} in training, layout {workload.layout}"
        + (f" ({saved:.1%} saved by shared prompts)" if saved > 0 else ""),
        "operations": f"{operations.training:.3g} in training, {operations.recomputed:.3g} more where layers are "
        f"recomputed; {plan.reference_operations:.3g} in the reference pass",
        "reference pass": priced(plan, plan.reference_seconds),
        "training as configured": f"{priced(plan, plan.training_seconds(configured))} at {machines.mfu:.0%} MFU"
        + ("" if configured.fits else "; it does not fit"),
        "on disk": f"final/ {size(plan.final_bytes)}, a checkpoint {size(plan.checkpoint_bytes)}, the reference store "
        f"at most {size(plan.store_bytes)}",
    }
    return Table([(name, [Cell(value)]) for name, value in rows.items()], ("Plan", ""), texts=1)


def options_table(title: str, plan: Plan, cells: Callable[[Option], dict[str, str]]) -> RichTable:
    """A row for each way to run; those that do not fit are dim. cells: the figures of one, by their headers."""
    own = (plan.config.deepspeed, plan.config.model.gradient_checkpointing)
    rows = []
    for option in plan.options:
        mark = " *" if (option.deepspeed, option.recomputation) == own else ""
        figures = {"GC": SHORT.get(option.recomputation, str(option.recomputation))} | cells(option)
        rows.append((option.deepspeed.stem + mark, [*map(Cell, figures.values())]))
    table = Table(rows, ("ds_configs/", *figures), title, is_dense=True).to_rich()
    for row, option in zip(table.rows, plan.options, strict=True):
        row.style = "" if option.fits else "dim"
    return table


def memory(option: Option) -> dict[str, str]:
    """GiB of one process."""
    states = option.states
    held = {
        "weights": states.weights,
        "grads": states.gradients,
        "Adam": states.optimizer,
        "buffers": states.gathered + states.buckets,
        "batch": option.working_bytes,
        "peak": option.peak_bytes,
    }
    return {name: f"{value / GIB:,.1f}" for name, value in held.items()} | {
        "fits": "yes" if option.fits else "no",
        "budget": f"{option.largest_budget:,}" if option.largest_budget else "none",
        "host": f"{states.host / GIB:,.1f}" if states.host else "",
    }


def time(plan: Plan, option: Option) -> dict[str, str]:
    """Seconds of a step, and of the training."""
    return {
        "batches": f"{option.partition.micro_batches:.1f}",
        "compute": seconds(option.compute_seconds),
        "launch": seconds(option.launch_seconds),
        "Adam": "host" if option.states.host else seconds(option.optimizer_seconds),
        "GB sent": f"{option.traffic.total / 1e9:,.1f}",
        "sending": seconds(option.traffic_seconds),
        "a step": seconds(option.step_seconds),
        "training": duration(plan.training_seconds(option)),
    }


def conclusion(plan: Plan) -> list[str]:
    best = plan.recommended
    if best is None:
        return [
            f"Nothing fits; the longest of the {plan.workload.unit} has {plan.workload.longest:,} tokens. Take more or "
            "larger GPUs, --model.lora.rank, a smaller --data.max_length, or a smaller model."
        ]
    training = plan.training_seconds(best)
    return [
        f"Recommended: --deepspeed {best.deepspeed} --model.gradient_checkpointing "
        f"{str(best.recomputation).lower()} --batch.max_tokens_per_micro_batch {best.budget}",
        f"{best.peak_bytes / GIB:.1f} GiB of a GPU, {best.step_seconds:.3g} s a step, training {duration(training)}, "
        f"with the reference pass {priced(plan, training + plan.reference_seconds)}",
    ]


def priced(plan: Plan, seconds: float) -> str:
    cost = plan.machines.cost(seconds)
    return duration(seconds) + ("" if cost is None else f" (costs {cost:,.2f})")


def seconds(value: float) -> str:
    return f"{value:.3g}" if value >= 1e-3 else "<0.001"


def duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def size(num_bytes: float) -> str:
    for unit, length in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= length:
            return f"{num_bytes / length:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"
