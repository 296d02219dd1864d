"""What each client sends and gets, word for word."""

import pytest

from hafrm_ds.data.pairs import assistant, user
from hafrm_ds.serving.dispatcher import Dispatcher
from hafrm_ds.serving.front import Front
from hafrm_ds.serving.openapi import description
from hafrm_ds.serving.options import ServingOptions
from hafrm_ds.serving.protocols import ROUTES, BadRequest, messages_in, without_end
from hafrm_ds.serving.rendered import Rendered
from hafrm_ds.serving.worker import Answer
from tests.serving.loopback import OF_LENGTHS, in_loop, lengths, running, worker_of

RENDERED = ServingOptions(model="m")
TEXT = ServingOptions(model="m", prompts="text")
HI = [user("hi")]


def read(path, body, options=RENDERED):
    return ROUTES[path](body, options)


def test_openrlhf_s_request_and_answer():
    body = {"query": ["Q: hi A: yes", "Q: hi A: no"], "prompts": ["Q: hi A:", "Q: hi A:"], "labels": ["", "72"]}
    asked = read("/get_reward", body)
    assert asked.items == [Rendered("Q: hi A: yes", "Q: hi A:"), Rendered("Q: hi A: no", "Q: hi A:")]
    response, faults = asked.response([Answer(1.5), Answer(-2.0)])
    assert response == {"rewards": [1.5, -2.0], "scores": [1.5, -2.0], "extra_logs": {}} and not faults


def test_an_empty_list_gets_an_empty_list():
    """The second of two URLs of OpenRLHF."""
    asked = read("/get_reward", {"query": [], "prompts": [], "labels": []})
    assert asked.items == []
    assert asked.response([]) == ({"rewards": [], "scores": [], "extra_logs": {}}, {})
    assert read("/score", []).response([]) == ({"rows": []}, {})
    assert read("/classify", {"input": []}).response([])[0]["data"] == []


def test_messages_in_a_label_stand_for_the_prompt():
    template = "<|start|>hi<|end|>"
    body = {"query": [f"{template}yes</s>"], "prompts": [template], "labels": ['[{"role": "user", "content": "hi"}]']}
    assert read("/get_reward", body).items == [[*HI, assistant("yes")]]
    assert read("/reward", {"prompt": template, "response": "yes<|im_end|>\n", "label": {"messages": HI}}).items == [
        [*HI, assistant("yes")]
    ]
    asked = read("/get_reward", body | {"query": ["something else"]})
    assert asked.faults == {"query[0]": "does not begin with its prompt, so what is the answer is not known"}


def test_prompts_that_are_the_words_of_a_user():
    body = {"query": ["hiyes</s>"], "prompts": ["hi"], "labels": [None]}
    assert read("/get_reward", body, TEXT).items == [[*HI, assistant("yes")]]
    assert read("/reward", {"prompt": "hi", "response": "yes"}, TEXT).items == [[*HI, assistant("yes")]]


def test_slime_gets_a_bare_number():
    asked = read("/reward", {"prompt": "hi", "response": "yes", "label": None})
    assert asked.items == [Rendered("hiyes", "hi")]
    assert asked.response([Answer(0.25)]) == (0.25, {})
    assert read("/reward", {"prompt": HI, "response": "yes"}).items == [[*HI, assistant("yes")]]


def test_vllm_s_json():
    asked = read("/classify", {"model": "rm", "messages": [*HI, assistant("yes")], "use_activation": False})
    assert asked.items == [[*HI, assistant("yes")]]
    response, _ = asked.response([Answer(-3.5, tokens=7)])
    assert response.pop("id").startswith("classify-") and response.pop("created") > 1e9
    assert response == {
        "object": "list",
        "model": "rm",
        "data": [{"index": 0, "label": "LABEL_0", "probs": [-3.5], "num_classes": 1}],
        "usage": {"prompt_tokens": 7, "total_tokens": 7, "completion_tokens": 0},
    }
    assert read("/classify", {"input": "text"}).items == [Rendered("text", "")]  # as verl sends it
    assert len(read("/classify", {"input": ["a", "b"], "use_activation": None}).items) == 2


def test_rows_come_back_with_scores():
    rows = [{"id": 7, "prompt": "hi", "response": "yes"}, {"prompt": "hi", "responses": ["a", "b"]}, {"prompt": "hi"}]
    asked = read("/score", {"rows": rows})
    assert asked.places == ["rows[0]", "rows[1]", "rows[1]"]
    written, faults = asked.response([Answer(1.0), Answer(2.0), Answer(3.0)])
    assert written["rows"][0] == rows[0] | {"score": 1.0}
    assert written["rows"][1] == rows[1] | {"scores": [2.0, 3.0]}
    assert written["rows"][2]["score"] is None and written["rows"][2]["score_error"] == faults["rows[2]"]
    assert list(faults) == ["rows[2]"]
    written, faults = asked.response([Answer(1.0), Answer(2.0), Answer(None, "the score is not finite")])
    assert written["rows"][1]["scores"] is None
    assert faults["rows[1]"] == "rows[1]: the score is not finite"


def test_attributes_stand_beside_the_score():
    answers = [Answer(1.0, attributes={"length": 3.0}), Answer(2.0, attributes={"length": 4.0})]
    body = {"query": ["a", "b"], "prompts": ["a", "b"], "labels": [0, 1]}
    assert read("/get_reward", body).response(answers)[0]["extra_logs"] == {"length": [3.0, 4.0]}
    row = {"prompt": "hi", "responses": ["a", "b"]}
    written, _ = read("/score", [row, {"prompt": "hi", "response": "c"}]).response([*answers, Answer(None, "no")])
    assert written["rows"][0] == row | {"scores": [1.0, 2.0], "attributes": [{"length": 3.0}, {"length": 4.0}]}
    assert written["rows"][1]["score"] is None


