"""The server in OpenAPI 3.1, as GET /openapi.json gives it. What a route is for is told by its function in `protocols`.

Here JSON is written as it looks: {"name": str} is an object, whose "name?" may be missing; [float] is a list of
numbers, a tuple holds alternatives, `Any` is anything.
"""

from typing import Any

import hafrm_ds
from hafrm_ds.serving.protocols import ROUTES

TYPES = {str: "string", float: "number", int: "integer", bool: "boolean", None: "null"}
MESSAGES = [{"role": str, "content": str}]
ROW = {"messages?": MESSAGES, "prompt?": (str, MESSAGES), "response?": str, "responses?": [str]}
ROWS = ({"rows": [ROW]}, [ROW])
SCORED = {"score?": (float, None), "scores?": ([float], None)}
TOKENS = {
    **{"token_ids": [int], "tokens": [str], "logprobs": [float], "logprob": float},
    **{"reference_logprobs?": [float], "implicit_rewards?": [float], "implicit_reward?": float},
}
CLASSES = [{"index": int, "label": str, "probs": [float], "num_classes": int}]
POSTS: dict[str, tuple[Any, Any]] = {
    "/get_reward": (
        {"query": [str], "prompts?": [str], "labels?": [Any]},
        {"rewards": [float], "scores": [float], "extra_logs": {}},
    ),
    "/reward": ({"prompt": (str, MESSAGES), "response": str, "label?": Any}, float),
    "/classify": (
        {"model?": str, "messages?": MESSAGES, "input?": (str, [str]), "use_activation?": (bool, None)},
        {"id": str, "object": str, "created": int, "model": str, "data": CLASSES, "usage": {}},
    ),
    "/score": (ROWS, {"rows": [ROW | SCORED]}),
    "/logprobs": (ROWS, {"rows": [{"answers": [TOKENS]}]}),
}
"""Path -> its request and its response."""
MODEL = {
    **{"model": str, "scores": str, "logprobs": bool, "reference": (str, None), "beta": (float, None)},
    **{"weights": ([float], None), "missing": {"reward?": str, "implicit?": str, "combined?": str}},
}
GETS: dict[str, tuple[str, Any]] = {
    "/model": (
        "What is served: what /score gives, whether /logprobs answers, what its implicit rewards are measured against, "
        "what both heads count in the combined judge, and why a judge is missing.",
        MODEL,
    ),
    "/health": ("200 where requests are answered; 503 while the reward is loaded or the server stopped.", {}),
    "/metrics": ("Counters for Prometheus.", None),
    "/openapi.json": ("This description.", {}),
}
FAULTS = {
    "400": "The request is not what the route takes.",
    "401": "The key is missing or wrong.",
    "408": "The body came too slowly.",
    "413": "The body, or the number of conversations, is too large.",
    "422": "Rows that cannot be scored; they are named.",
    "500": "A worker died.",
    "503": "The queue is full, or the server is being stopped; Retry-After says when to come again.",
    "504": "No answer in time.",
}
ERROR = {"error": {"message": str, "code": int, "rows?": [{"row": str, "error": str}]}}


def schema(shape: Any) -> dict[str, Any]:
    """The JSON schema of a shape."""
    if isinstance(shape, list):
        return {"type": "array", "items": schema(shape[0])}
    if isinstance(shape, tuple):
        return {"anyOf": [schema(each) for each in shape]}
    if isinstance(shape, dict):
        properties = {name.removesuffix("?"): schema(each) for name, each in shape.items()}
        required = [name for name in shape if not name.endswith("?")]
        return {"type": "object", "properties": properties, "required": required}
    return {} if shape is Any else {"type": TYPES[shape]}


def content(shape: Any) -> dict[str, Any]:
    return {} if shape is None else {"content": {"application/json": {"schema": schema(shape)}}}


def description() -> dict[str, Any]:
    faults = {status: {"description": about} | content(ERROR) for status, about in FAULTS.items()}
    paths: dict[str, Any] = {
        path: {
            "post": {
                "summary": " ".join((ROUTES[path].__doc__ or "").split()),
                "requestBody": {"required": True} | content(request),
                "responses": {"200": {"description": "Scored."} | content(response)} | faults,
            }
        }
        for path, (request, response) in POSTS.items()
    }
    for path, (about, response) in GETS.items():
        paths[path] = {"get": {"summary": about, "responses": {"200": {"description": about} | content(response)}}}
    header, url = {"type": "http", "scheme": "bearer"}, {"type": "apiKey", "in": "query", "name": "key"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "hafrm_ds rewards", "version": hafrm_ds.__version__},
        "components": {"securitySchemes": {"header": header, "url": url}},
        "security": [{"header": []}, {"url": []}, {}],
        "paths": paths,
    }
