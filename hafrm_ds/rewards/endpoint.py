"""A chat endpoint that speaks OpenAI's JSON, as vLLM, SGLang, `transformers serve` and APIs do, and how it is asked.

Faults are of three kinds. `EndpointError`: nobody answers there, or the key or the model is refused; every request
would meet the same, so the job ends. `Unanswered`: one request has failed for good, and with it its row or dialogue.
`Unusable`: an answer came and is not what was asked for; `insist` asks again, a limited number of times.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import Field

from hafrm_ds.config import Positive, PositiveInt
from hafrm_ds.data.pairs import Message, valid_text
from hafrm_ds.errors import ConfigError, ModelError, UserError
from hafrm_ds.options import Section

T = TypeVar("T")

UNUSABLE_ANSWERS = 5
"""After so many answers that are not what was asked for, no other is asked for."""
FOR_ALL = (401, 403, 404)
"""Statuses that every request would meet: the key, the model or the URL is wrong."""
FOR_THIS = (400, 422)
"""Statuses that say that something in a request is not understood."""


class Endpoint(Section):
    """A chat endpoint that speaks OpenAI's JSON."""

    url: str
    """Base URL of its API, which mostly ends in /v1."""
    model: str
    """Name of the model there."""
    key_file: Path | None = None
    """File that holds the key. Default: no key."""
    timeout: Positive = 120.0
    """Seconds that one attempt of a request may take."""
    attempts: PositiveInt = 5
    """How often a request is tried that nobody answers in time, or with status 408, 409, 429 or 500 and above. Between
    two attempts lie the seconds of Retry-After (of more than two minutes the request fails), else up to 8 seconds."""
    body: dict[str, Any] = Field(default={})
    """More keys of each request, as {top_p: 0.9}; null takes out one that would be sent, as {seed: null}."""

    def identity(self) -> dict[str, Any]:
        """What answers depend on, JSON-serialisable: not where the endpoint listens."""
        return {"model": self.model, "body": self.body}


class Reply(NamedTuple):
    """What a model has answered. ended: by the model itself, not by max_tokens. read, written: tokens of the request
    and of the answer, as the endpoint counts them; 0 where it does not."""

    text: str
    ended: bool
    read: int = 0
    written: int = 0


class EndpointError(ModelError):
    """Every request to an endpoint would fail."""


class Unanswered(UserError):
    """A request has failed for good."""


class Refused(Unanswered):
    """An endpoint does not understand something in a request."""


class Unusable(Exception):
    """An answer is not what was asked for."""


def seed_of(*parts: Any) -> int:
    """A seed of 31 bits that depends on all parts, which are JSON-serialisable."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:4], "big") >> 1


def insist(say: Callable[[int], T]) -> T:
    """What `say` gives for the first of the attempts 0, 1, ... whose answer is usable. Raises Unanswered if none is."""
    reason = ""
    for attempt in range(UNUSABLE_ANSWERS):
        try:
            return say(attempt)
        except Unusable as error:
            reason = str(error)
    raise Unanswered(f"{UNUSABLE_ANSWERS} answers could not be used, the last because it {reason}")


class Chat:
    """An endpoint and the client that asks it, from any number of threads."""

    def __init__(self, endpoint: Endpoint):
        """Raises ConfigError if the client is not installed or the key cannot be read."""
        if importlib.util.find_spec("openai") is None:
            raise ConfigError([f"{endpoint.url}: chat endpoints need openai: pip install -e '.[correct]'"])
        import openai

        self.endpoint, self.errors, self.takes_schemas = endpoint, openai, True
        self.client = openai.OpenAI(
            base_url=endpoint.url,
            api_key=key_of(endpoint),
            timeout=endpoint.timeout,
            max_retries=endpoint.attempts - 1,
        )

    def identity(self) -> dict[str, Any]:
        return self.endpoint.identity()

    def reply(
        self,
        messages: Sequence[Message],
        *,
        temperature: float,
        max_tokens: int,
        seed: int,
        schema: dict[str, Any] | None = None,
    ) -> Reply:
        """The answer to a conversation.

        Args:
            schema: a JSON schema for the answer. An endpoint that takes a request only without one gets no others.

        Raises:
            EndpointError, Unanswered, Unusable: see the module's text.
        """
        settings = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
        body = {"model": self.endpoint.model, "messages": list(messages)} | settings
        if schema is None or not self.takes_schemas:
            return self.post(body)
        form = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
        try:
            return self.post(body | {"response_format": form})
        except Refused:
            reply = self.post(body)
            self.takes_schemas = False
            return reply

    def post(self, body: dict[str, Any]) -> Reply:
        url, errors = self.endpoint.url, self.errors
        sent = {name: value for name, value in (body | self.endpoint.body).items() if value is not None}
        try:
            answer = self.client.post("/chat/completions", body=sent, cast_to=object)
        except errors.APITimeoutError as error:
            tries = f"each of {self.endpoint.attempts} attempts"
            raise Unanswered(f"{url} took longer than {self.endpoint.timeout:g} s in {tries}") from error
        except errors.APIConnectionError as error:
            raise EndpointError(f"{url} cannot be reached ({error.__cause__ or error})") from error
        except errors.APIStatusError as error:
            said = f"{url} answered with status {error.status_code}: {' '.join(error.message.split()):.300}"
            if error.status_code in FOR_ALL:
                raise EndpointError(said) from error
            raise (Refused if error.status_code in FOR_THIS else Unanswered)(said) from error
        except ValueError as error:
            raise Unusable("is no JSON") from error
        return reply_of(answer)


def key_of(endpoint: Endpoint) -> str:
    """The key of an endpoint; a word that means nothing where it has none, as the client insists on one."""
    if endpoint.key_file is None:
        return "none"
    try:
        return endpoint.key_file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"key_file {endpoint.key_file} cannot be read: {error}"]) from error


def reply_of(answer: Any) -> Reply:
    """Raises Unusable if an answer is no chat completion with a text."""
    try:
        choice = answer["choices"][0]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
    except (AttributeError, IndexError, KeyError, TypeError):
        raise Unusable("is no chat completion") from None
    if not isinstance(text, str):
        raise Unusable("holds no text")
    if valid_text(text) != text:
        raise Unusable("holds half of a surrogate pair, which is no text")
    counted = answer.get("usage")
    usage = counted if isinstance(counted, dict) else {}
    counts = (usage.get(f"{side}_tokens") for side in ("prompt", "completion"))
    read, written = (count if isinstance(count, int) else 0 for count in counts)
    return Reply(text.strip(), reason != "length", read, written)


def json_object(text: str) -> dict[str, Any] | None:
    """The first JSON object in a text, or None."""
    start = text.find("{")
    while start >= 0:
        try:
            return json.JSONDecoder().raw_decode(text, start)[0]
        except (ValueError, RecursionError):
            start = text.find("{", start + 1)
    return None
