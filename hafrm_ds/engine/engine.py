"""DeepSpeed around the hybrid model: the only room that knows DeepSpeed."""

import math
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hafrm_ds.config import OptimizerConfig, TrainConfig
from hafrm_ds.data.packing import PackedBatch
from hafrm_ds.engine.checkpoint import FileFacts
from hafrm_ds.engine.deepspeed_config import is_offloaded, resolve_deepspeed_config, zero_stage
from hafrm_ds.engine.gradients import discard, inner_products, own_parts
from hafrm_ds.engine.resharding import Shards, deal_out, is_laid_out_as
from hafrm_ds.engine.shapes import full_numel, full_shape
from hafrm_ds.errors import UserError
from hafrm_ds.hardware.devices import refuse_untried
from hafrm_ds.hardware.measurement import synchronize
from hafrm_ds.model.experts import expert_layers
from hafrm_ds.model.hybrid import HybridModel, freeze_unused_heads
from hafrm_ds.model.lora import add_adapters
from hafrm_ds.objective import ResponseScores
from hafrm_ds.processes.ranks import Processes


def check_build_tools(device: torch.device, deepspeed_config: dict | None = None) -> None:
    """DeepSpeed compiles at the first run: its communication op for CPU, and for GPUs whose optimizer is offloaded its
    Adam for CPU. Name what is missing before it tries.

    A virtual environment's ninja is found although the environment was not activated.

    Args:
        deepspeed_config: of a training; scoring has no optimizer.

    Raises:
        UserError: a tool is missing, or the GPU is one of AMD.
    """
    refuse_untried(device)
    offloads = is_offloaded(deepspeed_config or {}, "offload_optimizer")
    if device.type != "cpu" and not offloads:
        return
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    missing = []
    if not any(map(shutil.which, ("g++", "c++", "clang++"))):
        missing.append("a C++ compiler (Debian: build-essential)")
    if not shutil.which("ninja"):
        missing.append("ninja (pip install ninja)")
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        missing.append("Python.h (Debian: python3-dev)")
    if device.type != "cpu" and cuda_toolkit() is None:
        missing.append("the CUDA toolkit that torch was built for (nvcc on PATH, or CUDA_HOME)")
    if missing:
        what = "a communication op on CPU" if device.type == "cpu" else "its Adam for an offloaded optimizer"
        raise UserError(f"DeepSpeed compiles {what} and needs {', '.join(missing)}")


def cuda_toolkit() -> str | None:
    """Where the CUDA toolkit lies."""
    from torch.utils.cpp_extension import CUDA_HOME

    return CUDA_HOME


@contextmanager
def sharded_loading(deepspeed_config: dict) -> Iterator[None]:
    """Inside, from_pretrained partitions weights over the ranks while it reads them, if the stage is 3."""
    if zero_stage(deepspeed_config) < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    switch = HfDeepSpeedConfig(deepspeed_config)  # in force as long as it lives
    yield
    del switch


