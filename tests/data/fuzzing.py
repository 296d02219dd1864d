"""Random rows and files in every format: whatever they hold, reading gives groups of their own words or says one line.

    python -m tests.data.fuzzing SECONDS [SEED]

prints the number of inputs, of what came of them, and every fault with the seed and number that make it again.
"""

import contextlib
import copy
import csv
import gzip
import io
import json
import math
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

from hafrm_ds.data.files import find_tables
from hafrm_ds.data.formats import detect_format, read_groups_of, texts_in
from hafrm_ds.data.pairs import Deselected, Dropped, PreferenceGroup, Row, parsed_messages
from hafrm_ds.data.reading import as_features, joined_rows, read_rows, remarks_on
from hafrm_ds.data.sources import Source
from hafrm_ds.errors import DataError
from hafrm_ds.scoring.rows import conversations_of
from tests.data.format_rows import EXAMPLES

NAMES = [
    *("prompt", "chosen", "rejected", "instruction", "input", "question", "query", "system", "history", "context"),
    *("messages", "conversations", "trajectory", "turn", "tools", "reasoning", "images", "margin", "score_chosen"),
    *("score_rejected", "source", "response", "responses", "votes", "systemPrompt", "\ud800", "a\nb", "", "x" * 300),
    *("probability", "scores", "ranks", "comparisons"),
]
WORDS = [
    *("tea", "Human:", "\n\nHuman:", "\n\nAssistant:", "Assistant:", "### Human:", "\r\n\r\nHuman:", "</s>"),
    *("<|im_start|>user\n", "\n<extra_id_1>User\n", "<think>", "[/INST]", "[bold]", "é", "日本", "😀", "\u202e"),
    *('[{"role": "user", "content": "', "[{'role': 'user', 'content': 'x'}]", '{"from": "gpt"}', "\t", "\r", '"'),
    *("\0", "\u2028", ". ", "{{"),
]
OF_THE_CONVERSATION = NAMES[:1] + NAMES[3:13]
CALL = {"id": "c1", "function": {"name": "f", "arguments": '{"x": 1}'}}
WITH_TOOLS = {
    "prompt": [{"role": "user", "content": "p"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
    "chosen": [{"role": "tool", "name": "f", "content": "3"}, {"role": "assistant", "content": "a"}],
    "rejected": [{"role": "function_call", "content": '{"name": "f", "arguments": {"y": [1.5, null]}}'}],
    "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}],
}
RESPONSES = ["a b", "c", "a b", [{"role": "assistant", "content": "d"}], "e"]
WITH_GROUPS = [
    {"prompt": "p", "responses": RESPONSES, "scores": [1, 2.5, 1, None, math.nan]},
    {"prompt": "p", "responses": RESPONSES, "ranks": [1, 2, 3, 3.0, None]},
    {"prompt": "p", "responses": RESPONSES, "comparisons": [[0, 1], [2, 3], [3, 0], [0, 2]]},
    {
        "prompt": "p",
        "responses": RESPONSES,
        "comparisons": [
            {"better": 1, "worse": 0, "probability": 0.25, "margin": 2, "weight": None},
            {"better": 4, "worse": 3, "probability": 0.5, "margin": None, "weight": 3},
        ],
    },
    {"prompt": "p", "chosen": "a", "rejected": "b", "probability": 0.25, "margin": 3},
]
MARKS = ("Human:", "Assistant:", "extra_id", "###", "[", "{")
"""What is read as something else than the words of a text."""
WORDS_OF_OURS = {"SUBREDDIT:", "TITLE:", "POST:", "TL;DR:", "<think>", "</think>"}


def any_text(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.15:
        return ""
    if kind < 0.2:
        return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(12)))
    if kind < 0.21:
        return "tea " * rng.randrange(20000)
    return "".join(rng.choice(WORDS) + rng.choice(["", " "]) for _ in range(rng.randrange(8)))


def any_value(rng: random.Random, depth: int = 0) -> Any:
    kinds = [
        lambda: None,
        lambda: any_text(rng),
        lambda: rng.choice([0, 1, 2, -1, 3, 10**400, -(10**5000), 2**63, 0.5, 1.5, 1e308, -1e308, 5e-324]),
        lambda: rng.choice([math.nan, math.inf, -math.inf, True, False, Decimal("1.5"), Decimal("NaN"), b"\xff", "1"]),
        lambda: rng.choice([[], {}, [[]], [None], [{}], "[]", "null", "{}", [[["x"]]], {"": ""}]),
        lambda: {
            "role": rng.choice(["user", "assistant", "human", "tool", "USER", 3]),
            "content": any_text(rng),
        },
        lambda: {"from": rng.choice(["gpt", "human", "x"]), "value": any_text(rng), "reasoning_content": any_text(rng)},
        lambda: [any_value(rng, depth + 1) for _ in range(rng.randrange(4))],
        lambda: {rng.choice(NAMES): any_value(rng, depth + 1) for _ in range(rng.randrange(4))},
        lambda: json.dumps([{"role": "user", "content": any_text(rng)}, {"role": "assistant", "content": "x"}]),
        lambda: str([{"role": "user", "content": any_text(rng)}]),
        lambda: [{"type": rng.choice(["text", "image", None]), "text": any_text(rng)}],
    ]
    return rng.choice(kinds[:6] if depth > 3 else kinds)()


def changed(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """A value with something in it replaced, taken out, put in, or written as JSON."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        value = dict(value)
        name = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.1:
            del value[name]
        elif kind < 0.2:
            value[rng.choice(NAMES)] = any_value(rng)
        else:
            value[name] = changed(value[name], rng, depth + 1)
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        value = list(value)
        place = rng.randrange(len(value))
        if rng.random() < 0.2:
            value.insert(place, copy.deepcopy(rng.choice(value)))
        else:
            value[place] = changed(value[place], rng, depth + 1)
        return value
    if isinstance(value, str) and rng.random() < 0.6:
        return any_text(rng)
    if isinstance(value, list | dict) and rng.random() < 0.3:
        try:
            return rng.choice([str, json.dumps])(value)
        except (TypeError, ValueError):
            return None
    return any_value(rng)


def any_row(rng: random.Random) -> dict[str, Any]:
    row = copy.deepcopy(rng.choice([*EXAMPLES.values(), WITH_TOOLS, WITH_TOOLS, *WITH_GROUPS * 3]))
    for _ in range(rng.choice([0, 1, 1, 2, 3, 6])):
        row = changed(row, rng, 0) if row else row
        if not isinstance(row, dict):
            row = {"chosen": row}
    if rng.random() < 0.2:
        row[rng.choice(NAMES)] = any_value(rng)
    return row


def any_source(rng: random.Random) -> Source:
    options: dict[str, Any] = {}
    if rng.random() < 0.2:
        options["single_turn"] = True
    if rng.random() < 0.4:
        options["ranking"] = rng.choice(["best", "adjacent"])
    if rng.random() < 0.2:
        options["min_score_gap"] = rng.choice([0.5, 2, 1e-300])
    if rng.random() < 0.2:
        options["max_answers"] = rng.choice([2, 3])
    if rng.random() < 0.1:
        options["roles"] = {"x": "user"}
    if rng.random() < 0.1:
        options["ignore_columns"] = [rng.choice(NAMES)]
    return Source(path="pairs.jsonl", name="pairs", **options)


# ---- what must hold ------------------------------------------------------------------------------------------------


def words_of(value: Any) -> str:
    """All texts of a value, those that are spelled in texts too, without white space."""
    found = []
    todo = [value]
    while todo:
        item = todo.pop()
        for text in texts_in(item):
            found.append(text)
            parsed = parsed_messages(text)
            if not isinstance(parsed, str):
                todo.append(parsed)
            elif text[:1] == "[":
                with contextlib.suppress(ValueError, RecursionError):
                    todo.append(json.loads(text))
    return "".join("\n".join(found).split())


def check_message(error: DataError, place: str) -> None:
    message = str(error)
    assert message.startswith(place), f"does not name its place: {message[:200]!r}"
    assert len(message) < 400, f"{len(message)} characters: {message[:300]!r}"
    message.encode()


def check_row(fields: dict[str, Any], source: Source) -> str:
    """Read one row; returns what came of it. Raises whatever is not the house's own error."""
    row = Row(fields, "pairs.jsonl:7", "pairs", Row({}, "", "").roles | source.roles)
    try:
        name = detect_format(row)
        outcomes = read_groups_of(row, name, source)
    except DataError as error:
        check_message(error, "pairs.jsonl:7: ")
        return "refused"
    whole = None
    for outcome in outcomes:
        features = as_features(row, name, outcome, source, remarks_on(row, name))
        json.dumps(features).encode()
        for text in (features["source"], features["remarks"], features["dropped"], features["deselected"]):
            text.encode()
        if not isinstance(outcome, PreferenceGroup):
            assert isinstance(outcome, Deselected | Dropped)
            continue
        check_comparisons(features, source)
        whole = words_of(fields) if whole is None else whole
        for message in said_in(outcome):
            message["content"].encode()
            if message["role"] == "tool":  # its content may be any JSON
                continue
            for word in message["content"].split():
                assert word in WORDS_OF_OURS or word.removeprefix("r/") in whole, f"{word!r} is not in the row"
        assert outcome.prompt and all(answer[-1]["role"] == "assistant" for answer in outcome.answers)
    groups = [outcome for outcome in outcomes if isinstance(outcome, PreferenceGroup)]
    said = "".join(words_of([said_in(outcome) for outcome in groups]))
    for column in OF_THE_CONVERSATION if groups else ():
        text = fields.get(column)
        if column not in source.ignore_columns and isinstance(text, str) and not any(mark in text for mark in MARKS):
            assert all(word in said for word in text.split()), f"{column} is lost"
    if any(len(outcome.answers) > 2 for outcome in groups):
        return "groups"
    return "pairs" if groups else "left out"


def said_in(group: PreferenceGroup) -> list[dict[str, Any]]:
    return [message for part in (group.prompt, *group.answers) for message in part]


def check_comparisons(row: dict[str, Any], source: Source) -> None:
    """Of a group in FEATURES: every answer is compared, and every comparison is one."""
    compared = {each[side] for each in row["comparisons"] for side in ("better", "worse")}
    assert compared == set(range(len(row["answers"]))), f"{compared} of {len(row['answers'])} answers are compared"
    assert source.max_answers is None or len(compared) <= source.max_answers
    for each in row["comparisons"]:
        assert each["better"] != each["worse"] and 0.5 < each["target"] <= 1 and 0 < each["weight"] < math.inf
        assert each["margin"] is None or math.isfinite(each["margin"])


def check_score_row(fields: dict[str, Any]) -> str:
    try:
        conversations_of(Row(fields, "in.jsonl:7", ""))
    except DataError as error:
        check_message(error, "in.jsonl:7: ")
        return "score row refused"
    return "score row"


def check_file(rng: random.Random, folder: Path) -> str:
    """Rows as a file, damaged or not, through the readers of files."""
    rows = [any_row(rng) if rng.random() < 0.3 else EXAMPLES["explicit_prompt"] for _ in range(rng.randrange(1, 5))]
    rows = [json.loads(json.dumps(row, default=str, skipkeys=True)) for row in without_huge(rows)]
    suffix = rng.choice([".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".JSONL", ".csv.gz", ".parquet"])
    if ".csv" in suffix or suffix == ".tsv":
        text = io.StringIO()
        delimiter = "\t" if suffix == ".tsv" else ","
        writer = csv.DictWriter(text, sorted(rows[0]), extrasaction="ignore", delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode(errors="surrogatepass")
    elif suffix == ".json" and rng.random() < 0.7:
        whole = rng.choice([rows, {"data": rows}, {name: [row.get(name) for row in rows] for name in rows[0]}])
        content = json.dumps(whole, indent=rng.choice([None, 1])).encode()
    else:
        content = "\n".join(json.dumps(row) for row in rows).encode()
    damage = rng.random()
    if damage < 0.3 and content:
        place = rng.randrange(len(content))
        other_byte = content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
        content = rng.choice([content[:place], other_byte, b"\xef\xbb\xbf" + content])
    if suffix.endswith(".gz"):
        content = gzip.compress(content)
        content = content[: rng.randrange(len(content))] if rng.random() < 0.2 else content
    path = folder / f"pairs{suffix}"
    path.write_bytes(content)
    source = Source(path=str(path), name="pairs", group_by_prompt=rng.random() < 0.3)
    try:
        for row in (joined_rows if source.group_by_prompt else read_rows)(find_tables(source, None), source):
            json.dumps(row).encode()
            check_comparisons(row, source)
    except DataError as error:
        check_message(error, str(path))
        return "file refused"
    return "file read"


def without_huge(value: Any) -> Any:
    """The value without whole numbers that Python writes into no JSON."""
    if isinstance(value, dict):
        return {str(name): without_huge(item) for name, item in value.items()}
    if isinstance(value, list):
        return [without_huge(item) for item in value]
    return 7 if isinstance(value, int) and abs(value) > 10**4000 else value


def fuzz_once(rng: random.Random, folder: Path) -> str:
    if rng.random() < 0.1:
        return check_file(rng, folder)
    fields = any_row(rng)
    if rng.random() < 0.1:
        return check_score_row(fields)
    return check_row(fields, any_source(rng))


def main() -> None:
    seconds, seed = float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    end, outcomes, faults, number = time.monotonic() + seconds, Counter[str](), Counter[str](), 0
    with tempfile.TemporaryDirectory() as folder:
        while time.monotonic() < end:
            try:
                outcomes[fuzz_once(random.Random(f"{seed} {number}"), Path(folder))] += 1
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                kind = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
                faults[kind] += 1
                if faults[kind] <= 3:
                    print(f"FAULT {seed} {number}: {kind}: {str(error)[:300]!r}", flush=True)
            number += 1
    print(f"{number:,} inputs: {dict(outcomes)}; faults: {dict(faults)}")


if __name__ == "__main__":
    main()
