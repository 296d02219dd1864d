"""The plan of a run before it is paid for: what fits, how long it takes, what it costs, and what to choose."""

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from hafrm_ds.capacity.shapes import count_parameters
from hafrm_ds.capacity.traffic import Traffic, step_traffic
from hafrm_ds.capacity.working_memory import Pass, WorkingMemory, recomputed_bytes, working_bytes
from hafrm_ds.capacity.workload import Operations, Partition, Workload
from hafrm_ds.capacity.zero import FP32, Parameters, StateBytes, ZeroSettings, state_bytes
from hafrm_ds.config import TrainConfig
from hafrm_ds.data.content_keys import KEY_BYTES
from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.engine.deepspeed_config import REPOSITORY, resolve_deepspeed_config
from hafrm_ds.errors import ModelError
from hafrm_ds.hardware.devices import Device
from hafrm_ds.hardware.flops import ForwardCost
from hafrm_ds.model.hybrid import HybridModel
from hafrm_ds.model.recomputation import recomputed_layers

USABLE_SHARE = 0.9
"""Share of a device's memory that is planned with. The rest is left to its driver, the libraries of communication, and
fragments."""
ADAM_BYTES = 7 * FP32
"""Bytes that Adam reads and writes for a parameter: gradient, weight and two moments in, the last three out."""
STORE_ROW_BYTES = KEY_BYTES + 4 + 4
"""Bytes of a value in the reference store: key, log-prob, number of tokens."""
ROUNDING = 64
ABOUT_EQUAL = 1.02
"""Times of a step that differ by less than the plan can know."""
LAUNCH_SECONDS = {0: (0.75e-3, 0.75e-3), 1: (0.75e-3, 0.75e-3), 2: (0.75e-3, 1.25e-3), 3: (3.7e-3, 2.8e-3)}
"""ZeRO stage -> seconds in which the host starts the kernels of a layer for a micro-batch, in forward and in backward,
on one core of a server's processor (tests/benchmarks/README.md)."""
SELECTIVE_SECONDS = 1.1e-3
"""Seconds of the host that selective recomputation adds for a layer, as it looks at each operation: in forward, and
again in recomputation."""
SIMPLEST_FIRST = ("zero1", "zero2", "zero3", "zero3_hpz", "zero0", "zero3_offload_optimizer", "zero3_offload")


@dataclass(frozen=True)
class Machines:
    """The machines of a run. mfu: share of the peak that forward and backward are expected to reach, without
    recomputation. price: of a GPU for an hour."""

    device: Device
    gpus: int
    nodes: int
    mfu: float
    price: float | None = None
    device_type: str = "cuda"

    @property
    def num_processes(self) -> int:
        return self.gpus * self.nodes

    @property
    def flops(self) -> float:
        """Operations a second of all GPUs together, at the expected MFU."""
        return self.num_processes * self.device.peak_flops * self.mfu

    @property
    def usable_bytes(self) -> float:
        return USABLE_SHARE * self.device.memory_gib * 2**30

    def cost(self, seconds: float) -> float | None:
        return None if self.price is None else self.price * self.num_processes * seconds / 3600


@dataclass(frozen=True)
class Option:
    """One way to run: a DeepSpeed file, and what backward recomputes, as model.gradient_checkpointing.

    budget: tokens of a micro-batch that it is planned with; largest_budget: that fit; 0: not even the longest group.
    usable_bytes: of a device. states, working_bytes: of a process. kept_bytes: of what forward and backward have
    freed that the allocator has not given back when the optimizer steps. partition: of a step under `budget`. traffic,
    compute_seconds, launch_seconds, optimizer_seconds, traffic_seconds: of a step; the second is the host's, who starts
    kernels while a GPU computes. overlaps: whether it sends while it computes.
    """

    deepspeed: Path
    zero: ZeroSettings
    recomputation: bool | str
    budget: int
    largest_budget: int
    usable_bytes: float
    states: StateBytes
    working_bytes: float
    kept_bytes: float
    partition: Partition
    traffic: Traffic
    compute_seconds: float
    launch_seconds: float
    optimizer_seconds: float
    traffic_seconds: float
    overlaps: bool

    @property
    def peak_bytes(self) -> float:
        """Most bytes of the device at a time: in forward and backward, or in the optimizer step."""
        return max(self.states.held + self.working_bytes, self.states.in_optimizer_step + self.kept_bytes)

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.usable_bytes

    @property
    def step_seconds(self) -> float:
        """On GPUs stage 3, and stage 2 with overlap_comm, send while they compute; the others, and all on CPUs, when
        that is done. The weights that stage 2 gathers after its step are counted as if it computed meanwhile."""
        busy = max(self.compute_seconds, self.launch_seconds)
        if self.overlaps:
            return max(busy, self.traffic_seconds) + self.optimizer_seconds
        return busy + self.traffic_seconds + self.optimizer_seconds


