"""The server in OpenAPI 3.1, as GET /openapi.json gives it."""

from typing import Any

import hafrm_ds

TEXT: dict[str, Any] = {"type": "string"}
NUMBER: dict[str, Any] = {"type": "number"}
MESSAGES: dict[str, Any] = {
    "type": "array",
    "items": {"type": "object", "properties": {"role": TEXT, "content": TEXT}, "required": ["role", "content"]},
}


def array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def record(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    """A JSON object; without properties, any."""
    return {"type": "object"} | ({"properties": properties, "required": list(required)} if properties else {})


ROW = record(messages=MESSAGES, prompt={"anyOf": [TEXT, MESSAGES]}, response=TEXT, responses=array(TEXT))
ROWS = {"anyOf": [record(("rows",), rows=array(ROW)), array(ROW)]}
ANSWER_TOKENS = record(
    ("token_ids", "tokens", "logprobs", "logprob"),
    token_ids=array({"type": "integer"}),
    tokens=array(TEXT),
    logprobs=array(NUMBER),
    logprob=NUMBER,
    reference_logprobs=array(NUMBER),
    implicit_rewards=array(NUMBER),
    implicit_reward=NUMBER,
)
CLASS = record(
    ("index", "label", "probs", "num_classes"),
    index={"type": "integer"},
    label=TEXT,
    probs=array(NUMBER),
    num_classes={"type": "integer"},
)
POSTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "/get_reward": (
        "OpenRLHF (--reward.remote_url).",
        record(("query",), query=array(TEXT), prompts=array(TEXT), labels=array({})),
        record(("rewards", "scores", "extra_logs"), rewards=array(NUMBER), scores=array(NUMBER), extra_logs=record()),
    ),
    "/reward": (
        "slime (--rm-type remote_rm --rm-url).",
        record(("prompt", "response"), prompt={"anyOf": [TEXT, MESSAGES]}, response=TEXT, label={}),
        NUMBER,
    ),
    "/classify": (
        "vLLM's, and so verl's; `probs` holds the reward as it is.",
        record(
            model=TEXT,
            messages=MESSAGES,
            input={"anyOf": [TEXT, array(TEXT)]},
            use_activation={"enum": [False, None]},
        ),
        record(("id", "object", "created", "model", "data", "usage"), data=array(CLASS), usage=record()),
    ),
    "/score": (
        "Rows of launch/score.py; the same rows with score, or scores of several responses.",
        ROWS,
        record(("rows",), rows=array(ROW)),
    ),
    "/logprobs": (
        "Rows of launch/score.py; the policy's log-prob of each token of the answers, and implicit rewards.",
        ROWS,
        record(("rows",), rows=array(record(("answers",), answers=array(ANSWER_TOKENS)))),
    ),
}
"""Path -> what it is for, its request and its response."""
GETS = {
    "/health": "200 where requests are answered; 503 while the reward is loaded or the server stopped.",
    "/metrics": "Counters for Prometheus.",
    "/openapi.json": "This description.",
}
FAULTS = {
    "400": "The request is not what the route takes.",
    "401": "The key is missing or wrong.",
    "408": "The body came too slowly.",
    "413": "The body, or the number of conversations, is too large.",
    "422": "Rows that cannot be scored; they are named.",
    "500": "A worker died, or had no room.",
    "503": "The queue is full, or the server is being stopped; Retry-After says when to come again.",
    "504": "No answer in time.",
}
ERROR = record(
    ("error",),
    error=record(
        ("message", "code"),
        message=TEXT,
        code={"type": "integer"},
        rows=array(record(("row", "error"), row=TEXT, error=TEXT)),
    ),
)


def description() -> dict[str, Any]:
    def content(schema: dict[str, Any]) -> dict[str, Any]:
        return {"content": {"application/json": {"schema": schema}}}

    faults = {status: {"description": about} | content(ERROR) for status, about in FAULTS.items()}
    paths: dict[str, Any] = {
        path: {
            "post": {
                "summary": about,
                "requestBody": {"required": True} | content(request),
                "responses": {"200": {"description": "Scored."} | content(response)} | faults,
            }
        }
        for path, (about, request, response) in POSTS.items()
    }
    paths |= {
        path: {"get": {"summary": about, "responses": {"200": {"description": about}}}} for path, about in GETS.items()
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "hafrm_ds rewards", "version": hafrm_ds.__version__},
        "components": {
            "securitySchemes": {
                "header": {"type": "http", "scheme": "bearer"},
                "url": {"type": "apiKey", "in": "query", "name": "key"},
            }
        },
        "security": [{"header": []}, {"url": []}, {}],
        "paths": paths,
    }
