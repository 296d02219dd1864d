"""A judge behind a chat endpoint as a reward: it grades an answer by criteria, or compares the answers to a prompt.

Grading: the judge gives each criterion a whole number on its scale, and says of each cap whether its condition holds;
a cap that does holds the number down. With g = (number - lowest) / (highest - lowest), the value is the weighted mean
of g over the criteria, between 0 and 1.

Comparing: of all answers to one prompt in a call, each two are shown in both orders, as judges favour a place. An
answer gets the weighted share of the criteria by which it is the better one, ties half; its value is the mean over its
comparisons.

Both are means over the samples, for each of which the judge is asked anew.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from multiprocessing.pool import ThreadPool
from typing import Annotated, Any

from pydantic import Field

from hafrm_ds.config import NonNegative, Positive, PositiveInt
from hafrm_ds.data.pairs import Message, user
from hafrm_ds.options import Section
from hafrm_ds.rewards.endpoint import Chat, Endpoint, Unanswered, Unusable, insist, json_object, seed_of
from hafrm_ds.rewards.reward import Loader, Score
from hafrm_ds.saved.scorer import Conversation

Verdict = dict[str, Any]
"""What a judge answers: a value for each key that it was asked for."""
WORTH = {"A": 1.0, "tie": 0.5, "B": 0.0}
"""Of what a judge says of two answers, for the one that is shown first."""

ANSWER = "Answer with one JSON object and nothing else, with these keys: "
GRADE = """Judge the last message of this conversation.

{conversation}

Give each criterion a whole number on its scale, and say of each condition whether it holds:
"""
COMPARE = """Compare two answers to this conversation.

{conversation}

Answer A:
{0}

Answer B:
{1}

Say for each criterion which answer is the better one, "A" or "B", or "tie":
"""


class Criterion(Section):
    """One thing that an answer is judged by."""

    text: str
    """What is asked, as "Does the answer say what to do next?"."""
    scale: tuple[int, int] = (1, 10)
    """The lowest and the highest number. Not of comparisons."""
    caps: dict[str, int] = Field(default={})
    """A condition -> the highest number where it holds, as {The answer invents a fact: 3}. Not of comparisons."""
    weight: Positive = 1.0
    """What it counts beside the others."""


class RubricOptions(Section):
    """What is asked, and whom."""

    rubric: Annotated[dict[Annotated[str, Field(pattern=r"^[A-Za-z]\w*$")], Criterion], Field(min_length=1)]
    """Name -> criterion."""
    endpoint: Endpoint
    """The judge."""
    compare: bool = False
    """Compare each two answers to a prompt, in both orders, instead of grading each by itself."""
    samples: PositiveInt = 1
    """How often the judge is asked the same; the mean counts."""
    temperature: NonNegative = 1.0
    """Of the judge's answers."""
    max_tokens: PositiveInt = 512
    """Of one answer of the judge."""
    parallel: PositiveInt = 8
    """How many questions the judge gets at once."""

    def faults(self) -> list[str]:
        faults = []
        for name, criterion in self.rubric.items():
            lowest, highest = criterion.scale
            if lowest >= highest:
                faults.append(f"rubric.{name}.scale: {lowest} is not below {highest}")
            elif any(not lowest <= cap < highest for cap in criterion.caps.values()):
                faults.append(f"rubric.{name}.caps: a cap lies on the scale, below {highest}")
            if self.compare and criterion.caps:
                faults.append(f"rubric.{name}.caps: have no meaning with compare")
        return faults


@dataclass(frozen=True)
class OpenedRubric:
    """A rubric whose judge has not been asked yet."""

    options: RubricOptions

    def identity(self) -> dict[str, Any]:
        asked = self.options.model_dump(include={"rubric", "compare", "samples", "temperature", "max_tokens"})
        return asked | {"judge": self.options.endpoint.identity()}

    def load(self, loader: Loader) -> "Rubric":
        return Rubric(self.options)


