"""Scores of groups of answers, written without a model."""

import itertools
from collections.abc import Sequence

import numpy as np

from hafrm_ds.evaluation.pair_scores import Grouping, PairScores


def group_scores(groups: Sequence[tuple[Sequence[tuple[int, int]], Sequence[float]]], name: str = "set") -> PairScores:
    """(its comparisons as (better, worse), the reward of each answer) of each group, whose prompt is its number."""
    owner = np.repeat(np.arange(len(groups)), [len(comparisons) for comparisons, _ in groups])
    answers = np.array([each for comparisons, _ in groups for each in comparisons], dtype=np.int32).reshape(-1, 2)
    rewards = [groups[number][1] for number in owner]
    return PairScores(
        set=name,
        step=40,
        beta=0.1,
        ids=[f"groups.jsonl:{n} ({b + 1}>{w + 1})" for n, (b, w) in zip(owner.tolist(), answers.tolist())],
        sources=["forum"] * len(owner),
        prompts=[str(number) for number in owner],
        num_tokens=answers * 3 + 5,
        reward=np.array([[of[b], of[w]] for of, (b, w) in zip(rewards, answers)], dtype=np.float32),
        groups=Grouping(owner, answers, *np.ones((2, len(owner)), dtype=np.float32)),
    )


def rated_groups(gold: Sequence, judged: Sequence, ranking: str = "all", name: str = "set") -> PairScores:
    """Groups of answers with gold scores, and the rewards that a judge gives them.

    ranking: all comparisons, or those of adjacent levels.
    """

    def comparisons(scores: Sequence[float]) -> list[tuple[int, int]]:
        level = {value: place for place, value in enumerate(sorted(set(scores)))}
        return [
            (b, w)
            for b, w in itertools.permutations(range(len(scores)), 2)
            if scores[b] > scores[w] and (ranking == "all" or level[scores[b]] == level[scores[w]] + 1)
        ]

    return group_scores([(comparisons(scores), values) for scores, values in zip(gold, judged, strict=True)], name)
