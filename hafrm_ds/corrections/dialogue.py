"""One supervised dialogue: user and assistant speak in turns, and the supervisor looks at their drafts.

draft -> the supervisor: "no problem"        -> it is sent
                         advice -> a rewrite -> that is sent, and draft and rewrite are a pair
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hafrm_ds.corrections.scenario import Case, Scenario, Speaker, filled
from hafrm_ds.corrections.seats import Seated
from hafrm_ds.data.pairs import Message, assistant, user
from hafrm_ds.rewards.endpoint import Reply, Unanswered, Unusable, insist, seed_of

# What becomes of a draft. Only the last makes a pair.
UNSUPERVISED, NO_PROBLEM = "not supervised", "no problem"
LEAK = "the advice gives away what the seat may not know: not handed on"
EMPTY, IDENTICAL = "the correction is empty: the draft is sent", "the correction is the draft"
TRUNCATED = "draft or correction is truncated at max_tokens: no pair"
CORRECTED = "corrected"
OUTCOMES = (UNSUPERVISED, NO_PROBLEM, LEAK, EMPTY, IDENTICAL, TRUNCATED, CORRECTED)


@dataclass
class Turn:
    """A message, and how it came about.

    prompt: what the seat was sent for the draft. advice, rewrite: "" where there was none. sent: what the other seat is
    shown. ends: the dialogue. seeds, hashes: of the requests for draft, advice and rewrite, as far as there were any.
    tokens: seat -> those that its endpoint has read and written.
    """

    seat: Speaker
    prompt: list[Message]
    draft: str = ""
    advice: str = ""
    rewrite: str = ""
    sent: str = ""
    ends: bool = False
    outcome: str = UNSUPERVISED
    seeds: dict[str, int] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class Dialogue:
    """A dialogue about a case, from its first message on. `play` is its whole life.

    number: from 0; all seeds depend on it and on the scenario's. check: called before each turn, may raise.
    """

    scenario: Scenario
    seats: dict[str, Seated]
    number: int
    case: Case
    check: Callable[[], None]
    turns: list[Turn] = field(default_factory=list)

    def play(self) -> dict[str, Any]:
        """The record of the dialogue, JSON-serialisable.

        Raises:
            EndpointError: a seat answers nobody. Unanswered: a seat does not answer here, which the message names.
        """
        end = "max_turns"
        while len(self.turns) < self.scenario.max_turns and end == "max_turns":
            self.check()
            turn = self.next_turn("assistant" if len(self.turns) % 2 else "user")
            self.turns += [turn] * bool(turn.sent)
            end = "end_mark" if turn.ends else end
        turns = [vars(turn) for turn in self.turns]
        return {"scenario": self.scenario.name, "dialogue": self.number, "case": self.case, "end": end, "turns": turns}

    def next_turn(self, speaker: Speaker) -> Turn:
        turn = Turn(speaker, self.prompt_of(speaker))
        draft = self.ask("draft", speaker, turn.prompt, turn)
        turn.draft, turn.ends = self.without_mark(draft.text)
        turn.sent = turn.draft
        if turn.draft and self.scenario.rules.get(speaker):
            self.supervise(turn, draft.ended)
        return turn

    def supervise(self, turn: Turn, is_whole: bool) -> None:
        """Have a draft looked at, and rewritten if there is advice. is_whole: the draft is not truncated."""
        scenario, known = self.scenario, "\n".join(message["content"] for message in [*turn.prompt, user(turn.draft)])
        advice = self.ask("advice", "supervisor", self.question(turn), turn).text
        if bare(advice) == bare(scenario.no_problem):
            turn.outcome = NO_PROBLEM
            return
        turn.advice = advice
        if scenario.leaks_to(turn.seat, self.case, advice, known):
            turn.outcome = LEAK
            return
        given = {"last": turn.prompt[-1]["content"], "draft": turn.draft, "advice": advice}
        anew = [*turn.prompt[:-1], user(filled(scenario.rewrite, self.case | given))]
        reply = self.ask("rewrite", turn.seat, anew, turn, may_be_empty=True)
        turn.rewrite, ends = self.without_mark(reply.text)
        turn.outcome = outcome_of(turn, is_whole and reply.ended)
        if turn.rewrite:
            turn.sent, turn.ends = turn.rewrite, ends

    def ask(self, kind: str, name: str, messages: list[Message], turn: Turn, *, may_be_empty: bool = False) -> Reply:
        """Ask a seat, and note the seed and the hash of the request in `turn`. Raises as `play` does."""
        place, seat = len(self.turns), self.scenario.seat(name)

        def say(attempt: int) -> Reply:
            turn.seeds[kind] = seed_of(self.scenario.seed, self.number, place, kind, attempt)
            reply = self.seats[name].reply(
                messages, temperature=seat.temperature, max_tokens=seat.max_tokens, seed=turn.seeds[kind]
            )
            read, written = turn.tokens.get(name, (0, 0))
            turn.tokens[name] = [read + reply.read, written + reply.written]
            if not reply.text and not may_be_empty:
                raise Unusable("is empty")
            return reply

        turn.hashes[kind] = hash_of_messages(messages)
        try:
            return insist(say)
        except Unanswered as error:
            raise Unanswered(f"{name}, {kind} of message {place + 1}: {error}") from error

    def prompt_of(self, speaker: Speaker) -> list[Message]:
        """The conversation as a seat sees it: its own messages are those of the assistant."""
        system = {"role": "system", "content": filled(self.scenario.seat(speaker).system, self.case)}
        earlier = [assistant(turn.sent) if turn.seat == speaker else user(turn.sent) for turn in self.turns]
        opening = [user(filled(self.scenario.opening, self.case))] if speaker == "user" else []
        return [system, *opening, *earlier]

    def question(self, turn: Turn) -> list[Message]:
        """Build the messages that show the supervisor a draft."""
        scenario = self.scenario
        facts = "\n".join(filled(f"{name}: {{{name}}}", self.case) for name in scenario.fields)
        system = f"{filled(scenario.seats.supervisor.system, self.case)}\n\nThe case:\n{facts}"
        said = {
            "history": "\n\n".join(f"{turn.seat}: {turn.sent}" for turn in self.turns) or "-",
            "seat": turn.seat,
            "draft": turn.draft,
            "rules": "\n".join(f"- {rule}" for rule in scenario.rules[turn.seat]),
            "no_problem": scenario.no_problem,
            "hidden": ", ".join(scenario.hidden_from(turn.seat)) or "-",
        }
        return [{"role": "system", "content": system}, user(filled(scenario.advice, said))]

    def without_mark(self, text: str) -> tuple[str, bool]:
        """A message without the end mark, and whether it had one."""
        return text.replace(self.scenario.end_mark, "").strip(), self.scenario.end_mark in text


def bare(words: str) -> str:
    """Words without what a model likes to put around them, in whatever case."""
    return words.strip(" \n.!\"'`*").casefold()


def outcome_of(turn: Turn, is_whole: bool) -> str:
    """Name the outcome of a draft with advice. is_whole: neither draft nor rewrite is truncated."""
    if not turn.rewrite:
        return EMPTY
    if turn.rewrite.split() == turn.draft.split():
        return IDENTICAL
    return CORRECTED if is_whole else TRUNCATED


def hash_of_messages(messages: list[Message]) -> str:
    """SHA-256 of what a seat was sent, hexadecimal."""
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()
