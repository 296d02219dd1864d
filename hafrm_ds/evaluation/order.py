"""How well a judge orders the answers of a group, where there are more than two: Kendall's tau-b, top-1 and NDCG.

The gold order is made of the comparisons alone: an answer stands the higher, the more answers it beats, less those that
it loses to (Copeland 1951). It beats the ones that it is compared with and found better than, and those that they beat.
So scores and ranks, with their ties, give the order that they came from, whether all of their comparisons are at hand
or those of neighbouring levels. Where the comparisons of a group contradict one another, in a cycle, each counts as it
stands and beats nothing further. Answers that no comparison tells apart share a rank. How sure a comparison is
(`target`) and what it weighs do not matter here.

Legend: G groups, N answers of all of them, g groups of n answers each.
"""

import math
from dataclasses import dataclass

import numpy as np

from hafrm_ds.data.lengths import starts_of
from hafrm_ds.evaluation.pair_scores import Answers, PairScores

LARGEST_BATCH = 2**22
"""Most pairs of answers that are looked at together, which bounds the memory."""


@dataclass(frozen=True)
class GoldOrder:
    """The gold order of the answers of a set, and how judges agree with it.

    lead: [N] int64, answers that each beats less those that it loses to. rank: [N] int64, answers of its group above
    it. batches: [g, n] of the N answers, of all groups that have an order: those whose comparisons do not cancel out.
    """

    scores: PairScores
    lead: np.ndarray
    rank: np.ndarray
    batches: list[np.ndarray]

    @classmethod
    def of(cls, scores: PairScores) -> "GoldOrder | None":
        """None of pairs, where no group has more than two answers, and where none has an order."""
        if scores.groups is None or scores.answers.sizes.max(initial=0) <= 2:
            return None
        lead, rank = np.zeros((2, len(scores.answers.group)), dtype=np.int64)
        batches = []
        for index in batches_of(scores.answers):
            lead[index] = leads(beaten(scores.answers, index))
            rank[index] = above(lead[index])
            if len(index := index[rank[index].any(axis=1)]):
                batches.append(index)
        return cls(scores, lead, rank, batches) if batches else None

    @property
    def prompts(self) -> list[str]:
        """[G] of the groups that have an order, as `measures` has them."""
        rows = self.scores.answers.row
        return [self.scores.prompts[row] for index in self.batches for row in rows[index[:, 0]].tolist()]

    def measures(self, judge: str) -> dict[str, np.ndarray]:
        """tau_b, top_1 and ndcg of a judge in each group that has an order: name -> [G] float64."""
        values = self.scores.answers.values(self.scores.judges[judge])
        found = [(self.lead[index], values[index]) for index in self.batches]
        return {name: np.concatenate([measure(*each) for each in found]) for name, measure in MEASURES.items()}


# ---- the gold order --------------------------------------------------------------------------------------------------


def batches_of(answers: Answers) -> list[np.ndarray]:
    """The answers of all groups, of as many as are of one size together: [g, n] each."""
    sizes, batches = answers.sizes, []
    first = starts_of(sizes)[:-1]
    for size in np.unique(sizes).tolist():
        index = first[sizes == size][:, None] + np.arange(size)
        batches += np.array_split(index, math.ceil(index.size * size / LARGEST_BATCH))
    return batches


def beaten(answers: Answers, index: np.ndarray) -> np.ndarray:
    """Which answer of a group is found better than which, in one comparison: [g, n, n] bool, of the answers [g, n]."""
    number = np.full(len(answers.group), -1)
    number[index] = np.arange(len(index))[:, None]
    mine = answers.place[number[answers.place[:, 0]] >= 0]
    row = number[mine[:, 0]]
    better, worse = (mine - index[row, :1]).T
    found = np.zeros((*index.shape, index.shape[1]), dtype=bool)
    found[row, better, worse] = True
    return found


def leads(beats: np.ndarray) -> np.ndarray:
    """Answers that each one beats less those that it loses to, [g, n, n] bool -> [g, n] int64."""
    reached = beats
    for _ in range((beats.shape[-1] - 2).bit_length()):  # each round doubles the longest chain
        ways = reached.astype(np.float32)
        reached = reached | (ways @ ways > 0)
    is_cycle = (reached & reached.swapaxes(1, 2)).any(axis=(1, 2))
    beats = np.where(is_cycle[:, None, None], beats, reached)
    return beats.sum(axis=2) - beats.sum(axis=1)


def above(values: np.ndarray) -> np.ndarray:
    """How many values of its row are larger than each, [g, n] -> [g, n] int64."""
    return (values[:, None, :] > values[:, :, None]).sum(axis=2)


# ---- measures, of the gold lead [g, n] and the judge's values [g, n] -> [g] ------------------------------------------


def tau_b(lead: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Pairs of answers in the same order less those in the other, over the geometric mean of the pairs that either side
    tells apart (Kendall 1945). 0 where the judge tells none apart."""
    gold, judged = (np.sign(each[:, :, None] - each[:, None, :]) for each in (lead, values))
    apart = np.count_nonzero(gold, axis=(1, 2)) * np.count_nonzero(judged, axis=(1, 2))
    return (gold * judged).sum(axis=(1, 2)) / np.sqrt(np.maximum(apart, 1))


def top_1(lead: np.ndarray, values: np.ndarray) -> np.ndarray:
    """1 where the judge's best answer is one of the best; of several that it finds best the share that is."""
    is_best, is_chosen = (each == each.max(axis=1, keepdims=True) for each in (lead, values))
    return (is_best & is_chosen).sum(axis=1) / is_chosen.sum(axis=1)


def ndcg(lead: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sum of gain / log2(1 + place) in the judge's order, over that in the gold order (Järvelin & Kekäläinen 2002; the
    discount is that of Burges et al. 2005). The gain of an answer is its lead over the last one. Answers that the judge
    ties share their places, as in a random order of them (McSherry & Najork 2008)."""
    gain = lead - lead.min(axis=1, keepdims=True)
    until = np.cumsum([0.0, *(1 / np.log2(2 + np.arange(lead.shape[1])))])  # of the first k places
    before = above(values)
    after = (values[:, None, :] >= values[:, :, None]).sum(axis=2)
    discount = (until[after] - until[before]) / (after - before)
    best = np.sort(gain, axis=1)[:, ::-1] @ np.diff(until)
    return (gain * discount).sum(axis=1) / best


MEASURES = {"tau_b": tau_b, "top_1": top_1, "ndcg": ndcg}
