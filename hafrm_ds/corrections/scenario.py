"""A scenario: who speaks with whom about which cases, who may know what, and what the supervisor holds drafts to.

It is the options of launch/correct.py, so a scenario file is a YAML file for --config. Texts for seats are templates:
{NAME} stands for the field NAME of the case.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from hafrm_ds.config import NonNegative, PositiveInt
from hafrm_ds.data.files import file_table
from hafrm_ds.errors import ConfigError, DataError
from hafrm_ds.options import Section
from hafrm_ds.rewards.endpoint import Endpoint

Speaker = Literal["user", "assistant"]
SPEAKERS: tuple[Speaker, ...] = get_args(Speaker)
Case = dict[str, Any]

NAME = re.compile(r"\{(\w+)\}")
OF_ADVICE = ("history", "seat", "draft", "rules", "no_problem", "hidden")
OF_REWRITE = ("last", "draft", "advice")
"""The names that the templates `advice` and `rewrite` may hold."""
SHORTEST_VALUE = 3
"""A value of fewer characters (in scripts beyond ASCII, of one) stands in a text by chance, and is not looked for."""
FAULTS_SHOWN = 20

ADVICE = """The conversation so far:

{history}

The {seat} wants to say:

{draft}

The rules for the {seat}:
{rules}

If the draft keeps all rules, answer exactly: {no_problem}
If not, say in a few words what to change. The {seat} must not learn from you: {hidden}."""
REWRITE = """{last}