@dataclass(frozen=True)
class Plan:
    """A run on given machines. The model is one of `model_of_shapes`."""

    config: TrainConfig
    model: HybridModel
    workload: Workload
    machines: Machines

    @cached_property
    def cost(self) -> ForwardCost:
        return ForwardCost.of(self.model.causal_lm)

    @cached_property
    def parameters(self) -> Parameters:
        return count_parameters(self.model, self.config.model.lora.quantize)

    @cached_property
    def operations(self) -> Operations:
        return self.workload.operations(self.cost, self.config.objective.uses_policy)

    @property
    def reference_operations(self) -> float:
        """Operations of the reference pass; 0 for an objective without reference."""
        return self.workload.reference_operations(self.cost) if self.config.objective.uses_reference else 0.0

    @property
    def reference_seconds(self) -> float:
        return self.reference_operations / self.machines.flops

    def training_seconds(self, option: Option) -> float:
        """Seconds of all steps; evaluations and checkpoints come on top."""
        return self.workload.num_steps * option.step_seconds

    @property
    def final_bytes(self) -> int:
        """Bytes of the model in final/, in the dtype of the run; adapters are merged into it, and stand beside it."""
        merged = self.parameters.frozen if self.config.model.lora.rank else self.parameters.all
        return self.parameters.weight_bytes * (merged + (self.parameters.trained if self.config.model.lora.rank else 0))

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint, as `TrainingEngine.expected_checkpoint_bytes`."""
        return self.parameters.trained * (self.parameters.weight_bytes + 3 * FP32)

    @property
    def store_bytes(self) -> int:
        """Most bytes of the reference store: answers that stand in several groups are kept once."""
        if not self.config.objective.uses_reference:
            return 0
        workload = self.workload
        used = workload.lengths.num_responses[workload.batch_plan.groups_until(workload.num_steps)].sum()
        return STORE_ROW_BYTES * int(used + len(workload.eval_lengths.response))

    @cached_property
    def options(self) -> list[Option]:
        """Every DeepSpeed file that comes along, and the run's own, each with every kind of recomputation, under the
        run's token budget; under the largest that fits if that is to be found."""
        own = self.config.batch.max_tokens_per_micro_batch
        return [self.option(file, kind, own) for kind in self.kinds for file in self.settings]

    @property
    def kinds(self) -> list[bool | str]:
        """Lists the kinds of recomputation that may be recommended, from little to much. every_N is among them only if
        the run asks for it: keeping products saves as much in less time."""
        return list(self.working_memory)

    @cached_property
    def configured(self) -> Option:
        """The run as it stands."""
        config = self.config
        budget = config.batch.max_tokens_per_micro_batch
        return self.option(config.deepspeed, config.model.gradient_checkpointing, budget)

    @cached_property
    def recommended(self) -> Option | None:
        """The fastest of those that fit, the simpler one where two are about equal; None: nothing fits.

        Offload is taken where nothing else fits, as a step of the host's own processor is not among the times. So is
        stage 0 with bfloat16 weights on several GPUs: it sums the gradients of micro-batches in bfloat16.
        """
        fitting = [option for option in self.options if option.largest_budget]
        preferred = [option for option in fitting if not self.is_last_resort(option)] or fitting
        best = [self.option(option.deepspeed, option.recomputation, "auto") for option in preferred]
        fastest = min((option.step_seconds for option in best), default=0.0)
        return next((option for option in best if option.step_seconds <= ABOUT_EQUAL * fastest), None)

    def is_last_resort(self, option: Option) -> bool:
        loses_bits = option.zero.stage == 0 and self.parameters.weight_bytes < FP32
        return option.zero.offloads_optimizer or option.zero.offloads_parameters or loses_bits

    def recipe(self, option: Option) -> TrainConfig:
        """The configuration of the run with the choices of an option."""
        model = self.config.model.model_copy(update={"gradient_checkpointing": option.recomputation})
        batch = self.config.batch.model_copy(update={"max_tokens_per_micro_batch": option.budget})
        return self.config.model_copy(update={"deepspeed": option.deepspeed, "model": model, "batch": batch})

    @cached_property
    def settings(self) -> dict[Path, ZeroSettings]:
        """The DeepSpeed files, the simplest first. Stage 3 has no quantised weights and no compiled layers."""
        files = {Path("ds_configs") / file.name for file in (REPOSITORY / "ds_configs").glob("*.json")}
        order = {name: place for place, name in enumerate(SIMPLEST_FIRST)}
        found = {}
        for file in sorted({*files, self.config.deepspeed}, key=lambda file: (order.get(file.stem, len(order)), file)):
            config = self.config.model_copy(update={"deepspeed": file})
            resolved = resolve_deepspeed_config(config, self.machines.num_processes, self.machines.gpus)
            zero = ZeroSettings.of(resolved)
            if zero.stage < 3 or not (config.model.lora.quantize != "none" or config.model.fused == "compile_layers"):
                found[file] = zero
        return found

    def micro_batch_pass(self, kind: bool | str) -> Pass:
        objective, layout, device_type = self.config.objective, self.workload.layout, self.machines.device_type
        return Pass(
            layout,
            device_type,
            objective.uses_reward,
            objective.uses_policy,
            log_probs=self.config.model.log_probs,
            fused=self.is_fused,
            recomputation=kind,
        )

    @property
    def is_fused(self) -> bool:
        """Whether the layers of the run have fused norms, rotary embeddings and gates. Of a GPU that is not here it is
        supposed that liger-kernel is installed there if it is here."""
        kind = self.config.model.fused
        if kind == "auto":
            return self.machines.device_type == "cuda" and find_spec("liger_kernel") is not None
        return kind != "off"

    @cached_property
    def working_memory(self) -> dict[bool | str, WorkingMemory]:
        """By kind of recomputation: what any large number of tokens takes. Without one that the model cannot."""
        found, own = {}, self.config.model.gradient_checkpointing
        for kind in dict.fromkeys([False, "selective", own, True]):
            try:
                found[kind] = WorkingMemory.of(self.model, [self.usual_item], self.micro_batch_pass(kind))
            except ModelError:
                if kind != "selective" or own == kind:
                    raise
        return found

    @cached_property
    def traced(self) -> dict[tuple[bool | str, int], float]:
        """Holds what has been traced so far: (kind of recomputation, number of usual groups) -> bytes."""
        return {}

    def working_bytes(self, kind: bool | str, num_tokens: int) -> float:
        """Bytes of one micro-batch, also of a small one whose logits do not fill a block."""
        tokens_of_group = len(self.usual_item.prompt) + sum(map(len, self.usual_item.responses))
        num_groups = max(1, num_tokens // tokens_of_group)
        if (kind, num_groups) not in self.traced:
            items = [self.usual_item] * num_groups
            self.traced[kind, num_groups] = working_bytes(self.model, items, self.micro_batch_pass(kind))
        rest = num_tokens - num_groups * tokens_of_group
        return self.traced[kind, num_groups] + rest * self.working_memory[kind].per_token

    @cached_property
    def recomputed_bytes(self) -> float:
        """Bytes that selective recomputation reads and writes besides, for each token."""
        return recomputed_bytes(self.model, [self.usual_item], self.micro_batch_pass("selective"))

    def compute_seconds(self, kind: bool | str) -> float:
        """Seconds that a step computes, if the processes never wait for one another."""
        workload, device, n = self.workload, self.machines.device, self.machines.num_processes
        share = recomputed_layers(kind, self.num_layers) / self.num_layers
        # The padded layout computes its padding, too, though it is not among the operations that are needed.
        needed = workload.separate_tokens if workload.layout == "padded" else workload.tokens
        work = (self.operations.training + share * self.operations.recomputed) * workload.tokens / needed
        moved = self.recomputed_bytes * workload.tokens / n if kind == "selective" else 0.0
        return (work / self.machines.flops + moved / device.memory_bandwidth) / workload.num_steps

    def launch_seconds(self, stage: int, kind: bool | str, micro_batches: float) -> float:
        """Seconds that the host needs to start the kernels of a step. On CPUs they are part of the measured MFU."""
        if self.machines.device_type == "cpu":
            return 0.0
        forward, backward = LAUNCH_SECONDS[stage]
        again = recomputed_layers(kind, self.num_layers) / self.num_layers * forward
        if kind == "selective":
            again = forward + 2 * SELECTIVE_SECONDS
        return micro_batches * self.num_layers * (forward + backward + again)

    @property
    def num_layers(self) -> int:
        return self.model.causal_lm.config.get_text_config().num_hidden_layers

    @property
    def usual_item(self) -> PromptWithResponses:
        """A group of mean lengths."""
        lengths = self.workload.lengths
        prompt, answer, number = (
            max(1, round(each.mean())) for each in (lengths.prompt, lengths.response, lengths.num_responses)
        )
        return PromptWithResponses([0] * prompt, ([0] * answer,) * number)

    def option(self, file: Path, kind: bool | str, budget: int | Literal["auto"]) -> Option:
        """One way to run, under a token budget or with "auto" the largest that fits."""
        machines, workload, parameters = self.machines, self.workload, self.parameters
        n, zero, line = machines.num_processes, self.settings[file], self.working_memory[kind]

        def states_of(micro_batches: float) -> StateBytes:
            return state_bytes(
                parameters, zero, n, accumulates=micro_batches > 1, touched_only=machines.device_type == "cpu"
            )

        states = states_of(micro_batches=2)
        room = machines.usable_bytes - states.held
        largest = min(line.largest_budget(room), workload.largest_useful_budget(n)) // ROUNDING * ROUNDING
        if largest < workload.longest or states.in_optimizer_step > machines.usable_bytes:
            largest = 0
        tokens = max(largest, workload.longest) if isinstance(budget, str) else budget
        partition = workload.partition(n, max(tokens, workload.longest))
        held = states_of(partition.micro_batches)
        traffic = step_traffic(parameters, zero, n, machines.gpus, partition.micro_batches)
        adam = ADAM_BYTES * parameters.trained / (n if zero.stage else 1) / machines.device.memory_bandwidth
        return Option(
            deepspeed=file,
            zero=zero,
            recomputation=kind,
            budget=tokens,
            largest_budget=largest,
            usable_bytes=machines.usable_bytes,
            states=held,
            working_bytes=self.working_bytes(kind, partition.heaviest),
            # malloc unmaps blocks of 32 MiB and more, as logits, and holds on to smaller ones; torch uses the freed
            # memory of a GPU again.
            kept_bytes=line.per_token * partition.heaviest + held.gathered if machines.device_type == "cpu" else 0.0,
            partition=partition,
            traffic=traffic,
            compute_seconds=self.compute_seconds(kind) / (1 - partition.waiting),
            launch_seconds=self.launch_seconds(zero.stage, kind, partition.micro_batches),
            optimizer_seconds=0.0 if zero.offloads_optimizer else adam,
            traffic_seconds=traffic.seconds(machines.device, machines.gpus, machines.nodes),
            # Stage 1 in bfloat16 knows no overlap_comm.
            overlaps=zero.overlaps and zero.stage > 1 and machines.device_type == "cuda",
        )
