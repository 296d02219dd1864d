"""The layouts on whole models: a joint step on real pairs, and best-of-8 scoring of one prompt.

    python -m tests.benchmarks.layouts --config FILE.yaml [--section.key value ...]

One process, no DeepSpeed. A step is forward and backward of batch.global_batch_size pairs, in micro-batches of
batch.max_tokens_per_micro_batch tokens as in training. Best-of-8 is one prompt of 400 random tokens with 8 answers of
60, rewards and log-probs without gradients, against the same 8 texts scored as padded rows and one by one, as they
would be without sharing. Contenders alternate; medians.
"""

import os
import statistics
import sys

import torch

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.micro_batches import make_micro_batch
from hafrm_ds.data.packing import lay_out, padded_rows
from hafrm_ds.data.planning import BatchPlan, partition_into_micro_batches
from hafrm_ds.data.preparation import prepare_groups
from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.engine.deepspeed_config import load_config
from hafrm_ds.model.loading import load_hybrid_model, load_tokenizer
from tests.benchmarks.roofline import joint_step, seconds

LAYOUTS = ("shared_prefix", "packed", "padded")
ROUNDS = 5
PROMPT_TOKENS, ANSWERS, ANSWER_TOKENS = 400, 8, 60


def main() -> None:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    config = load_config(sys.argv[1:])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    formatter = ChatFormatter.create(load_tokenizer(config.model), config.data.chat_template, config.data.template_date)
    pairs = prepare_groups(
        config.data.train, formatter=formatter, options=config.data.preparation, role="train", seed=config.seed
    )
    plan = BatchPlan(len(pairs), config.batch.global_batch_size, config.seed)
    model = load_hybrid_model(config.model, layout="shared_prefix", seed=config.seed, device=device).to(device)

    steps: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    positions: dict[str, list[int]] = {layout: [] for layout in LAYOUTS}
    for number in range(1 + ROUNDS):
        for layout in LAYOUTS:
            model.use_layout(layout, config.model.attention, device)
            index = plan.global_batch(number)
            costs, rows = pairs.lengths.costs(layout)[index], padded_rows(layout, len(index))
            (parts,) = partition_into_micro_batches(costs, 1, config.batch.token_budget, rows)
            micro_batches = [make_micro_batch(pairs, index[part], layout) for part in parts]
            took = sum(seconds(device, joint_step, config, model, each, device) for each in micro_batches)
            if number:
                steps[layout].append(took)
                positions[layout].append(sum(each.batch.num_positions for each in micro_batches))
    print(f"joint step of {plan.global_batch_size} pairs, {ROUNDS} rounds\n")
    print("| layout | positions | seconds | times shared_prefix |\n|---|---|---|---|")
    ours = statistics.median(steps["shared_prefix"])
    for layout in LAYOUTS:
        median = statistics.median(steps[layout])
        print(f"| {layout} | {statistics.median(positions[layout]):.0f} | {median:.2f} | {median / ours:.2f} |")

    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, model.causal_lm.config.vocab_size, (count,), generator=generator).tolist()

    prompt, answers = tokens(PROMPT_TOKENS), tuple(tokens(ANSWER_TOKENS) for _ in range(ANSWERS))
    together, alone = (
        [PromptWithResponses(prompt, answers)],
        [[PromptWithResponses(prompt, (answer,))] for answer in answers],
    )
    contenders = {
        "prompt shared": ("shared_prefix", [together]),
        "8 padded rows at once": ("padded", [together]),
        "8 sequences one by one": ("padded", alone),
    }

    @torch.no_grad()
    def score(layout: str, batches: list) -> None:
        for items in batches:
            model(lay_out(items, layout).to(device))

    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(1 + ROUNDS):
        for name, (layout, batches) in contenders.items():
            model.use_layout(layout, config.model.attention, device)
            took = seconds(device, score, layout, batches)
            if number:
                times[name].append(took)
    print(f"\nbest of {ANSWERS}: a prompt of {PROMPT_TOKENS} tokens, answers of {ANSWER_TOKENS}\n")
    print("| | seconds | times prompt shared |\n|---|---|---|")
    ours = statistics.median(times["prompt shared"])
    for name, values in times.items():
        print(f"| {name} | {statistics.median(values):.2f} | {statistics.median(values) / ours:.1f} |")


if __name__ == "__main__":
    main()
