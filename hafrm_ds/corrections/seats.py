"""Who answers at a seat: a chat endpoint, or a policy that is loaded here."""

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import jinja2

from hafrm_ds.corrections.scenario import Scenario, Seat, Seats
from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.pairs import Message
from hafrm_ds.data.rendering_check import is_serious
from hafrm_ds.errors import ModelError, UserError
from hafrm_ds.generation.samplers import Request, TransformersSampler
from hafrm_ds.model.loading import load_model_config
from hafrm_ds.model.sizes import ModelSizes
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.rewards.endpoint import Chat, Reply, Unanswered
from hafrm_ds.saved.classifier import SavedClassifier
from hafrm_ds.saved.folder import SavedModel
from hafrm_ds.saved.opening import identity_of_model, open_model
from hafrm_ds.saved.policy import SavedPolicy


class Seated(Protocol):
    """Somebody who answers."""

    def identity(self) -> dict[str, Any]:
        """What the answers depend on, JSON-serialisable."""

    def reply(self, messages: Sequence[Message], *, temperature: float, max_tokens: int, seed: int) -> Reply:
        """The next message of a conversation.

        Raises:
            EndpointError, Unanswered, Unusable: as `rewards.endpoint` has them.
        """


class PolicySeat:
    """A policy that is loaded here when it is first asked.

    turn: is held while any policy draws: it takes all cores or the whole GPU, and the process must not end meanwhile.
    """

    def __init__(self, model: str, max_tokens: int, processes: Processes, turn: threading.Lock):
        """Raises ModelError if it is no policy."""
        saved = open_model(model)
        if isinstance(saved, SavedClassifier) or "logprob" not in saved.heads:
            raise ModelError(f"{model} has no LM head: it cannot speak")
        self.saved: SavedModel | SavedPolicy = saved
        self.formatter: ChatFormatter = saved.formatter()
        self.sizes = ModelSizes.of(model, load_model_config(saved.config))
        self.max_tokens, self.processes, self.turn = max_tokens, processes, turn
        self.is_closed = False

    @cached_property
    def sampler(self) -> TransformersSampler:
        return TransformersSampler(self.saved, self.formatter, self.processes, max_new_tokens=self.max_tokens)

    def identity(self) -> dict[str, Any]:
        return identity_of_model(self.saved)

    def reply(self, messages: Sequence[Message], *, temperature: float, max_tokens: int, seed: int) -> Reply:
        ids = self.prompt_ids(list(messages))
        with self.turn:
            if self.is_closed:
                raise UserError("the job has ended")
            [[answer]] = self.sampler.answers([Request(ids, (temperature,), seed)])
        return Reply(answer.text, answer.ended)

    def close(self) -> None:
        """Draw nothing from now on; returns when the answer that is being drawn is there. A process that ends while a
        thread is inside torch is aborted."""
        with self.turn:
            self.is_closed = True

    def prompt_ids(self, messages: list[Message]) -> list[int]:
        """Raises Unanswered if the template loses a part of the messages, or they are too long for the model."""
        try:
            text = self.formatter.render_prompt(messages)
        except jinja2.TemplateError as error:
            raise Unanswered(f"the template refuses the conversation: {error}") from error
        if is_serious(lost := self.formatter.left_out(messages, text)):
            raise Unanswered(f"the template leaves out {', '.join(lost)}")
        [ids] = self.formatter.encode_rendered([text])
        if len(ids) + self.max_tokens > self.sizes.positions:
            raise Unanswered(f"{len(ids):,} tokens and max_tokens are more than {self.sizes.positions:,} positions")
        self.sizes.check_ids([ids], self.formatter.tokenizer)
        return ids


def open_seats(scenario: Scenario, processes: Processes) -> dict[str, Seated]:
    """Who sits at each seat. A policy that sits at several, with the same max_tokens, is loaded once.

    Raises:
        ConfigError, ModelError: an endpoint or a policy cannot be used.
    """
    policies: dict[tuple[str, int], PolicySeat] = {}
    turn = threading.Lock()

    def opened(seat: Seat) -> Seated:
        if seat.endpoint is not None:
            return Chat(seat.endpoint)
        assert seat.model is not None
        key = (seat.model, seat.max_tokens)
        if key not in policies:
            policies[key] = PolicySeat(*key, processes, turn)
        return policies[key]

    return {name: opened(scenario.seat(name)) for name in Seats.model_fields}
