"""The probe of refusal openings behind one shared prompt, against other ways to the same log-probs, in turns.

    OMP_NUM_THREADS=1 python tests/benchmarks/openings.py MODEL PROMPTS.csv [NUM_PROMPTS]

The first NUM_PROMPTS prompts of XSTest (30) are asked in fp32 with all 16 openings: sharing a prompt's computation; as
sequences of their own that go through together; and with one forward for each opening. Loading is not counted.
"""

import sys
import time

import numpy as np
import torch

from hafrm_ds.data.tokenization import PromptWithResponses
from hafrm_ds.evaluation.refusal.probes import OPENINGS, Openings, groups_for
from hafrm_ds.evaluation.refusal.prompts import read_labelled
from hafrm_ds.saved.classifier import SavedClassifier
from hafrm_ds.saved.opening import load_scorer, open_model

HEADS = ("logprob",)


def main(model: str, prompts: str, num_prompts: int = 30) -> None:
    saved = open_model(model, dtype="float32")
    assert not isinstance(saved, SavedClassifier)
    scorer = load_scorer(saved, torch.device("cpu"), 4096)
    asked, _ = read_labelled([("xstest", prompts)], None)
    groups: list[PromptWithResponses] = []
    for prompt in asked[:num_prompts]:
        groups += groups_for(OPENINGS, saved.formatter(), prompt.prompt, Openings(), None)
    single = [PromptWithResponses(group.prompt, (opening,)) for group in groups for opening in group.responses]
    ways = {
        f"{scorer.layout}, together": lambda: scorer.values(groups, HEADS),
        "sequences of their own, together": lambda: scorer.values(single, HEADS),
        "one forward each": lambda: np.concatenate([scorer.values([each], HEADS) for each in single]),
    }
    found: dict[str, np.ndarray] = {}
    for turn in (1, 2):
        for name, ask in ways.items():
            started = time.perf_counter()
            found[name] = ask()
            print(f"turn {turn}, {name}: {time.perf_counter() - started:.1f} s", flush=True)
    first, *others = found.values()
    tokens = np.mean([len(group.prompt) for group in groups])
    print(f"{len(groups)} prompts of {tokens:.0f} tokens, {len(single)} openings; torch {torch.__version__}")
    print(f"largest difference of a log-prob: {max(np.abs(first - other).max() for other in others):.1e}")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
