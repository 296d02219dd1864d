"""A trained model under ZeRO-3, for one that does not fit on a single GPU: all ranks score each batch together."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from hafrm_ds.config import TrainConfig
from hafrm_ds.data.packing import PackedBatch
from hafrm_ds.errors import ConfigError
from hafrm_ds.model.policy import SavedPolicy
from hafrm_ds.model.saved import SavedModel
from hafrm_ds.model.scorer import Scorer
from hafrm_ds.objective import ResponseScores
from hafrm_ds.training.deepspeed_config import deepspeed_contradictions, read_deepspeed_json
from hafrm_ds.training.engine import Engine, load_scoring_engine
from hafrm_ds.training.processes import Processes


class ShardedModel(Scorer):
    """A model whose parameters lie on all ranks. They call its methods together, with equal arguments.

    Build it with `load`.
    """

    def __init__(self, engine: Engine, saved: SavedModel | SavedPolicy, max_tokens: int):
        model = engine.model
        super().__init__(saved.formatter(), model.causal_lm.config, layout=model.layout, max_tokens=max_tokens)
        self.engine, self.heads = engine, saved.heads
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()

    @classmethod
    def load(
        cls, saved: SavedModel | SavedPolicy, deepspeed: Path, max_tokens: int, processes: Processes
    ) -> "ShardedModel":
        """Load a saved model under a DeepSpeed JSON. The process group has been started.

        Raises:
            ConfigError: the JSON cannot be used.
        """
        # Of a run only the model matters here.
        config = TrainConfig(output_dir=".", deepspeed=deepspeed, model=saved.config, data={"train": "."})
        content, problems = read_deepspeed_json(deepspeed)
        if content is not None:
            problems += deepspeed_contradictions(content, config)
        if problems:
            raise ConfigError(problems)
        engine = load_scoring_engine(config, processes, lambda: saved.hybrid_model(processes.device))
        return cls(engine, saved, max_tokens)

    def forward(self, batch: PackedBatch, **heads: bool) -> ResponseScores:
        return self.engine(batch, **heads)

    def of_all_ranks(self, values: dict[int, Any]) -> dict[int, Any]:
        gathered: list = [None] * self.num_ranks
        dist.all_gather_object(gathered, values)
        return {position: value for part in gathered for position, value in part.items()}
