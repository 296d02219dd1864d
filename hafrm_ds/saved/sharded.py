"""A trained model under ZeRO-3, for one that does not fit on a single GPU: all ranks score each batch together."""

from pathlib import Path

from hafrm_ds.config import TrainConfig
from hafrm_ds.data.packing import PackedBatch
from hafrm_ds.engine.deepspeed_config import deepspeed_problems
from hafrm_ds.engine.engine import Engine, check_build_tools, load_scoring_engine
from hafrm_ds.errors import ConfigError, ModelError
from hafrm_ds.objective import ResponseScores
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.saved.folder import SavedModel
from hafrm_ds.saved.opening import SavedScorer, load_scorer
from hafrm_ds.saved.policy import SavedPolicy
from hafrm_ds.saved.scorer import Scorer


class ShardedModel(Scorer):
    """A model whose parameters lie on all ranks. They call its methods together, with equal arguments.

    Build it with `load`.
    """

    def __init__(self, engine: Engine, saved: SavedModel | SavedPolicy, max_tokens: int):
        model = engine.model
        super().__init__(saved.formatter(), model.causal_lm.config, layout=model.layout, max_tokens=max_tokens)
        self.engine, self.heads, self.attributes = engine, saved.heads, saved.attributes
        self.ranks_on = engine.device

    @classmethod
    def load(
        cls, saved: SavedModel | SavedPolicy, deepspeed: Path, max_tokens: int, processes: Processes
    ) -> "ShardedModel":
        """Load a saved model under a DeepSpeed JSON. The process group has been started.

        Raises:
            ConfigError: the JSON cannot be used.
        """
        # Of a run only the model matters here.
        given = {"output_dir": ".", "deepspeed": deepspeed, "model": saved.config, "data": {"train": "."}}
        config = TrainConfig.model_validate(given)
        if problems := deepspeed_problems(config):
            raise ConfigError(problems)
        engine = load_scoring_engine(config, processes, lambda: saved.hybrid_model(processes.device))
        return cls(engine, saved, max_tokens)

    def forward(self, batch: PackedBatch, **heads: bool) -> ResponseScores:
        return self.engine(batch, **heads)


def load_for_job(saved: SavedScorer, deepspeed: Path | None, max_tokens: int, processes: Processes) -> Scorer:
    """Load a model; all processes call this together.

    Args:
        deepspeed: a DeepSpeed JSON, if the model is sharded.

    Raises:
        ModelError: the model cannot be loaded, or cannot be sharded.
    """
    if deepspeed is None:
        processes.use_device()
        return load_scorer(saved, processes.device, max_tokens)
    if not isinstance(saved, SavedModel | SavedPolicy) or "layout" not in saved.metadata:
        raise ModelError(
            f"{saved.folder}: --deepspeed shards models of a training with hafrm_ds alone, and one of them at a time"
        )
    check_build_tools(processes.device)
    processes.start_group()
    return ShardedModel.load(saved, deepspeed, max_tokens, processes)
