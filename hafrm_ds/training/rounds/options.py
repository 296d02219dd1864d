"""The options of rounds (launch/rounds.py): those of training, and a section of their own."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from hafrm_ds.config import NonNegative, Positive, PositiveInt, TrainConfig
from hafrm_ds.options import Section
from hafrm_ds.saved.opening import Judge


class RoundsSection(Section):
    """What a round does before it trains."""

    prompts: Path
    """A file with the prompts that the policy answers in every round."""
    evaluation_prompts: Path
    """A file with other prompts, whose answers are measured after every round."""
    num_rounds: PositiveInt = 2
    """How many rounds."""
    num_candidates: Annotated[int, Field(ge=2)] = 4
    """Different answers to each prompt; at most twice as many are drawn."""
    temperature: tuple[Positive, Positive] = (0.7, 1.2)
    """LOW HIGH: uniform between these, anew for each answer."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Draw from the most probable tokens that together have this probability."""
    max_new_tokens: PositiveInt = 256
    """Longest answer in tokens; longer ones are truncated."""
    reward: str | None = None
    """What ranks the answers: a model, a function FILE.py:NAME or a composition FILE.yaml. Default: the model that the
    round starts from, by `judge`."""
    judge: Judge = "reward"
    """Of the model that the round starts from: reward (its head), implicit or combined. The implicit reward is measured
    against what the first start was trained from, the combined judge against what each start was trained from."""
    gold: str | None = None
    """Another reward, by which the answers to evaluation_prompts are judged."""
    pairs: Literal["best_worst", "groups"] = "best_worst"
    """best_worst: the best answer to a prompt against the worst. groups: all of them, by their scores."""
    min_gap: NonNegative = 0.0
    """Leave out prompts whose best and worst answer differ by no more than this."""
    length_penalty: NonNegative = 0.0
    """Taken off a score for each word of its answer."""
    replay: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Share of the pairs of data.train in each training. Sources without weights have equal parts of it."""
    reward_loss: bool | None = None
    """Whether the answers that were ranked train the reward loss too. Default: not if the model has ranked its own."""

    @property
    def is_own(self) -> bool:
        """Whether each round is ranked by the model that it starts from."""
        return self.reward is None

    @property
    def trains_head(self) -> bool:
        """Whether the ranked answers train the reward head."""
        return not self.is_own if self.reward_loss is None else self.reward_loss

    def contradictions(self) -> list[str]:
        low, high = self.temperature
        problems = []
        if low > high:
            problems.append(f"rounds.temperature {low} {high}: the lower of the two comes first")
        if not self.is_own and self.judge != "reward":
            problems.append(
                "rounds.judge is of the model that a round starts from, but rounds.reward ranks in its place"
            )
        return problems


class RoundsOptions(TrainConfig):
    """What is trained in each round, and how its pairs are made."""

    rounds: RoundsSection

    def contradictions(self) -> list[str]:
        problems = super().contradictions() + self.rounds.contradictions()
        if not self.data.eval:
            problems.append("data.eval names no set: rounds are held against pairs that are not trained on")
        if not self.objective.uses_policy:
            problems.append("rounds train the policy: objective.alpha is above 0")
        if not self.objective.uses_reward and self.rounds.is_own and self.rounds.judge != "implicit":
            problems.append(
                "objective.rm_weight is 0: no reward head is trained that could rank the next round. Give rounds.judge "
                "implicit, or rounds.reward"
            )
        if isinstance(self.resume, Path):
            problems.append("resume: rounds always resume from what their folder holds; leave it out")
        return problems