@pytest.mark.parametrize(
    "path, body",
    [
        ("/get_reward", {"prompts": []}),
        ("/get_reward", {"query": "text"}),
        ("/get_reward", {"query": ["a", "b"], "prompts": ["a"], "labels": [0, 1]}),
        ("/reward", {"prompt": "hi"}),
        ("/reward", [1]),
        ("/classify", {"input": "a", "messages": []}),
        ("/classify", {"input": "a", "use_activation": True}),
        ("/score", {"row": []}),
        ("/score", 3),
    ],
)
def test_what_a_route_does_not_take(path, body):
    with pytest.raises(BadRequest):
        read(path, body)


@pytest.mark.parametrize(
    "path, body, place",
    [
        ("/get_reward", {"query": ["a", 3], "prompts": ["a", "b"], "labels": [0, 1]}, "query[1]"),
        ("/reward", {"prompt": 3, "response": "a"}, "response"),
        ("/reward", {"prompt": "a", "response": None}, "response"),
        ("/classify", {"input": ["a", None]}, "input[1]"),
        ("/classify", {"messages": [{"role": "user"}]}, "messages"),
        ("/logprobs", [{"prompt": "a", "response": "b"}, {"prompt": "a"}], "rows[1]"),
    ],
)
def test_a_bad_row_is_named(path, body, place):
    asked = read(path, body)
    assert list(asked.faults) == [place]
    response, faults = asked.response([Answer(1.0)] * len(asked.items))
    assert response is None and list(faults) == [place]


def test_labels_that_hold_no_messages():
    for label in ("72", "[1, 2]", "[", "[" * 100_000, 72, None, {"answer": 3}, [], [{"text": "a"}], {"prompt": "hi"}):
        assert messages_in(label) is None


def test_the_end_of_an_answer():
    marks = RENDERED.end_marks
    assert without_end("yes<|im_end|>\n</s>", marks) == "yes"
    assert without_end("a </s> b\n", marks) == "a </s> b\n"
    assert without_end("", marks) == ""


# ---- what is written down --------------------------------------------------------------------------------------------


def fits(value, schema) -> bool:
    """Whether a value is what a JSON schema of ours says; what an object has beside its properties is free."""
    if "anyOf" in schema:
        return any(fits(value, each) for each in schema["anyOf"])
    kinds = {"object": dict, "array": list, "string": str, "number": (int, float), "integer": int, "boolean": bool}
    kind = schema.get("type")
    if kind is None or kind == "null":
        return kind is None or value is None
    if not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return False
    if kind == "array":
        return all(fits(each, schema["items"]) for each in value)
    known = schema.get("properties", {})
    return kind != "object" or (
        set(schema["required"]) <= value.keys() and all(fits(value[name], known[name]) for name in known.keys() & value)
    )


def test_the_description_has_all_routes():
    described = {path: set(methods) for path, methods in description()["paths"].items()}
    front = Front(RENDERED, OF_LENGTHS, Dispatcher(RENDERED, 1, print), None)
    served = {route.path: set(route.methods) - {"HEAD"} for route in front.application().routes}
    assert described == {path: {method.lower() for method in methods} for path, methods in served.items()}
    assert fits(OF_LENGTHS, schema_of("/model", "get")) and not fits({}, schema_of("/model", "get"))


def schema_of(path, method="post"):
    return description()["paths"][path][method]["responses"]["200"]["content"]["application/json"]["schema"]


TOKENS = {"token_ids": [1, 2], "tokens": ["a", "b"], "logprobs": [-1.0, -2.0], "logprob": -3.0}


@pytest.mark.parametrize(
    "path, body, answer, others",
    [
        ("/get_reward", {"query": ["ab"], "prompts": ["a"], "labels": [None]}, Answer(1.5), {"query": "ab"}),
        ("/reward", {"prompt": HI, "response": "yes"}, Answer(1.5), {"prompt": HI}),
        ("/classify", {"messages": HI, "use_activation": False}, Answer(1.5, tokens=2), {"input": 3}),
        ("/classify", {"model": "m", "input": "a"}, Answer(1.5, tokens=2), {"input": "a", "model": 3}),
        ("/score", {"rows": [{"prompt": HI, "response": "a"}]}, Answer(1.5), {"rows": {}}),
        ("/score", [{"messages": [*HI, assistant("a")]}], Answer(1.5), [{"messages": "hi"}]),
        ("/logprobs", [{"prompt": "a", "responses": ["b"]}], Answer(TOKENS), {"row": []}),
    ],
)
def test_the_description_is_of_what_comes_and_goes(path, body, answer, others):
    asked_for = description()["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert fits(body, asked_for) and not fits(others, asked_for)
    response, faults = read(path, body).response([answer])
    assert not faults and fits(response, schema_of(path)) and not fits("text", schema_of(path))


@in_loop
async def test_a_fault_is_as_described(monkeypatch):
    async with running(monkeypatch, worker_of(lengths)) as up:
        for path, body, status in (("/score", [{}], "422"), ("/score", 3, "400")):
            reply = await up.post(path, body)
            content = description()["paths"][path]["post"]["responses"][status]["content"]
            assert reply.status_code == int(status) and fits(reply.json(), content["application/json"]["schema"])
        assert (await up.client.get("/openapi.json")).json() == description()
