"""Conversations that call tools: every spelling of them read alike, rendered as a template renders them, or dropped."""

import json

import pytest

from hafrm_ds.data.formatting import ChatFormatter
from hafrm_ds.data.pairs import Row, assistant, user
from hafrm_ds.data.preparation import GROUP_FEATURES, PreparationOptions, PreparedGroups, prepare_groups
from hafrm_ds.data.reading import FEATURES, read_groups
from hafrm_ds.data.sources import Source
from hafrm_ds.data.tokenization import tokenize_conversation
from hafrm_ds.errors import DataError
from hafrm_ds.scoring.rows import conversations_of
from tests.data.row_files import write_lines, write_rows
from tests.data.test_pairs import convert, error_of, parts

DATE = "2024-07-26"
PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
SCHEMA = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The weather of a city, "now".',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
OTHER_SCHEMA = {"type": "function", "function": {"name": "get_time", "description": "The time."}}


def call(**arguments) -> dict:
    return {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def calling(*calls: dict, content: str = "") -> dict:
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def result(content: str, **fields: str) -> dict:
    return {"role": "tool", "content": content} | fields


ROW = {
    "prompt": [user("Weather?"), calling(call(city='Ulm "old"', days=3)), result('{"t": 21}'), user("And Bonn?")],
    "chosen": [calling(call(city="Bonn"))],
    "rejected": [calling(call(city="Rome"))],
    "tools": [SCHEMA],
}

# As Qwen 2.5 and Hermes write them.
HERMES = (
    "{%- if tools %}{{- '<|im_start|>system\\n<tools>' }}{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}"
    "{%- endfor %}{{- '\\n</tools><|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'tool' %}{{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}"
    "{{- '\\n</tool_response><|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    '{{- \'\\n<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
WITHOUT_SCHEMAS = HERMES.replace("if tools", "if false")
WITHOUT_CALLS = HERMES.replace("message.tool_calls or []", "[]")
WITHOUT_ARGUMENTS = HERMES.replace("call.function.arguments | tojson", "'{}'")
WITHOUT_RESULTS = HERMES.replace("'<tool_response>\\n' + message.content", "'<tool_response>'").replace(
    "'<|im_start|>user\\n<tool_response>\\n' + message.content", "'<|im_start|>user\\n'"
)
RAISES = HERMES.replace("{%- if tools %}", "{%- if tools %}{{- raise_exception('No tools!') }}")
NAMES_RESULTS = HERMES.replace("'\\n</tool_response>", "message.name + message.tool_call_id + '\\n</tool_response>")


@pytest.fixture
def formatter(make_tokenizer):
    return lambda template: ChatFormatter.create(make_tokenizer(template), None, DATE)


@pytest.fixture
def prepare(tmp_path):
    def prepared(formatter: ChatFormatter, rows: list[dict], **options) -> PreparedGroups:
        file = tmp_path / "pairs.jsonl"
        write_lines(file, rows)
        given = {"max_length": 5000, "truncation": "drop", "cache_dir": tmp_path / "cache"} | options
        sources = [Source(path=str(file))]
        return prepare_groups(sources, formatter=formatter, options=PreparationOptions(**given), role="train", seed=0)

    return prepared


# ---- what a row may look like --------------------------------------------------------------------------------------

CALL = calling(call(city="Ulm"))


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (CALL, CALL),
        (CALL | {"content": None}, CALL),
        ({"role": "assistant", "tool_calls": CALL["tool_calls"]}, CALL),
        (CALL | {"content": "One moment."}, calling(call(city="Ulm"), content="One moment.")),
        # As the API of OpenAI gives them: an id, and arguments in a text.
        (
            calling({"id": "c1", "function": {"name": "get_weather", "arguments": '{"city": "Ulm", "days": null}'}}),
            calling({"id": "c1"} | call(city="Ulm", days=None)),
        ),
        (
            {"role": "assistant", "content": None, "function_call": {"name": "get_weather", "arguments": "{}"}},
            calling(call()),
        ),
        (calling({"name": "get_weather", "arguments": {"city": "Ulm"}}), CALL),
        (CALL | {"tool_calls": json.dumps(CALL["tool_calls"])}, CALL),
        # As Llama writes them.
        (
            calling({"name": "get_weather", "parameters": {"city": "Ulm"}}),
            calling({"type": "function", "function": call(city="Ulm")["function"] | {"parameters": {"city": "Ulm"}}}),
        ),
        # From a table, in which every call has the arguments of all others.
        (calling(call(city="Ulm", days=None)), CALL),
        (calling({"function": {"name": "f", "arguments": "x = 1"}}), calling(
            {"type": "function", "function": {"name": "f", "arguments": "x = 1"}}
        )),
        # LLaMA-Factory and ms-swift.
        ({"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Ulm"}}'}, CALL),
        ({"role": "tool_call", "content": '{"name": "get_weather", "arguments": {"city": "Ulm"}}'}, CALL),
        ({"from": "observation", "value": "21"}, result("21")),
        ({"role": "tool_response", "content": "21"}, result("21")),
        ({"role": "function", "name": "get_weather", "content": "21"}, result("21", name="get_weather")),
        ({"role": "ipython", "content": {"t": 21, "u": None}}, result('{"t": 21}')),
        (result("21", name="get_weather", tool_call_id="c1"), result("21", name="get_weather", tool_call_id="c1")),
        ({"role": "tool", "content": [{"type": "text", "text": "21"}]}, result("21")),
        ({"role": "tool", "content": [21, 22]}, result("[21, 22]")),
        ({"role": "tool", "content": None}, result("")),
        (CALL | {"reasoning_content": "Ulm it is."}, CALL | {"content": "<think>\nUlm it is.\n</think>\n\n"}),
        # A name that is no tool's is no part of what templates write.
        (user("p") | {"name": "Ann"}, user("p")),
    ],
)  # fmt: skip
def test_every_spelling_of_a_message_is_read_alike(written, read):
    pair = convert(PAIR | {"prompt": [user("p"), written, user("q")], "chosen": [CALL]})
    assert pair.prompt == [user("p") | {"tools": []}, read, user("q")]
    assert pair.answers[0] == [CALL]


