"""What each client sends and expects, word for word.

A request's JSON becomes an `Asked`: conversations with the places that name them, and how their values are written.
What is wrong with a row is kept with its place; a number never stands for it. `serving.openapi` writes down the JSON.
"""

import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hafrm_ds.data.pairs import Row
from hafrm_ds.errors import DataError
from hafrm_ds.rewards.reward import Score
from hafrm_ds.saved.scorer import Conversation
from hafrm_ds.scoring.rows import ScoredRow, conversations_of
from hafrm_ds.serving.options import ServingOptions
from hafrm_ds.serving.rendered import Item, Rendered
from hafrm_ds.serving.worker import Answer, Kind

Faults = dict[str, str]
"""Place -> what is wrong there."""


class BadRequest(Exception):
    """The request as a whole is not what the route takes."""


@dataclass
class Asked:
    """A request as it was read.

    items: what is asked about; places: the name of each in the request. faults: rows that cannot be read.
    write: answers, in the order of the items, -> the JSON of the response, where nothing is wrong.
    write_rows: all answers -> (the JSON, faults), of a route whose rows say themselves what is wrong with them.
    """

    write: Callable[[list[Answer]], Any]
    kind: Kind = "score"
    items: list[Item] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    faults: Faults = field(default_factory=dict)
    write_rows: Callable[[list[Answer]], tuple[Any, Faults]] | None = None

    def add(self, place: str, read: Callable[..., Item], *row: Any) -> None:
        """Read a row, or keep what is wrong with it."""
        try:
            self.items.append(read(*row))
            self.places.append(place)
        except DataError as error:
            self.faults[place] = str(error)

    def response(self, answers: Sequence[Answer]) -> tuple[Any, Faults]:
        """Answers -> (the JSON, None where there is none, and what is wrong)."""
        if self.write_rows is not None:
            return self.write_rows(list(answers))
        faults = self.faults | {
            place: answer.error for place, answer in zip(self.places, answers, strict=True) if answer.error
        }
        return (None if faults else self.write(list(answers))), faults


# ---- texts and messages ----------------------------------------------------------------------------------------------


def conversation(prompt: Any, answer: Any, label: Any, options: ServingOptions) -> Item:
    """A prompt, which is a text or messages, with its answer. Messages in the label stand for a prompt that is a text.

    Raises:
        DataError: it is neither.
    """
    if not isinstance(answer, str):
        raise DataError(f"the answer is a {type(answer).__name__}, expected a text")
    messages = prompt if isinstance(prompt, list) else messages_in(label)
    if messages is None and not isinstance(prompt, str):
        raise DataError(f"the prompt is a {type(prompt).__name__}, expected a text or a list of messages")
    if messages is None and options.prompts == "rendered":
        return Rendered(prompt + answer, prompt)
    fields = {"prompt": messages or prompt, "response": without_end(answer, options.end_marks)}
    return conversations_of(Row(fields, "the row", ""))[1][0]


def messages_in(label: Any) -> list | None:
    """The messages of a prompt that a label holds: a list, an object with `messages` or `prompt`, or JSON of these."""
    if isinstance(label, str) and label.lstrip()[:1] in ("[", "{"):
        try:
            label = json.loads(label)
        except (ValueError, RecursionError):
            return None
    if isinstance(label, dict):
        label = label.get("messages") or label.get("prompt")
    is_messages = isinstance(label, list) and bool(label) and all(isinstance(each, dict) for each in label)
    return label if is_messages and all("role" in each or "from" in each for each in label) else None


def without_end(answer: str, end_marks: Sequence[str]) -> str:
    """An answer without the marks that a policy ends it with."""
    while mark := next((each for each in end_marks if each and answer.rstrip("\n").endswith(each)), None):
        answer = answer.rstrip("\n").removesuffix(mark)
    return answer


def listed(body: Any, name: str) -> list:
    if not isinstance(body, dict) or not isinstance(body.get(name), list):
        raise BadRequest(f"expected an object with a list {name!r}")
    return body[name]


# ---- the routes ------------------------------------------------------------------------------------------------------


def openrlhf(body: Any, options: ServingOptions) -> Asked:
    """OpenRLHF (--reward.remote_url): a reward for each query, a prompt with its answer. The logs hold a list for each
    attribute of a model that has them."""
    queries = listed(body, "query")
    columns = [body.get(name) or [None] * len(queries) for name in ("prompts", "labels")]
    if any(not isinstance(column, list) or len(column) != len(queries) for column in columns):
        raise BadRequest(f"query has {len(queries)} texts; prompts and labels must be lists of as many")

    def read(query: Any, prompt: Any, label: Any) -> Item:
        if not isinstance(query, str):
            raise DataError(f"is a {type(query).__name__}, expected a text")
        needs_prompt = options.prompts == "text" or messages_in(label) is not None
        if not needs_prompt:
            return Rendered(query, prompt if isinstance(prompt, str) and query.startswith(prompt) else "")
        if not isinstance(prompt, str) or not query.startswith(prompt):
            raise DataError("does not begin with its prompt, so what is the answer is not known")
        return conversation(prompt, query.removeprefix(prompt), label, options)

    def write(answers: list[Answer]) -> dict[str, Any]:
        values = [answer.value for answer in answers]
        names = answers[0].attributes if answers else ()
        logs = {name: [answer.attributes[name] for answer in answers] for name in names}
        return {"rewards": values, "scores": values, "extra_logs": logs}

    asked = Asked(write)
    for number, row in enumerate(zip(queries, *columns)):
        asked.add(f"query[{number}]", read, *row)
    return asked


