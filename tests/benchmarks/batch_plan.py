"""Time to plan one optimizer step: its pairs, their partition into micro-batches and the imbalance between the ranks.

    python tests/benchmarks/batch_plan.py

Lengths are log-normal, as those of chats are; the least of five times, in milliseconds of the processor. Prints a
Markdown table.
"""

import time
from collections.abc import Callable
from functools import partial

import numpy as np

from hafrm_ds.data.planning import BatchPlan, imbalance, partition_into_micro_batches

NUM_PAIRS, MAX_TOKENS, REPEATS = 1_000_000, 8192, 5


def milliseconds(work: Callable[[], object]) -> float:
    def once() -> float:
        started = time.process_time()
        work()
        return 1e3 * (time.process_time() - started)

    return min(once() for _ in range(REPEATS))


def main() -> None:
    lengths = np.random.default_rng(0).lognormal(6.3, 0.7, NUM_PAIRS).astype(np.int64).clip(20, MAX_TOKENS // 2)
    print("| ranks | pairs a step | layout | micro-batches a rank | pairs, ms | partition, ms | imbalance, ms |")
    print("|---|---|---|---|---|---|---|")
    for num_ranks, pairs in ((8, 128), (64, 1024), (1024, 16384)):
        plan = BatchPlan(NUM_PAIRS, pairs, seed=0)
        plan.global_batch(0)  # the order of the pass, once a pass
        index = plan.global_batch(1)
        for layout, costs, rows in (("shared_prefix", lengths[index], None), ("padded", 2 * lengths[index], 2)):
            in_rows = None if rows is None else np.full(pairs, rows)
            ranks = partition_into_micro_batches(costs, num_ranks, MAX_TOKENS, in_rows)
            times = [
                milliseconds(partial(plan.global_batch, 1)),
                milliseconds(partial(partition_into_micro_batches, costs, num_ranks, MAX_TOKENS, in_rows)),
                milliseconds(partial(imbalance, costs, ranks, in_rows)),
            ]
            cells = [f"{num_ranks:,}", f"{pairs:,}", layout, str(len(ranks[0])), *(f"{each:.2f}" for each in times)]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
