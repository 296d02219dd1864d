"""How strongly each loss pulls the shared body: norms of the two gradients, and the angle between them.

    python tests/benchmarks/gradient_shares.py --config FILE.yaml [--section.key value ...] [--final RUN/final]

Of the first 32 pairs that a run would see, under the weights that it starts from (with a fresh reward head), and under
those that a training has left (--final). The gradient of the policy loss is given as it enters the joint loss, times
objective.alpha.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hafrm_ds.config import TrainConfig
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.micro_batches import MicroBatch, make_micro_batch
from hafrm_ds.data.planning import BatchPlan
from hafrm_ds.data.preparation import prepare_groups
from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.model.hybrid import HybridModel
from hafrm_ds.model.loading import load_hybrid_model, load_tokenizer
from hafrm_ds.objective import joint_loss, weights_at
from hafrm_ds.saved.folder import SavedModel

NUM_PAIRS, PAIRS_AT_ONCE = 32, 4


def body_gradient(config: TrainConfig, model: HybridModel, batches: Sequence[MicroBatch], loss_name: str) -> Tensor:
    """Gradient of the mean of one loss over all pairs with respect to the body: [parameters] fp32."""
    objective = config.objective
    if loss_name == "reward":
        objective = objective.model_copy(update={"alpha": 0.0})
    model.zero_grad()
    for each in batches:
        scores = model(each.batch, with_reward=True, with_logprob=objective.uses_policy)
        loss = joint_loss(objective, weights_at(objective, 0), scores, each.reference, each.comparisons)
        (getattr(loss, loss_name).sum() / NUM_PAIRS).backward()
    body = model.causal_lm.get_decoder().parameters()
    return torch.cat([parameter.grad.float().flatten() for parameter in body])


def with_references(model: HybridModel, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """The micro-batches with the log-probs of `model` as those of the reference."""
    with torch.no_grad():
        logprobs = [model(each.batch, with_reward=False, with_logprob=True).logprob for each in batches]
    return [replace(each, reference=logprob) for each, logprob in zip(batches, logprobs)]


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--final", type=Path)
    own, rest = parser.parse_known_args(sys.argv[1:])
    config = load_config(rest, about=__doc__)
    device = torch.device("cpu")
    formatter = ChatFormatter.create(load_tokenizer(config.model), config.data.chat_template, config.data.template_date)
    pairs = prepare_groups(
        config.data.train, formatter=formatter, options=config.data.preparation, role="train", seed=config.seed
    )
    plan = BatchPlan(len(pairs), config.batch.global_batch_size, config.seed)
    steps = -(-NUM_PAIRS // config.batch.global_batch_size)
    order = np.concatenate([plan.global_batch(step) for step in range(steps)])[:NUM_PAIRS]
    start = load_hybrid_model(config.model, layout="shared_prefix", seed=config.seed, device=device)
    batches = [
        make_micro_batch(pairs, order[k : k + PAIRS_AT_ONCE], "shared_prefix")
        for k in range(0, NUM_PAIRS, PAIRS_AT_ONCE)
    ]
    batches = with_references(start, batches)
    models = {"before training": start}
    if own.final is not None:
        models[f"after {own.final}"] = SavedModel.open(own.final).hybrid_model(device).requires_grad_(True)
    print("| weights | reward loss | alpha times policy loss | share of the second | cosine |\n|---|---|---|---|---|")
    for name, model in models.items():
        reward = body_gradient(config, model, batches, "reward")
        policy = weights_at(config.objective, 0).policy * body_gradient(config, model, batches, "policy")
        norms = [float(vector.norm()) for vector in (reward, policy)]
        cosine = float(reward @ policy) / (norms[0] * norms[1])
        print(f"| {name} | {norms[0]:.3g} | {norms[1]:.3g} | {norms[1] / sum(norms):.0%} | {cosine:+.2f} |")


if __name__ == "__main__":
    main()