def slime(body: Any, options: ServingOptions) -> Asked:
    """slime (--rm-type remote_rm --rm-url): a bare number."""
    if not isinstance(body, dict) or not {"prompt", "response"} <= body.keys():
        raise BadRequest("expected an object with prompt and response")
    asked = Asked(lambda answers: answers[0].value)
    asked.add("response", conversation, body["prompt"], body["response"], body.get("label"), options)
    return asked


def vllm(body: Any, options: ServingOptions) -> Asked:
    """vLLM's, and so verl's: messages or input, with use_activation false or null; the "probability" of the one class
    of each is its reward as it is."""
    if not isinstance(body, dict) or ("messages" in body) == ("input" in body):
        raise BadRequest("expected an object with either messages or input")
    if body.get("use_activation"):
        raise BadRequest("use_activation: rewards are given as they are; send false")

    def read(text: Any) -> Item:
        if not isinstance(text, str):
            raise DataError(f"is a {type(text).__name__}, expected a text")
        return Rendered(text, "")

    def write(answers: list[Answer]) -> dict[str, Any]:
        data = [
            {"index": index, "label": "LABEL_0", "probs": [answer.value], "num_classes": 1}
            for index, answer in enumerate(answers)
        ]
        tokens = sum(answer.tokens for answer in answers)
        return {
            "id": f"classify-{uuid.uuid4().hex}",
            "object": "list",
            "created": int(time.time()),
            "model": body.get("model") or str(options.model),
            "data": data,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
        }

    asked = Asked(write)
    if "messages" in body:
        asked.add("messages", messages_of, body["messages"])
    else:
        texts = body["input"] if isinstance(body["input"], list) else [body["input"]]
        for number, text in enumerate(texts):
            asked.add(f"input[{number}]", read, text)
    return asked


def messages_of(messages: Any) -> Conversation:
    return conversations_of(Row({"messages": messages}, "the row", ""))[1][0]


def rows_of(body: Any, asked: Asked) -> list[tuple[ScoredRow, str]]:
    """The rows of a request with their places; their conversations are asked about."""
    listed_rows = listed({"rows": body} if isinstance(body, list) else body, "rows")
    places = [f"rows[{number}]" for number in range(len(listed_rows))]
    rows = [(ScoredRow.of(fields, place), place) for fields, place in zip(listed_rows, places)]
    for row, place in rows:
        asked.items += row.conversations
        asked.places += [place] * len(row.conversations)
    return rows


def score(body: Any, options: ServingOptions) -> Asked:
    """Rows of launch/score.py: the same rows with score, or scores of several responses. A row that cannot be scored
    has the score null and the reason in score_error, and the status is 422."""
    asked = Asked(lambda answers: None)
    rows = rows_of(body, asked)

    def write_rows(answers: list[Answer]) -> tuple[Any, Faults]:
        left = iter(answers)
        names = next((tuple(answer.attributes) for answer in answers if not answer.error), ())
        written, faults = [], {}
        for row, place in rows:
            own = [next(left) for _ in row.conversations]
            scores = [Score(each.value, each.error, attributes=tuple(each.attributes.values())) for each in own]
            fields, error = row.scored(scores, place, names)
            written.append(fields)
            if error:
                faults[place] = error
        return {"rows": written}, faults

    asked.write_rows = write_rows
    return asked


def logprobs(body: Any, options: ServingOptions) -> Asked:
    """Rows of launch/score.py: of each answer the policy's log-prob of each token, and implicit rewards. The texts in
    tokens, joined, are the answer with the end that the template writes; of a character that several tokens make up,
    the last has it all and the others are empty."""

    def write(answers: list[Answer]) -> dict[str, Any]:
        left = iter(answers)
        return {"rows": [{"answers": [next(left).value for _ in row.conversations]} for row, _ in rows]}

    asked = Asked(write, "logprobs")
    rows = rows_of(body, asked)
    asked.faults = {place: row.error for row, place in rows if row.error}
    return asked


ROUTES: dict[str, Callable[[Any, ServingOptions], Asked]] = {
    "/get_reward": openrlhf,
    "/reward": slime,
    "/classify": vllm,
    "/score": score,
    "/logprobs": logprobs,
}
"""Path -> how its requests are read."""