(You have drafted this answer, which has not been sent:

{draft}

You have been given this advice on it:

{advice}

Write the answer anew, following the advice. Write the answer alone.)"""


class Seat(Section):
    """Who sits at a seat, and what it is told."""

    endpoint: Endpoint | None = None
    """A chat endpoint."""
    model: str | None = None
    """Instead of an endpoint, a policy that is loaded here: the final/ folder of a training or another causal LM."""
    system: str
    """The system message, a template."""
    temperature: NonNegative = 0.7
    """0 takes the most probable token each time."""
    max_tokens: PositiveInt = 512
    """Tokens of one message."""


class Seats(Section):
    """The three seats."""

    user: Seat
    assistant: Seat
    supervisor: Seat


class Scenario(Section):
    """A scenario, and how often it is played."""

    output_dir: Path
    """Folder for pairs.jsonl, report.json and the dialogues."""
    name: Annotated[str, Field(pattern=r"^\S+$")]
    """The name of the scenario, which is the `source` of its pairs."""
    seats: Seats
    fields: dict[str, list[Speaker]]
    """Field of a case -> the seats that may see it, beside the supervisor, who sees all."""
    withhold: list[str] = Field(default=[])
    """Fields that are shown to the supervisor alone this time, whoever may see them."""
    cases: Path | list[dict[str, Any]]
    """A file of rows, or mappings in a list: of each case, field -> text, number, true or false, or a list of these."""
    rules: dict[Speaker, list[str]]
    """Seat -> what the supervisor holds its drafts to. A seat without rules is not supervised."""
    train: Speaker = "assistant"
    """The seat whose corrections become pairs."""
    opening: str = "(The conversation begins. You speak first.)"
    """A template for what the user is told before its first message, where no message of the assistant stands."""
    end_mark: str = "[END]"
    """Whoever writes it ends the dialogue. It is taken out of the message."""
    max_turns: PositiveInt = 12
    """Messages of a dialogue, of user and assistant together."""
    no_problem: str = "no problem"
    """The words by which the supervisor lets a draft be sent as it is."""
    advice: str = ADVICE
    """What the supervisor is asked, with {history}, {seat}, {draft}, {rules}, {no_problem} and {hidden}, the names of
    the fields that the seat may not see."""
    rewrite: str = REWRITE
    """What a seat is told after advice, in place of the last message, with {last}, {draft} and {advice}."""
    dialogues: PositiveInt | None = None
    """How many, one case after another and again from the first. Default: one of each case."""
    seed: int = 0
    """Of all seeds that models are sent."""
    parallel: PositiveInt = 8
    """Dialogues at once."""

    def contradictions(self) -> list[str]:
        problems = [f"withhold: {name} is no field" for name in self.withhold if name not in self.fields]
        problems += [
            f"fields: {name!r} cannot stand in a template: a name is of letters, digits and _, and none of "
            f"{', '.join(OF_REWRITE)}"
            for name in self.fields
            if not NAME.fullmatch(f"{{{name}}}") or name in OF_REWRITE
        ]
        if not self.rules.get(self.train):
            problems.append(f"rules: the {self.train} is to be trained (train), but has no rules to be corrected by")
        for name in Seats.model_fields:
            seat = self.seat(name)
            if (seat.endpoint is None) == (seat.model is None):
                problems.append(f"seats.{name}: give endpoint or model")
        for text, names in {"advice": ("draft", "no_problem"), "rewrite": ("draft", "advice")}.items():
            missing = set(names) - set(NAME.findall(getattr(self, text)))
            problems += [f"{text}: has no {{{name}}}" for name in sorted(missing)]
        unknown = set(NAME.findall(self.advice)) - {*OF_ADVICE}
        known = ", ".join(f"{{{name}}}" for name in OF_ADVICE)
        problems += [f"advice: {{{name}}} is none of {known}" for name in sorted(unknown)]
        return problems

    def seat(self, name: str) -> Seat:
        return getattr(self.seats, name)

    # ---- who may know what -------------------------------------------------------------------------------------------

    def hidden_from(self, speaker: Speaker) -> list[str]:
        return [name for name, seen_by in self.fields.items() if speaker not in seen_by or name in self.withhold]

    def templates_for(self, speaker: Speaker) -> dict[str, str]:
        """Name in the scenario -> template of each text that goes to a seat."""
        texts = {f"seats.{speaker}.system": self.seat(speaker).system, "rewrite": self.rewrite}
        return texts | ({"opening": self.opening} if speaker == "user" else {})

    def leaks_to(self, speaker: Speaker, case: Case, text: str, known: str = "") -> list[str]:
        """The fields that a text would give away to a seat that may not see them, and that `known` does not hold."""
        given = {name: strings_in(case[name]) for name in self.hidden_from(speaker) if name in case}
        return [
            name for name, texts in given.items() if any(has(text, each) and not has(known, each) for each in texts)
        ]

    # ---- cases -------------------------------------------------------------------------------------------------------

    def read_cases(self) -> list[Case]:
        """All cases, checked against what goes to the seats.

        Raises:
            ConfigError: with all faults: a template or a case with an unknown field, a case without one, a text for a
                seat that holds what it may not see. DataError: the file cannot be read.
        """
        if isinstance(self.cases, Path):
            rows = {f"{self.cases}:{number}": row for number, row in file_table(self.cases, str(self.cases)).rows()}
        else:
            rows = {f"cases.{number}": row for number, row in enumerate(self.cases)}
        if not rows:
            raise DataError(f"cases: {self.cases} holds none")
        problems = [*self.faults_of_templates()]
        for place, case in rows.items():
            problems += [f"{place}: {fault}" for fault in self.faults_of(case)]
        if problems:
            more = len(problems) - FAULTS_SHOWN
            raise ConfigError(problems[:FAULTS_SHOWN] + [f"and {more:,} more"] * (more > 0))
        return list(rows.values())

    def faults_of_templates(self) -> Iterator[str]:
        for speaker in SPEAKERS:
            hidden = self.hidden_from(speaker)
            for place, template in self.templates_for(speaker).items():
                protocol = OF_REWRITE if place == "rewrite" else ()
                for name in dict.fromkeys(NAME.findall(template)):
                    if name not in (*self.fields, *protocol):
                        yield f"{place}: {{{name}}} is no field of `fields`"
                    elif name in hidden:
                        yield f"{place}: {{{name}}} is a field that the {speaker} may not see (`fields`, `withhold`)"
        unknown = set(NAME.findall(self.seats.supervisor.system)) - {*self.fields}
        yield from (f"seats.supervisor.system: {{{name}}} is no field of `fields`" for name in sorted(unknown))

    def faults_of(self, case: Any) -> Iterator[str]:
        if not isinstance(case, dict):
            yield "is no mapping of fields"
            return
        yield from (f"has no {name}, which is in `fields`" for name in self.fields if name not in case)
        yield from (f"has {name}, which is not in `fields`" for name in case if name not in self.fields)
        wrong = [name for name, value in case.items() if not is_plain(value)]
        yield from (f"{name} is no text, number, true, false or list of these" for name in wrong)
        if wrong:
            return
        for speaker in SPEAKERS:
            for place, template in self.templates_for(speaker).items():
                for name in self.leaks_to(speaker, case, filled(template, case)):
                    yield f"{place} tells the {speaker} the value of {name}, which it may not see"


def is_plain(value: Any) -> bool:
    return all(isinstance(each, str | int | float) for each in (value if isinstance(value, list) else [value]))


def strings_in(value: Any) -> list[str]:
    """The texts that give a value away. True and false do not."""
    values = value if isinstance(value, list) else [value]
    texts = [" ".join(str(each).split()) for each in values if not isinstance(each, bool)]
    return [text for text in texts if len(text) >= SHORTEST_VALUE or len(text.encode()) > SHORTEST_VALUE]


def has(text: str, value: str) -> bool:
    """Whether a text holds a value, in whatever case and with whatever white space, and as whole words, where these are
    of the letters of ASCII: not all scripts have spaces between words."""
    pattern = r"\s+".join(map(re.escape, value.split()))
    return re.search(rf"(?<![A-Za-z0-9_]){pattern}(?![A-Za-z0-9_])", text, re.IGNORECASE) is not None


def filled(template: str, values: Mapping[str, Any]) -> str:
    """A template with the values that are given, each {NAME} that is not among them left as it is."""

    def value(found: re.Match) -> str:
        given = values.get(found[1], found[0])
        return ", ".join(map(str, given)) if isinstance(given, list) else str(given)

    return NAME.sub(value, template)
