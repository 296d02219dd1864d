"""Answers to many prompts drawn together, as best-of-N and rounds draw them, against prompt by prompt, in turns.

    OMP_NUM_THREADS=1 python tests/benchmarks/drawing.py MODEL PAIRS.jsonl [PROMPTS ANSWERS TOKENS]

The first PROMPTS prompts of PAIRS.jsonl get ANSWERS answers each of at most TOKENS tokens, at temperatures from 0.5 to
1.2 with a top_p of 0.85. Loading is not counted. Both ways draw with the same random numbers; how many answers are
equal tells how soon the rounding of bfloat16 leads to another token.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from hafrm_ds.evaluation.best_of_n.options import SamplingOptions
from hafrm_ds.evaluation.best_of_n.sampling import request_for
from hafrm_ds.generation.samplers import TransformersSampler
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.saved.classifier import SavedClassifier
from hafrm_ds.saved.opening import open_model


def main(model: str, pairs: str, prompts: int = 16, answers: int = 4, tokens: int = 32) -> None:
    policy = open_model(model)
    assert not isinstance(policy, SavedClassifier)
    formatter = policy.formatter()
    options = SamplingOptions(prompts=Path(pairs), policy=model, num_candidates=answers)
    requests = []
    with open(pairs) as file:
        for number, line in zip(range(prompts), file):
            prompt = json.loads(line)["prompt"]
            messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
            requests.append(request_for(formatter.encode_prompt(messages), number, 0, options))
    here = Processes(rank=0, local_rank=0, world_size=1, store=dist.HashStore())
    sampler = TransformersSampler(policy, formatter, here, max_new_tokens=tokens, top_p=options.top_p)
    ways = {
        "together": lambda: sampler.answers(requests),
        "prompt by prompt": lambda: [sampler.answers([each])[0] for each in requests],
    }
    drawn = {}
    for turn in (1, 2):
        for name, draw in ways.items():
            started = time.perf_counter()
            drawn[name] = draw()
            seconds = time.perf_counter() - started
            number = sum(len(answer.ids) for each in drawn[name] for answer in each)
            print(f"turn {turn}, {name}: {seconds:.1f} s, {number / seconds:.0f} tokens a second", flush=True)
    same = [a == b for both in zip(*drawn.values()) for a, b in zip(*both)]
    print(f"{sum(same)} of {len(same)} answers are equal; torch {torch.__version__}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
