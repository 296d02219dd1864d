"""ALaRM's hierarchy (ACL Findings 2024): a holistic reward first, and aspects above its threshold.

With z = (holistic - mean) / deviation, the weight w of the holistic reward, the threshold T, and
A = sum over the aspects of weight * mean over the spans of sigmoid(value):

    holistic_only    w z
    aspects_only     A
    weighted_sum     w z + A
    hierarchical     w z where z < T, else w z + A

Shaped aspects are positive, so that passing the threshold never lowers a reward of positive weights. ALaRM adds up the
values of an answer's spans, which pays for length where an answer gets one number; here they are averaged. Nor is z set
to -10 for answers of one or two tokens, as in ALaRM's code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from hafrm_ds.rewards.reward import Loader, OpenedReward, Reward, Score
from hafrm_ds.saved.scorer import Conversation

Mode = Literal["hierarchical", "weighted_sum", "holistic_only", "aspects_only"]


class Aspect(NamedTuple):
    """What an aspect counts, and what gives its values."""

    weight: float
    reward: Reward


@dataclass(frozen=True)
class Rule:
    """How holistic reward and aspects become one number.

    threshold: T, of the mode hierarchical. weight: w of the holistic reward.
    """

    mode: Mode
    threshold: float | None
    weight: float

    @property
    def takes_holistic(self) -> bool:
        return self.mode != "aspects_only"

    @property
    def takes_aspects(self) -> bool:
        return self.mode != "holistic_only"

    def takes_aspects_at(self, z: float) -> bool:
        """Whether the aspects of an answer count. z: its normalised holistic reward."""
        if self.mode == "hierarchical":
            assert self.threshold is not None
            return not z < self.threshold
        return self.takes_aspects

    def value(self, z: float, aspects: float) -> float:
        """One number for an answer. aspects: A of the module's text."""
        return (self.weight * z if self.takes_holistic else 0.0) + (aspects if self.takes_aspects_at(z) else 0.0)


@dataclass(frozen=True)
class OpenedHierarchy:
    """A holistic reward, normalised already where the rule takes it, and its aspects: name -> (weight, reward)."""

    rule: Rule
    holistic: OpenedReward
    aspects: dict[str, tuple[float, OpenedReward]]

    def identity(self) -> dict[str, Any]:
        aspects = {name: [weight, each.identity()] for name, (weight, each) in self.aspects.items()}
        rule = {"hierarchy": self.rule.mode, "threshold": self.rule.threshold, "weight": self.rule.weight}
        return rule | {"holistic": self.holistic.identity(), "aspects": aspects}

    def load(self, loader: Loader) -> "Hierarchy":
        """Load what the rule asks: an aspect of weight 0 is not."""
        counted = {name: each for name, each in self.aspects.items() if self.rule.takes_aspects and each[0]}
        return Hierarchy(
            self.rule,
            loader.load(self.holistic) if self.rule.takes_holistic else None,
            {name: Aspect(weight, loader.load(each)) for name, (weight, each) in counted.items()},
        )


@dataclass(frozen=True)
class Hierarchy:
    """A loaded hierarchy. Aspects are asked about the answers alone in which they count."""

    rule: Rule
    holistic: Reward | None
    aspects: dict[str, Aspect]

    def scores(self, conversations: Sequence[Conversation]) -> list[Score]:
        zs = [Score(0.0)] * len(conversations) if self.holistic is None else self.holistic.scores(conversations)
        found = [
            Score.none(f"holistic: {z.error}") if z.value is None else Score(self.rule.value(z.value, 0.0)) for z in zs
        ]
        asked = [place for place, z in enumerate(zs) if z.value is not None and self.rule.takes_aspects_at(z.value)]
        for place, aspects in zip(asked, self.sums([conversations[place] for place in asked]), strict=True):
            z = zs[place].value
            assert z is not None
            found[place] = aspects if aspects.value is None else Score(self.rule.value(z, aspects.value))
        return found

    def sums(self, conversations: Sequence[Conversation]) -> list[Score]:
        """A of each conversation; the error of the first aspect that has no value."""
        totals = [Score(0.0)] * len(conversations)
        for name, aspect in self.aspects.items():
            for place, score in enumerate(aspect.reward.scores(conversations) if conversations else ()):
                total = totals[place].value
                if total is None:
                    continue
                if score.value is None:
                    totals[place] = Score.none(f"{name}: {score.error}")
                else:
                    totals[place] = Score(total + aspect.weight * shaped(score.spans or (score.value,)))
        return totals


def shaped(spans: Sequence[float]) -> float:
    """Mean over the spans of an answer of sigmoid(value)."""
    return math.fsum(map(sigmoid, spans)) / len(spans)


def sigmoid(value: float) -> float:
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    power = math.exp(value)
    return power / (1 + power)