class Engine:
    """The model under DeepSpeed, for scoring.

    Args:
        model: as `load_hybrid_model` returns it.
        deepspeed_config: as `resolve_deepspeed_config` returns it.
        training: further arguments of deepspeed.initialize; without an optimizer among them the engine only scores.
    """

    def __init__(self, model: HybridModel, deepspeed_config: dict, **training):
        import deepspeed
        from deepspeed.utils import set_z3_leaf_module

        # Which experts run is another matter on each rank. Under stage 3 a layer of them is fetched and reduced as one.
        for layer in expert_layers(model.causal_lm, full_shape):
            set_z3_leaf_module(layer, True)
        buffers = buffer_dtypes(model)
        self.deepspeed, _, _, _ = deepspeed.initialize(model=model, config=deepspeed_config, **training)
        check_buffers(buffers, buffer_dtypes(model), deepspeed.__version__)
        self.stage = zero_stage(deepspeed_config)
        self.model = model
        if self.stage == 3:
            # Announced before the first forward: DeepSpeed would else find out during it, and its prefetching then
            # stumbles over a forward that needs other parameters than the one before.
            for parameter in model.lm_head.parameters():
                deepspeed.zero.register_external_parameter(model.response_logprobs, parameter)

    @property
    def device(self) -> torch.device:
        return self.deepspeed.device

    @property
    def bytes_of_first_step(self) -> int:
        """Memory that the first optimizer step takes and keeps."""
        return 0

    def __call__(self, batch: PackedBatch, **heads: bool) -> ResponseScores:
        """Scores of a micro-batch, which is moved to the device if it is not there."""
        if batch.input_ids.device != self.device:
            batch = batch.to(self.device)
        return self.deepspeed(batch, **heads)

    @contextmanager
    def gathered(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Inside, sharded parameters are whole on every rank. All ranks enter together."""
        if self.stage < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(parameters)):
            yield


def buffer_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Name -> dtype of each buffer of floating-point numbers, such as the inverse frequencies of rotary embeddings."""
    return {name: buffer.dtype for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def check_buffers(before: dict[str, torch.dtype], after: dict[str, torch.dtype], version: str) -> None:
    """Raises UserError if DeepSpeed has changed the dtype of a buffer while it took over the model: positions in
    bfloat16 are other positions, silently."""
    changed = [
        f"{name} from {dtype} to {after.get(name)}" for name, dtype in before.items() if after.get(name) != dtype
    ]
    if changed:
        raise UserError(
            f"DeepSpeed {version} has turned {len(changed)} buffers of the model into another type ({changed[0]}), "
            "which changes what it computes. Install deepspeed 0.19.5 or newer, below 0.20"
        )


class TrainingEngine(Engine):
    """The model under DeepSpeed: also backward over any number of micro-batches, and the optimizer step."""

    def __init__(self, model: HybridModel, config: TrainConfig, deepspeed_config: dict):
        freeze_unused_heads(model, config.objective)
        groups = parameter_groups(model, config.optimizer)
        self.peak_learning_rates = [group["lr"] for group in groups]
        deepspeed_config, optimizer = make_optimizer(groups, config.optimizer, deepspeed_config)
        super().__init__(model, deepspeed_config, model_parameters=groups, optimizer=optimizer)
        self.gradient_norm = math.nan
        """Of the last step, before clipping."""

    @property
    def bytes_of_first_step(self) -> int:
        """Adam's two moments in fp32. Under stages 1 to 3 DeepSpeed has allocated them at the start."""
        return 0 if self.stage else sum(8 * p.numel() for p in self.model.parameters() if p.requires_grad)

    def backward(self, loss: Tensor, is_last: bool) -> None:
        """Accumulate gradients; with the last micro-batch of a step they are averaged over the ranks."""
        self.deepspeed.set_gradient_accumulation_boundary(is_last)
        self.deepspeed.backward(loss, scale_wrt_gas=False)

    def shared_gradient(self) -> list[Tensor]:
        """A copy of this rank's part of the gradient of what both losses train, in fp32 on the host. All ranks have
        called backward with is_last."""
        return [part.to("cpu", torch.float32, copy=True) for part in self.gradient_parts()]

    def inner_products(self, gradient: Iterable[Tensor]) -> tuple[float, float, float]:
        """Inner products of an earlier `shared_gradient`, a, and the one that is there now, b: a·a, a·b and b·b. All
        ranks call this together."""
        return inner_products(gradient, self.gradient_parts(), self.stage, self.device)

    def gradient_parts(self) -> Iterator[Tensor]:
        synchronize(self.device)  # copies to an offloaded optimizer may be under way
        return own_parts(self.model.shared_parameters(), self.stage)

    def discard_gradients(self) -> None:
        """Clear the gradients instead of stepping. All ranks have called backward with is_last."""
        discard(self.deepspeed, self.stage)

    def step(self, learning_rate_factor: float) -> None:
        """Clip, update the weights, clear the gradients. All ranks have called backward with is_last.

        Sets gradient_norm, the norm before clipping: infinite or NaN when a gradient was not finite.
        """
        for group, peak in zip(self.deepspeed.optimizer.param_groups, self.peak_learning_rates, strict=True):
            group["lr"] = peak * learning_rate_factor
        # DeepSpeed computes no norm under stage 0 in fp32, and then has none of the step before. Gradients are ordinary
        # tensors there, averaged by now, and gone after this step.
        computes_none = self.stage == 0 and self.deepspeed.get_global_grad_norm() is None
        own_norm = self.full_gradient_norm() if computes_none else None
        self.deepspeed.step()
        norm = self.deepspeed.get_global_grad_norm()
        self.gradient_norm = float(own_norm if norm is None and own_norm is not None else norm)

    def save(self, folder: Path) -> dict[str, FileFacts]:
        """Write trained weights and optimizer into `folder`, which is there. All ranks call this together.

        Returns:
            What this rank has written: name relative to folder.parent -> facts.

        Raises:
            OSError, RuntimeError: this rank's files cannot be written; the other ranks come back as well.
        """
        from hafrm_ds.engine.checkpoint_writer import CheckpointWriter

        engine, usual = self.deepspeed, self.deepspeed.checkpoint_engine
        writer = CheckpointWriter()
        engine.checkpoint_engine = writer
        # Scripts that DeepSpeed copies beside a checkpoint: outside of the writer, and a full disk would raise there.
        engine._copy_recovery_script = lambda path: None
        engine.module_state_dict = self.trained_state
        try:
            # Frozen weights, and buffers, are those that the model was loaded with.
            engine.save_checkpoint(folder.parent, tag=folder.name, save_latest=False, exclude_frozen_parameters=True)
        finally:
            engine.checkpoint_engine = usual
            del engine._copy_recovery_script, engine.module_state_dict
        if writer.error is not None:
            raise writer.error
        return {str(path.relative_to(folder.parent)): facts for path, facts in writer.files.items()}

    def trained_state(self, **options) -> dict[str, Tensor]:
        """What DeepSpeed saves of the module, and of that only what is trained: it leaves in the second names of frozen
        tied weights, and the scales of quantised ones."""
        state = type(self.deepspeed).module_state_dict(self.deepspeed, **options)
        trained = {name for name, p in self.model.named_parameters(remove_duplicate=False) if p.requires_grad}
        return {name: tensor for name, tensor in state.items() if name in trained}

    def load(self, folder: Path, zero_stage: int, world_size: int) -> None:
        """Take over what `save` has written under a stage and number of ranks. All ranks call this together.

        Every parameter group keeps the options of this run, and gradients are clipped as this run says.
        """
        optimizer = self.deepspeed.optimizer
        options = [dict(group, params=None) for group in optimizer.param_groups]
        is_alike = (zero_stage, world_size) == (self.stage, dist.get_world_size())
        if self.stage == 0 or (is_alike and self.lies_as_here(folder)):
            # Not strict: what is frozen is not there.
            self.deepspeed.load_checkpoint(folder.parent, tag=folder.name, load_module_strict=False)
        else:
            shards = Shards(folder, zero_stage, world_size)
            deal_out(shards, self.model, optimizer, self.stage, dist.get_rank())
        for group, own in zip(optimizer.param_groups, options, strict=True):
            group.update({name: value for name, value in own.items() if name != "params"})
        if hasattr(optimizer, "clip_grad"):  # torch's own optimizers have none: DeepSpeed's engine clips for them
            optimizer.clip_grad = self.deepspeed.gradient_clipping()

    def lies_as_here(self, folder: Path) -> bool:
        """Whether all ranks have their numbers in a checkpoint of this stage and number of ranks where the engine has
        them. Under other settings of the stage they lie elsewhere, and DeepSpeed's loader does not look. All ranks call
        this together."""
        own = is_laid_out_as(folder, self.deepspeed, self.stage, dist.get_rank())
        agreed = torch.tensor(float(own), device=self.device)
        dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
        return bool(agreed)

    def expected_checkpoint_bytes(self) -> int:
        """About what `save` writes over all ranks: trained weights, their fp32 copies and two moments."""
        return sum(full_numel(p) * (p.element_size() + 12) for p in self.model.parameters() if p.requires_grad)

    def full_gradient_norm(self) -> Tensor:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return nn.utils.get_total_norm(gradients) if gradients else torch.tensor(float("nan"))


def parameter_groups(model: HybridModel, config: OptimizerConfig) -> list[dict]:
    """Trainable parameters in groups: matrices (of the body or its adapters), vectors (never decayed), the heads for
    the reward and attributes.

    A parameter's number of dimensions is read from ds_shape where ZeRO-3 has emptied its own shape.
    """
    heads = [p for head in model.score_heads for p in head.parameters()]
    of_heads = set(heads)
    body = [p for p in model.parameters() if p.requires_grad and p not in of_heads]
    is_matrix = {p: len(full_shape(p)) >= 2 for p in body}
    head_rate = config.reward_head_learning_rate or config.learning_rate
    groups = [
        {"params": [p for p in body if is_matrix[p]], "lr": config.learning_rate, "weight_decay": config.weight_decay},
        {"params": [p for p in body if not is_matrix[p]], "lr": config.learning_rate, "weight_decay": 0.0},
        {"params": [p for p in heads if p.requires_grad], "lr": head_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    groups: list[dict], config: OptimizerConfig, deepspeed_config: dict
) -> tuple[dict, torch.optim.Optimizer | None]:
    """(DeepSpeed configuration, optimizer). AdamW unless the JSON names another kind, which DeepSpeed then builds."""
    section = deepspeed_config.get("optimizer")
    if section and section.get("type", "").lower() not in ("adam", "adamw"):
        return deepspeed_config, None
    deepspeed_config = {key: value for key, value in deepspeed_config.items() if key != "optimizer"}
    options: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.epsilon}
    if is_offloaded(deepspeed_config, "offload_optimizer"):
        if torch.cuda.is_available():
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return deepspeed_config, DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
        # All memory is the host's here. torch's Adam runs there as well, and nothing has to be compiled.
        deepspeed_config = deepspeed_config | {"zero_force_ds_cpu_optimizer": False}
    return deepspeed_config, torch.optim.AdamW(groups, fused=True, **options)


def load_training_engine(
    config: TrainConfig, processes: Processes, attribute_means: Sequence[float] = ()
) -> TrainingEngine:
    """Load the model of a run, with its adapters, and put it under DeepSpeed. The process group has been started.

    Args:
        attribute_means: what the head of model.attributes starts at. Default: 0.
    """
    deepspeed_config = resolve_deepspeed_config(config, processes.world_size, processes.machine_size)
    model = load_under(deepspeed_config, fresh_model(config, processes.device))
    if attribute_means and model.attribute_head is not None:
        with torch.no_grad():  # before it is sharded
            model.attribute_head.bias.copy_(torch.tensor(attribute_means))
    if config.model.lora.rank:
        add_adapters(model.causal_lm, config.model, config.seed)
    return TrainingEngine(model, config, deepspeed_config)


def load_scoring_engine(
    config: TrainConfig, processes: Processes, load: Callable[[], HybridModel] | None = None
) -> Engine:
    """Like `load_training_engine`, without optimizer: parameters are sharded under stage 3 and whole otherwise.

    Args:
        load: gives the model; by default that of a run that starts.
    """
    deepspeed_config = without_optimizer(resolve_deepspeed_config(config, processes.world_size, processes.machine_size))
    return Engine(load_under(deepspeed_config, load or fresh_model(config, processes.device)), deepspeed_config)


def without_optimizer(deepspeed_config: dict) -> dict:
    """A DeepSpeed configuration for scoring: stages 1 and 2 shard only what an optimizer needs, so they become 0."""
    zero = dict(deepspeed_config.get("zero_optimization") or {})
    zero.pop("offload_optimizer", None)
    if zero.get("stage", 0) < 3:
        zero = {"stage": 0}
    kept = {key: value for key, value in deepspeed_config.items() if key not in ("optimizer", "gradient_clipping")}
    return kept | {"zero_optimization": zero}


def fresh_model(config: TrainConfig, device: torch.device) -> Callable[[], HybridModel]:
    """Loads the model that a run starts from, without adapters: they change nothing at the start."""
    from hafrm_ds.model.loading import load_hybrid_model

    return lambda: load_hybrid_model(config.model, layout=config.batch.layout, seed=config.seed, device=device)


def start_collectives() -> None:
    """Let DeepSpeed use the process group, which has been started. All ranks call this together."""
    # torch 2.13 renames collectives that DeepSpeed calls by their old names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed
    from deepspeed.utils import groups

    deepspeed.init_distributed()
    # The group that DeepSpeed makes for itself has torch's own time-out, not that of the run.
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    timeout = dist.distributed_c10d._get_default_group()._get_backend(device).options._timeout
    dist.distributed_c10d._set_pg_timeout(timeout, groups._get_data_parallel_group())
    unlink_shared_buffer()


def load_under(deepspeed_config: dict, load: Callable[[], HybridModel]) -> HybridModel:
    start_collectives()
    with sharded_loading(deepspeed_config):
        return load()


def unlink_shared_buffer() -> None:
    """Take away the name of this rank's buffer for all-reduces on the CPU, once all ranks have opened it: DeepSpeed
    never does, and 66 MiB of memory a rank would outlive every run."""
    dist.barrier()
    address, port = (os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{dist.get_rank()}"
    (Path("/dev/shm") / name).unlink(missing_ok=True)