@pytest.mark.parametrize(
    "tools", [[SCHEMA], json.dumps([SCHEMA]), [json.dumps(SCHEMA)], SCHEMA, [SCHEMA["function"] | {"extra": None}]]
)
def test_every_spelling_of_the_column_tools(tools):
    read = SCHEMA["function"] if isinstance(tools, list) and "extra" in tools[0] else SCHEMA
    assert parts(convert(PAIR | {"tools": tools})) == (
        [user("p") | {"tools": [read]}],
        [assistant("a")],
        [assistant("b")],
    )
    system = {"role": "system", "content": "s"}
    pair = convert(PAIR | {"tools": tools, "system": "s", "history": [["x", "y"]]})
    assert pair.prompt == [system | {"tools": [read]}, user("x"), assistant("y"), user("p")]


def test_tools_may_stand_in_a_message():
    fields = PAIR | {"prompt": [{"role": "system", "content": "s", "tools": [SCHEMA]}, user("p")]}
    assert convert(fields).prompt == fields["prompt"]
    assert convert(fields | {"tools": [OTHER_SCHEMA]}).prompt[0]["tools"] == [OTHER_SCHEMA]


def test_a_column_of_tools_that_is_ignored():
    source = Source(path="x", ignore_columns=["tools"])
    assert convert(PAIR | {"tools": [SCHEMA]}, source).prompt == [user("p")]
    assert convert(ROW, source).prompt[0] == user("Weather?") | {"tools": []}


