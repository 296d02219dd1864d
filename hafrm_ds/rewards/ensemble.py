"""Several rewards as one, as the seeds of a comparison: their mean, their least, or the mean less k deviations."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hafrm_ds.rewards.reward import Loader, OpenedReward, Reward, Score
from hafrm_ds.saved.scorer import Conversation

By = Literal["mean", "min", "mean_minus_deviations"]


@dataclass(frozen=True)
class OpenedEnsemble:
    """Rewards by their names, and how they are made one. k: how many deviations are taken off the mean."""

    members: dict[str, OpenedReward]
    by: By
    k: float = 0.0

    def identity(self) -> dict[str, Any]:
        return {"ensemble": [each.identity() for each in self.members.values()], "by": self.by, "k": self.k}

    def load(self, loader: Loader) -> "Ensemble":
        return Ensemble({name: loader.load(each) for name, each in self.members.items()}, self.by, self.k)


@dataclass(frozen=True)
class Ensemble:
    """Loaded rewards as one. Where one of them has no value, neither has the ensemble."""

    members: dict[str, Reward]
    by: By
    k: float = 0.0

    def scores(self, conversations: Sequence[Conversation]) -> list[Score]:
        columns = {name: each.scores(conversations) for name, each in self.members.items()}
        return [self.of(dict(zip(columns, row))) for row in zip(*columns.values(), strict=True)]

    def of(self, row: dict[str, Score]) -> Score:
        """Of the members' scores of one conversation. The deviation is that of the members as they are, by 1 / n."""
        values = []
        for name, score in row.items():
            if score.value is None:
                return Score.none(f"{name}: {score.error}")
            values.append(score.value)
        if self.by == "min":
            return Score(min(values))
        mean = statistics.fmean(values)
        return Score(mean if self.by == "mean" else mean - self.k * statistics.pstdev(values))
