"""How near a joint step comes to the matrix-product peak of this machine, beside plain transformers on as many tokens.

    python tests/benchmarks/roofline.py --config FILE.yaml [--section.key value ...]

One process, no DeepSpeed: the computation of a step, forward and backward of batch.global_batch_size pairs in one
micro-batch. Plain transformers runs its causal LM densely on the same number of tokens, in rows of equal length with
labels everywhere, so with nothing but matrix products, its own kernels and the logits of every token. Both alternate;
every round measures the peak anew. Useful FLOPs: products of the body, of attention where a key is visible, and of the
LM head at predicted tokens, forward and twice that for backward, nothing for recomputation.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM

from hafrm_ds.config import TrainConfig
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.micro_batches import MicroBatch, make_micro_batch
from hafrm_ds.data.planning import BatchPlan
from hafrm_ds.data.preparation import prepare_groups
from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.hardware.flops import ForwardCost
from hafrm_ds.hardware.measurement import measure_matmul_peak, synchronize
from hafrm_ds.model.hybrid import HybridModel
from hafrm_ds.model.loading import DTYPES, load_hybrid_model, load_tokenizer
from hafrm_ds.objective import joint_loss, weights_at

ROUNDS = 8
WARM_UP = 2


def joint_step(config: TrainConfig, model: HybridModel, micro_batch: MicroBatch, device: torch.device) -> None:
    micro_batch, objective = micro_batch.to(device), config.objective
    scores = model(micro_batch.batch, with_reward=objective.uses_reward, with_logprob=objective.uses_policy)
    reference = None if scores.logprob is None else scores.logprob.detach()
    loss = joint_loss(objective, weights_at(objective, 0), scores, reference, micro_batch.comparisons)
    loss.total.mean().backward()
    model.zero_grad()


def dense_step(model: torch.nn.Module, input_ids: torch.Tensor) -> None:
    model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
    model.zero_grad()


def dense_flops(cost: ForwardCost, rows: int, length: int) -> float:
    visible_keys = length * (length + 1) // 2
    forward = rows * (length * (cost.per_token + cost.per_response_token) + visible_keys * cost.per_visible_key)
    return 3 * forward


def seconds(device: torch.device, work: Callable, *arguments) -> float:
    synchronize(device)
    started = time.perf_counter()
    work(*arguments)
    synchronize(device)
    return time.perf_counter() - started


def main() -> None:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as run_entry does; both contenders have it
    config = load_config(sys.argv[1:])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    formatter = ChatFormatter.create(load_tokenizer(config.model), config.data.chat_template, config.data.template_date)
    pairs = prepare_groups(
        config.data.train, formatter=formatter, options=config.data.preparation, role="train", seed=config.seed
    )
    plan = BatchPlan(len(pairs), config.batch.global_batch_size, config.seed)
    ours = load_hybrid_model(config.model, layout="shared_prefix", seed=config.seed, device=device).to(device)
    plain = AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=DTYPES[config.model.dtype]).to(device)
    cost = ForwardCost.of(ours.causal_lm)

    shares: dict[str, list[float]] = {"joint step": [], "plain transformers, dense": []}
    tokens, peaks = [], []
    for number in range(WARM_UP + ROUNDS):
        micro_batch = make_micro_batch(pairs, plan.global_batch(number), ours.layout)
        rows = config.batch.global_batch_size
        length = round(micro_batch.batch.num_positions / rows)
        input_ids = torch.randint(plain.config.vocab_size, (rows, length), device=device)
        peak = measure_matmul_peak(device, ours.causal_lm.dtype)
        useful = cost.training_flops(micro_batch.batch, config.objective.uses_policy)
        took = seconds(device, joint_step, config, ours, micro_batch, device)
        took_dense = seconds(device, dense_step, plain, input_ids)
        if number >= WARM_UP:
            shares["joint step"].append(useful / took / peak)
            shares["plain transformers, dense"].append(dense_flops(cost, rows, length) / took_dense / peak)
            tokens.append(micro_batch.batch.num_positions)
            peaks.append(peak)
    print(
        f"peak {statistics.median(peaks) / 1e9:.0f} GFLOP/s, {statistics.median(tokens):.0f} tokens a step, "
        f"{ROUNDS} rounds, {torch.get_num_threads()} threads\n"
    )
    print("| | share of the peak, median | lowest | highest |\n|---|---|---|---|")
    for name, values in shares.items():
        print(f"| {name} | {statistics.median(values):.1%} | {min(values):.1%} | {max(values):.1%} |")


if __name__ == "__main__":
    main()
