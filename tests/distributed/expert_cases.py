"""The cases of cases.py, then steps of a model whose experts are modules of their own, of which each rank
reaches one: `expert_cases.py JSON DEEPSPEED_FILE DEEPSPEED_FILE`.

transformers 5 has the experts of a layer as one parameter. Code that comes with a checkpoint may have a list of them,
and under ZeRO-3 ranks that enter other ones wait for one another for ever, unless the layer is fetched as a whole.
Prints the norms of two gradients for each file.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hafrm_ds.config import TrainConfig
from hafrm_ds.data.packing import lay_out
from hafrm_ds.engine.deepspeed_config import resolve_deepspeed_config
from hafrm_ds.engine.engine import TrainingEngine
from hafrm_ds.processes.ranks import Processes, run_entry
from tests.distributed import cases
from tests.tiny_models import random_items, tiny_hybrid, use_layout


class PlantedExperts(nn.Module):
    """A layer whose router sends every token to the expert of this rank, as far as there is one."""

    def __init__(self, hidden_size: int, rank: int):
        super().__init__()
        self.rank = rank
        self.gate = nn.Linear(hidden_size, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(4))

    def forward(self, states: Tensor) -> Tensor:
        weight = self.gate(states).softmax(-1)[..., self.rank, None]
        return weight * self.experts[self.rank](states)


def planted_norms(stage_file: str, rank: int, world_size: int) -> list[float]:
    given = {
        "output_dir": "unused",
        "model": {"name_or_path": "unused", "dtype": "float32"},
        "data": {"train": "unused"},
    }
    config = TrainConfig.model_validate(given | {"deepspeed": stage_file})
    model = tiny_hybrid("mixtral")
    torch.manual_seed(1)
    for layer in model.causal_lm.model.layers:
        layer.mlp = PlantedExperts(32, rank)
    use_layout(model, "shared_prefix")
    engine = TrainingEngine(model, config, resolve_deepspeed_config(config, world_size))
    norms = []
    for step in range(2):
        engine.backward(engine(lay_out(random_items(step * world_size + rank), "shared_prefix")).logprob.mean(), True)
        engine.step(learning_rate_factor=1.0)
        norms.append(engine.gradient_norm)
    return norms


def main(arguments: list[str], processes: Processes) -> None:
    cases.main(arguments, processes)
    for stage_file in arguments[-2:]:
        norms = planted_norms(stage_file, dist.get_rank(), dist.get_world_size())
        if processes.rank == 0:
            print(f"planted: {norms[0]:.6f} {norms[1]:.6f}", flush=True)


if __name__ == "__main__":
    run_entry(main)