def test_a_column_that_repeats_a_conversation_with_calls_loses_nothing():
    assert convert(ROW | {"messages": [*ROW["prompt"], *ROW["chosen"]]}).answers[0] == ROW["chosen"]
    assert "context: filled, but not read" in error_of(ROW | {"context": "words of its own"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tools": "search, browse"}, "field 'tools' is the text 'search, browse', expected a list of JSON schemas"),
        ({"tools": ["search"]}, "field 'tools' is a list of 1, expected a list of JSON schemas"),
        ({"tools": [{"name": "f", "x": b"1"}]}, "field 'tools' is a list of 1, expected a list of JSON schemas"),
        ({"tools": '[{"name": "\\ud800"}]'}, "expected a list of JSON schemas"),
        ({"tools": [SCHEMA], "prompt": 3}, "field 'prompt' is the int 3"),
        ({"chosen": [calling({"id": 1})]}, "tool_calls of message 1 of field 'chosen' is a list of 1, expected calls"),
        ({"chosen": [calling({"function": {"name": None}})]}, "expected calls of functions, each with a name"),
        ({"chosen": [{"role": "tool_call", "content": "f(1)"}]}, "is the text 'f(1)', expected calls of functions"),
        ({"prompt": [CALL, {"content": "x"}]}, "message 2 of field 'prompt' is an object with the keys content"),
        ({"prompt": [CALL, {"role": ["tool"], "content": "x"}]}, "role of message 2 of field 'prompt' is a list of 1"),
        ({"prompt": [CALL, result("x", name=3)]}, "name of message 2 of field 'prompt' is the int 3, expected a text"),
        ({"prompt": [CALL, "x"]}, "message 2 of field 'prompt' is the text 'x', expected an object with role and"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_of_tools_is_named(fields, message):
    said = error_of(PAIR | fields)
    assert said.startswith("pairs.jsonl:7: ") and message in said and len(said) < 300


def test_a_deep_value_is_named():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert "expected a list of JSON schemas" in error_of(PAIR | {"tools": [{"name": deep}]})


# ---- what a template makes of it -----------------------------------------------------------------------------------


def test_a_template_that_renders_tools_gets_all_of_them(formatter, prepare):
    hermes = formatter(HERMES)
    prepared = prepare(hermes, [ROW, PAIR, ROW | {"tools": [SCHEMA, OTHER_SCHEMA]}])
    assert prepared.report.total.dropped == prepared.report.left_out == {}
    for answer, ids in (("chosen", prepared[0].responses[0]), ("rejected", prepared[0].responses[1])):
        whole = hermes.tokenizer.apply_chat_template(ROW["prompt"] + ROW[answer], tools=[SCHEMA])["input_ids"]
        assert [*prepared[0].prompt_ids, *ids] == whole
    text = prepared.report.examples[0].prompt
    assert '"name": "get_weather", "arguments": {"city": "Ulm \\"old\\"", "days": 3}}' in text
    assert text.startswith("<|im_start|>system\n<tools>\n") and '<tool_response>\n{"t": 21}\n' in text
    # The rows differ in their tools alone.
    assert len({key.tobytes() for key in prepared.keys.reshape(-1)}) == 6
    assert len({key.tobytes() for key in prepared.prompt_keys}) == 3
    assert prepared[1].prompt_ids.tolist() == hermes.encode_prompt([user("p")])


def test_rows_without_tools_are_kept_as_before_beside_rows_with(formatter, tmp_path):
    write_lines(tmp_path / "pairs.jsonl", [PAIR, ROW])
    rows = read_groups([Source(path=str(tmp_path / "pairs.jsonl"))], role="train", seed=0, cache_dir=tmp_path)
    assert rows.features == FEATURES and set(FEATURES["prompt"].feature) == {"role", "content"}
    assert rows[0]["prompt"] == [user("p")] and rows[0]["answers"][0] == [assistant("a")]
    assert "tools" not in GROUP_FEATURES
    assert json.loads(rows[1]["answers"][0][0]["content"]) == ROW["chosen"]


@pytest.mark.parametrize(
    ("template", "row", "lost"),
    [
        (None, ROW, "tools, tool messages, tool calls"),
        (WITHOUT_SCHEMAS, PAIR | {"tools": [SCHEMA]}, "tools"),
        (WITHOUT_CALLS, ROW, "tool calls"),
        (WITHOUT_ARGUMENTS, ROW, "tool calls"),
        (WITHOUT_RESULTS, ROW, "tool messages"),
    ],
)
def test_a_template_that_leaves_out_a_part_drops_the_pair_by_its_name(
    formatter, prepare, make_tokenizer, template, row, lost
):
    knows_none = ChatFormatter.create(make_tokenizer(), "mistral-instruct", DATE)
    chosen = knows_none if template is None else formatter(template)
    report = prepare(chosen, [PAIR, row, PAIR | {"prompt": "q"}], max_dropped_share=0.5).report
    [(reason, number)] = report.total.dropped.items()
    name = "the chat template mistral-instruct" if template is None else "the tokenizer's own chat template"
    kinds, _, said = reason.removeprefix("has ").partition(", which ")
    assert (sorted(kinds.split(", ")), said, number) == (sorted(lost.split(", ")), f"{name} does not write", 1)
    with pytest.raises(
        DataError, match=r"2 of 2 selected pairs .*would be(.|\n)*Give a template that takes these rows"
    ):
        prepare(chosen, [row, row])
    with pytest.raises(DataError, match=r"leaves out .*: the model would not see the whole conversation"):
        tokenize_conversation(chosen, conversations_of(Row(row | {"response": row["chosen"]}, "in:1", ""))[1][0])


def test_a_call_that_stands_in_the_schemas_alone_is_not_written(formatter, prepare):
    """The name of the function stands there, and the city in the question."""
    row = ROW | {"prompt": [user("Weather in Bonn?")], "rejected": "No idea."}
    report = prepare(formatter(WITHOUT_CALLS), [row, PAIR], max_dropped_share=0.5).report
    assert report.total.dropped == {"has tool calls, which the tokenizer's own chat template does not write": 1}


def test_a_template_that_raises_is_told_in_its_own_words(formatter, prepare):
    report = prepare(formatter(RAISES), [PAIR, ROW], max_dropped_share=0.5).report
    assert report.total.dropped == {"the template refuses the conversation: No tools!": 1}


def test_names_and_ids_of_results_reach_the_template(formatter):
    row = ROW | {"prompt": [user("p"), CALL, result("21", name="get_weather", tool_call_id="c1"), user("q")]}
    [conversation] = conversations_of(Row(row | {"response": ROW["chosen"]}, "in:1", ""))[1]
    assert "21get_weatherc1\n</tool_response>" in formatter(NAMES_RESULTS).render(conversation)


def test_an_answer_may_be_a_call_and_go_on(formatter, prepare):
    chosen = [CALL, result("21"), assistant("It is 21.")]
    prepared = prepare(formatter(HERMES), [PAIR | {"chosen": chosen, "rejected": [assistant("b")]}])
    assert "<tool_response>\n21\n</tool_response>" in prepared.report.examples[0].chosen
    assert convert(PAIR | {"chosen": [CALL, result("21")]}).reason == "does not end with an answer"


def test_a_table_with_tools_reads_as_lines_do(formatter, tmp_path, monkeypatch):
    """Arrow gives every call the arguments, and every message the keys, of all others."""
    monkeypatch.chdir(tmp_path)
    plain = {name: [user("p")] if name == "prompt" else [assistant(name)] for name in ("prompt", "chosen", "rejected")}
    rows = [ROW, plain | {"tools": None}]
    write_rows("pairs.parquet", rows)
    write_lines("pairs.jsonl", rows)
    options = PreparationOptions(5000, "drop", cache_dir=tmp_path / "cache")
    sets = [
        prepare_groups([Source(path=name)], formatter=formatter(HERMES), options=options, role="train", seed=0)
        for name in ("pairs.parquet", "pairs.jsonl")
    ]
    assert sets[0].keys.tobytes() == sets[1].keys.tobytes() and len(sets[0]) == 2


# ---- rows to score -------------------------------------------------------------------------------------------------


def test_a_row_to_score_is_what_a_pair_is_trained_on(formatter, prepare):
    hermes = formatter(HERMES)
    pair = prepare(hermes, [ROW])[0]
    for fields in (
        {"messages": ROW["prompt"] + ROW["chosen"], "tools": [SCHEMA]},
        {"prompt": ROW["prompt"], "response": ROW["chosen"], "tools": json.dumps([SCHEMA])},
        {"prompt": ROW["prompt"], "responses": [ROW["chosen"], ROW["rejected"], "x"], "tools": [SCHEMA]},
    ):
        ids = tokenize_conversation(hermes, conversations_of(Row(fields, "in.jsonl:1", ""))[1][0])
        assert [*ids.prompt, *ids.responses[0]] == [*pair.prompt_ids, *pair.responses[0]]
