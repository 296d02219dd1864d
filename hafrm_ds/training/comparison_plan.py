"""What a comparison will take: its trainings, the pairs that they see, and the hours, from what the first ones took."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np

from hafrm_ds.config import TrainConfig
from hafrm_ds.data.preparation import prepare_groups
from hafrm_ds.model.loading import fetch_model
from hafrm_ds.processes.console import clock
from hafrm_ds.training.sweep import Arm


@dataclass
class ComparisonPlan:
    """The trainings of a comparison and what is known of their time.

    pairs: name of an arm -> pairs that each of its trainings sees, those of every epoch counted.
    num_seeds: trainings of each arm.
    seconds: name of an arm -> what its finished trainings took, where that is known.
    finished: number of finished trainings of each arm.
    """

    pairs: Mapping[str, int]
    num_seeds: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    finished: dict[str, int] = field(default_factory=dict)

    def note(self, arm: str, seconds: float | None) -> None:
        """A training of the arm is finished; seconds: None where it is not known what it took."""
        self.finished[arm] = self.finished.get(arm, 0) + 1
        if seconds is not None:
            self.seconds.setdefault(arm, []).append(seconds)

    @property
    def left(self) -> dict[str, int]:
        """Name of an arm -> its trainings that are not finished."""
        return {arm: self.num_seeds - self.finished.get(arm, 0) for arm in self.pairs}

    @property
    def seconds_left(self) -> float | None:
        """Of an arm, what its other seeds took; else by the pairs that it sees. None before the first training."""
        known = [(self.pairs[arm], each) for arm, times in self.seconds.items() for each in times]
        if not known:
            return None
        expected = by_pairs(known)
        means = {arm: fmean(times) for arm, times in self.seconds.items()}
        return sum(number * means.get(arm, expected(self.pairs[arm])) for arm, number in self.left.items())

    @property
    def in_words(self) -> str:
        left = self.left
        total, to_do = self.num_seeds * len(self.pairs), sum(left.values())
        if not to_do:
            return f"{total:,} trainings, all of which are finished"
        seen = sum(self.pairs[arm] * number for arm, number in left.items())
        done = f", {total - to_do:,} of which are finished; the others see" if to_do < total else ", which see"
        return f"{total:,} trainings{done} {seen:,} pairs in all{self.time_left}"

    @property
    def time_left(self) -> str:
        seconds = self.seconds_left if any(self.left.values()) else None
        return "" if seconds is None else f", in about {clock(seconds)} (h:mm:ss)"


def by_pairs(known: Sequence[tuple[int, float]]):
    """Pairs -> seconds of a training, from those of others: a line through them, or through the origin while that makes
    no sense."""
    pairs, seconds = np.array(known, dtype=np.float64).T
    rate = seconds.sum() / pairs.sum()
    if len(set(pairs)) > 1:
        slope, start = np.polyfit(pairs, seconds, 1)
        if slope > 0 and start > 0:
            return lambda number: float(start + slope * number)
    return lambda number: float(rate * number)


def pairs_seen(arms: Sequence[Arm]) -> dict[str, int]:
    """Name of an arm -> pairs that a training of it sees. Prepares the data, which the trainings find prepared.

    Raises:
        UserError: data or model cannot be read.
    """
    sizes: dict[str, int] = {}
    found = {}
    for arm in arms:
        config, batch = arm.config, arm.config.batch.global_batch_size
        steps = config.max_steps
        if steps is None:
            key = arm.data_key
            if key not in sizes:
                sizes[key] = num_pairs(config)
            steps = math.ceil(config.epochs * sizes[key] / batch)
        found[arm.name] = steps * batch
    return found


def num_pairs(config: TrainConfig) -> int:
    """Usable training pairs."""
    data = config.data
    formatter = data.formatter(fetch_model(config.model))
    return len(
        prepare_groups(data.train, role="train", formatter=formatter, options=data.preparation, seed=config.seed)
    )