class Rubric:
    """A judge that can be asked.

    values: key of its verdict -> the values that it may have. total: weight of all criteria.
    """

    def __init__(self, options: RubricOptions):
        """Raises ConfigError if its endpoint cannot be asked at all."""
        self.options, self.chat, self.criteria = options, Chat(options.endpoint), options.rubric
        self.total = sum(each.weight for each in self.criteria.values())
        self.values: dict[str, list[Any]] = {}
        lines = []
        for name, each in self.criteria.items():
            lowest, highest = each.scale
            self.values[name] = list(WORTH) if options.compare else list(range(lowest, highest + 1))
            lines.append(f"- {name}{'' if options.compare else f', from {lowest} to {highest}'}: {each.text}")
            for number, condition in enumerate(each.caps):
                self.values[key_of(name, number)] = [True, False]
                lines.append(f"- {key_of(name, number)}, true or false: {condition}")
        self.asked = "\n".join([*lines, "", f"{ANSWER}{', '.join(self.values)}"])

    def scores(self, conversations: Sequence[Conversation]) -> list[Score]:
        """Raises EndpointError if every question would fail."""
        # Its threads are daemons: whoever leaves waits neither for what is asked nor for what would be asked next.
        with ThreadPool(self.options.parallel) as pool:
            if not self.options.compare:
                return [score_of([each]) for each in pool.imap(self.grade, conversations)]
            of_prompt: dict[str, list[int]] = {}
            for place, conversation in enumerate(conversations):
                of_prompt.setdefault(json.dumps(conversation[:-1]), []).append(place)
            orders = [order for places in of_prompt.values() for order in permutations(places, 2)]
            shares = pool.imap(lambda order: self.compare(*(conversations[place] for place in order)), orders)
            won: list[list[float | str]] = [[] for _ in conversations]
            for (first, second), share in zip(orders, shares):
                won[first].append(share)
                won[second].append(share if isinstance(share, str) else 1 - share)
        return [score_of(each) for each in won]

    def grade(self, conversation: Conversation) -> float | str:
        """The value of an answer, or why there is none."""

        def worth(verdict: Verdict, name: str, criterion: Criterion) -> float:
            lowest, highest = criterion.scale
            caps = [cap for number, cap in enumerate(criterion.caps.values()) if verdict[key_of(name, number)]]
            return (min([verdict[name], *caps]) - lowest) / (highest - lowest)

        return self.mean(GRADE.format(conversation=in_words(conversation)), worth)

    def compare(self, first: Conversation, second: Conversation) -> float | str:
        """What the first of two answers gets where they are shown in this order, or why there is nothing."""
        answers = text_of(first[-1]), text_of(second[-1])
        asked = COMPARE.format(*answers, conversation=in_words(first[:-1]))
        return self.mean(asked, lambda verdict, name, criterion: WORTH[verdict[name]])

    def mean(self, question: str, worth: Callable[[Verdict, str, Criterion], float]) -> float | str:
        """Weighted mean over the criteria, and mean over the samples, of what verdicts are worth by a criterion."""

        def sampled(sample: int) -> Verdict:
            return insist(lambda attempt: self.verdict(question, seed_of(question, sample, attempt)))

        try:
            verdicts = [sampled(number) for number in range(self.options.samples)]
        except Unanswered as error:
            return f"judge {self.options.endpoint.model}: {error}"
        criteria = self.criteria.items()
        sums = (sum(each.weight * worth(verdict, name, each) for name, each in criteria) for verdict in verdicts)
        return statistics.fmean(sums) / self.total

    def verdict(self, question: str, seed: int) -> Verdict:
        """Raises Unusable if the judge answers anything but a value of those that it may give for each key."""
        reply = self.chat.reply(
            [user(question + self.asked)],
            temperature=self.options.temperature,
            max_tokens=self.options.max_tokens,
            seed=seed,
            schema=schema_of(self.values),
        )
        found = json_object(reply.text)
        if found is None:
            raise Unusable("holds no JSON object")
        for key, allowed in self.values.items():
            # To Python true is 1, to a judge it is not.
            if not any(type(found.get(key)) is type(each) and found[key] == each for each in allowed):
                raise Unusable(f"has {found.get(key)!r:.40} as {key}")
        return found


def key_of(name: str, number: int) -> str:
    """The key under which a judge says whether the condition of a criterion's cap holds."""
    return f"{name}_condition_{number + 1}"


def score_of(values: list[float | str]) -> Score:
    """The mean of an answer's values, unless one of them is a fault or there are none."""
    faults = [each for each in values if isinstance(each, str)]
    if faults or not values:
        return Score.none(faults[0] if faults else "stands alone: a rubric with compare needs two answers to a prompt")
    return Score(statistics.fmean(each for each in values if not isinstance(each, str)))


def text_of(message: Message) -> str:
    """Its content; "" of a message that only calls a tool."""
    return message.get("content") or ""


def in_words(conversation: Conversation) -> str:
    return "\n\n".join(f"{message['role']}:\n{text_of(message)}" for message in conversation)


def schema_of(values: dict[str, list[Any]]) -> dict[str, Any]:
    """The JSON schema of an object with these keys and values."""
    kinds = {bool: "boolean", int: "integer", str: "string"}
    properties = {key: {"type": kinds[type(each[0])], "enum": each} for key, each in values.items()}
    return {"type": "object", "properties": properties, "required": list(values), "additionalProperties": False}
