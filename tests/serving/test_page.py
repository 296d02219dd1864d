"""The page of a server; where a Chromium is installed, in it: on a desktop and a phone, light and dark."""

import asyncio
import base64
import hashlib
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from hafrm_ds.processes.ranks import Processes
from hafrm_ds.scoring.files import ScoringOptions, score_file
from hafrm_ds.serving.page import page_text, policy_of
from tests.evaluation.report.chromium import DESKTOP, PHONE, PROGRAM, Chromium
from tests.evaluation.report.test_chromium import OVERFLOWING
from tests.saved.test_opening import start_weights
from tests.serving.loopback import in_loop, lengths, running, worker_of
from tests.test_objective import FIT
from tests.tiny_models import save_tiny_final

PROMPT = [{"role": "user", "content": "Wie groß?"}]
ANSWERS = ["größer als 😀, a lot\n\nof it", "no"]
ROWS = [{"prompt": PROMPT, "response": answer} for answer in ANSWERS]

# ---- its text and headers --------------------------------------------------------------------------------------------


@in_loop
async def test_there_is_a_page_only_where_it_is_asked_for(monkeypatch):
    async with running(monkeypatch, worker_of(lengths)) as up:
        assert (await up.client.get("/")).status_code == 404
    async with running(monkeypatch, worker_of(lengths), page=True, key="geheim") as up:
        reply = await up.client.get("/")
        assert reply.status_code == 200 and reply.headers["content-type"] == "text/html; charset=utf-8"
        assert reply.text == page_text()
        assert reply.headers["Content-Security-Policy"] == policy_of(page_text())
        assert reply.headers["Referrer-Policy"] == "no-referrer"
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert (await up.client.post("/")).status_code == 405
        assert (await up.client.get("/model")).status_code == 401  # the page itself asks for the key


def test_it_needs_nothing_from_outside():
    text = page_text()
    assert not re.search(r"https?:|//\w+\.|@import|url\(|\bsrc=|integrity", text)
    assert re.findall(r"href=\S+", text) == ['href="data:,">']
    assert "--series-1" in text and "/* hafrm_ds/style.css */" not in text


def test_it_may_run_itself_alone():
    text = page_text()
    policy = dict(each.split(" ", 1) for each in policy_of(text).split("; "))
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'self'"
    assert all(policy[name] == "'none'" for name in ("base-uri", "form-action", "frame-ancestors"))
    for tag, number in (("script", 1), ("style", 2)):
        contents = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", text, re.DOTALL)
        assert len(contents) == number
        hashes = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in contents]
        assert policy[f"{tag}-src"] == " ".join(f"'sha256-{each}'" for each in hashes)
    assert not re.search(r"\sstyle=|<[^>]*\son\w+=", text)  # which these hashes would not allow


# ---- in a browser ----------------------------------------------------------------------------------------------------

in_chromium = pytest.mark.skipif(PROGRAM is None, reason="no chromium is installed")
VALUES = """
Object.fromEntries([...document.querySelectorAll('#scores tr[data-judge]')].map(row =>
    [row.dataset.judge, [...row.querySelectorAll('data')].map(each => parseFloat(each.value))]))
"""
FAULTS = "[...document.querySelectorAll('#faults:not([hidden]) li')].map(each => each.textContent)"
TOKEN_TEXTS = "[...document.querySelectorAll('.tokens')].map(each => each.textContent)"
CREDITS = "[...document.querySelectorAll('.tokens')].map(each => [...each.children].map(one => one.worth.credit))"
COLOURS = """
[...document.querySelectorAll('.tokens .token')]
    .map(each => [each.worth.credit, parseFloat(each.style.getPropertyValue('--share')), each.className])
"""
STOPS = "[...document.querySelectorAll('.tokens')].map(each => each.querySelectorAll('[tabindex=\"0\"]').length)"
TABLE = "[...document.querySelectorAll('.answer:first-child tbody tr')].map(each => each.innerText.split(/\\s+/))"
IS_DONE = "!byId('ask').disabled && !(byId('results').hidden && byId('faults').hidden)"
LOWEST_CONTRAST = """
(() => {
    const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const light = colour => {
        canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = each => {
        for (; each; each = each.parentElement) {
            const colour = getComputedStyle(each).backgroundColor;
            if (!/, 0\\)$|transparent/.test(colour)) return colour;
        }
    };
    const texts = [...document.querySelectorAll('main *')].filter(each => each.checkVisibility() && !each.disabled
        && [...each.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
    return texts.map(each => {
        const [a, b] = [light(getComputedStyle(each).color), light(behind(each))].sort((a, b) => b - a);
        return [(a + 0.05) / (b + 0.05), each.textContent.slice(0, 40)];
    }).sort((a, b) => a[0] - b[0])[0];
})()
"""
TIPS_OUTSIDE = """
[...document.querySelectorAll('.tokens .token')].filter(each => {
    each.scrollIntoView({block: 'center'});
    point(each);
    const box = byId('tip').getBoundingClientRect();
    return box.left < 0 || box.right > innerWidth || box.top < 0 || box.bottom > innerHeight;
}).length
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def final(tmp_path_factory):
    """A model with both heads, which knows its reference and has a combined judge."""
    folder = tmp_path_factory.mktemp("models")
    final = save_tiny_final(folder / "final", base=start_weights(folder / "policy"), objective={"beta": 0.3})
    file = final / "hafrm.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"judge": FIT.to_json()}))
    return final


async def beside(steps, *arguments):
    """What a test does in the browser, in a thread beside the server of the loop."""
    with ThreadPoolExecutor(1) as own:
        return await asyncio.get_running_loop().run_in_executor(own, steps, *arguments)


def until(browser, expression):
    for _ in range(400):
        if found := browser.evaluate(expression):
            return found
        time.sleep(0.05)
    raise AssertionError(f"{expression}: {browser.evaluate('document.body.innerText')}")


def opened(browser, up, width=DESKTOP, scheme="light"):
    browser.open(f"http://127.0.0.1:{up.port}/", width, scheme)
    until(browser, "judges !== null || !byId('faults').hidden")


def score(browser, answers=ANSWERS, prompt=PROMPT):
    browser.evaluate(f"fill({json.dumps({'prompt': prompt, 'responses': answers})})")
    browser.evaluate("byId('ask').click()")
    until(browser, IS_DONE)


def settled(browser):
    """Wait until the page does not move any more."""
    last = None
    while (now := browser.evaluate("scrollY")) != last:
        last = now
        time.sleep(0.2)


def requested(browser):
    events = [event["params"] for event in browser.events if event.get("method") == "Network.requestWillBeSent"]
    return [event["request"]["url"] for event in events]


def complaints(browser):
    noted = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    return [event for event in browser.events if event.get("method") in noted]


def pressed(browser, key, code=0, text="", modifiers=0):
    about = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
    browser.send("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
    browser.send("Input.dispatchKeyEvent", type="keyUp", **about)


def written_by_score_py(final, folder, judge):
    """The scores of ROWS as launch/score.py writes them."""
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = ScoringOptions(model=final, judge=judge, input=folder / "in.jsonl", output=folder / f"{judge}.jsonl")
    score_file(options, Processes(rank=0, local_rank=0, world_size=1, store=dist.HashStore()))
    return [json.loads(line)["score"] for line in options.output.read_text().splitlines()]


@in_chromium
@in_loop
async def test_judges_and_tokens_are_those_of_score_py(monkeypatch, browser, final, tmp_path):
    def steps(up):
        opened(browser, up)
        score(browser)
        assert browser.evaluate(FAULTS) == [] and complaints(browser) == []
        values, credits = browser.evaluate(VALUES), browser.evaluate(CREDITS)
        assert values.keys() == {"reward", "implicit", "combined"}
        for judge, (a, b, difference) in values.items():
            expected = written_by_score_py(final, tmp_path, judge)
            assert [a, b] == pytest.approx(expected, abs=1e-4)
            assert difference == pytest.approx(expected[0] - expected[1], abs=1e-4)
        assert [sum(each) for each in credits] == pytest.approx(values["implicit"][:2], abs=1e-4)
        assert browser.evaluate(TOKEN_TEXTS) == [f"{answer}</s>" for answer in ANSWERS]
        assert len(credits[0]) == len(ANSWERS[0]) + 1  # a token a byte, shown a character at a time
        where = {url.removeprefix(f"http://127.0.0.1:{up.port}") for url in requested(browser)}
        assert where <= {"/", "/model", "/health", "/score", "/logprobs", "data:,"}
        for credit, share, classes in browser.evaluate(COLOURS):
            assert 0 <= share <= 1 and ("less" in classes) == (credit < 0)

    async with running(monkeypatch, model=final, credit=True, page=True) as up:
        await beside(steps, up)


@in_chromium
@pytest.mark.parametrize("width", [DESKTOP, PHONE])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@in_loop
async def test_nothing_overflows_and_all_can_be_read(monkeypatch, browser, final, width, scheme):
    def steps(up):
        opened(browser, up, width, scheme)
        for answers in (ANSWERS, ["word " * 100 + "w" * 150, "x\n" * 30], ["a" * 3000, "b"]):
            score(browser, answers, [*PROMPT, {"role": "assistant", "content": "w" * 90}, PROMPT[0]])
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.evaluate(OVERFLOWING) == 0
            assert browser.evaluate(TIPS_OUTSIDE) == 0
            contrast, text = browser.evaluate(LOWEST_CONTRAST)
            assert contrast > 4.5, text  # WCAG 2.2
        browser.evaluate("point(null)")
        assert browser.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") == (scheme == "dark")
        columns = "getComputedStyle(byId('answers')).gridTemplateColumns.split(' ').length"
        assert browser.evaluate(columns) == (1 if width == PHONE else 2)

    async with running(monkeypatch, model=final, credit=True, page=True) as up:
        await beside(steps, up)


@in_chromium
@in_loop
async def test_keys_and_pointer_are_enough(monkeypatch, browser, final):
    tip, focused = "byId('tip').hidden ? null : byId('tip').textContent", "document.activeElement.textContent"

    def steps(up):
        opened(browser, up)
        browser.evaluate("byId('clear').click()")
        for place in ("document.querySelector('#turns textarea')", "byId('a')", "byId('b')"):
            browser.evaluate(f"{place}.focus()")
            browser.send("Input.insertText", text="hi")
        pressed(browser, "Enter", 13, modifiers=2)
        until(browser, IS_DONE)
        assert browser.evaluate("byId('results').hidden") is False
        a, b, _ = browser.evaluate(VALUES)["reward"]
        assert a == pytest.approx(b, abs=1e-5)

        first = "document.querySelector('.tokens .token')"
        settled(browser)
        browser.evaluate(f"{first}.scrollIntoView({{block: 'center'}})")
        box = browser.evaluate(f"{first}.getBoundingClientRect().toJSON()")
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        credits = browser.evaluate(CREDITS)[0]
        browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        assert f"{abs(credits[0]):.3f}" in until(browser, tip) and "“h”" in browser.evaluate(tip)
        browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
        assert browser.evaluate(tip) is None
        for kind in ("mousePressed", "mouseReleased"):  # a click, as a tap is
            browser.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
        assert "“h”" in browser.evaluate(tip) and browser.evaluate(focused) == "h"
        moves = {"ArrowRight": "i", "End": "</s>", "ArrowDown": "</s>", "Home": "h", "ArrowLeft": "h"}
        for key, letter in moves.items():
            pressed(browser, key)
            assert browser.evaluate(focused) == letter and f"“{letter}”" in browser.evaluate(tip)
        assert browser.evaluate(STOPS) == [1, 1]
        pressed(browser, "Escape")
        assert browser.evaluate(tip) is None

        browser.evaluate("document.querySelector('.answer details').open = true")
        rows = until(browser, f"{TABLE}.length && {TABLE}")
        assert [row[0] for row in rows] == ["“h”", "“i”", "“</s>”"]
        assert [float(row[1].replace("\u2212", "-")) for row in rows] == pytest.approx(credits, abs=1e-3)
        assert browser.evaluate("document.querySelector('.tokens .token').ariaLabel").startswith("“h”, ")

    async with running(monkeypatch, model=final, credit=True, page=True) as up:
        await beside(steps, up)


@in_chromium
@in_loop
async def test_rows_are_taken_as_files_have_them(monkeypatch, browser):
    said = "[turns().map(turn => `${turn.role}: ${turn.content}`), byId('a').value, byId('b').value]"
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    answers = [[*talk, {"role": "assistant", "content": each}] for each in "ab"]
    both = [["system: s", "user: u"], "a", "b"]
    rows = [
        ({"prompt": "u", "chosen": "a", "rejected": "b"}, [["user: u"], "a", "b"]),
        ({"prompt": "u", "system": "s", "responses": ["a", "b", "c"]}, both),
        ({"chosen": answers[0], "rejected": answers[1]}, both),
        ({"prompt": talk, "chosen": answers[0][2:], "rejected": answers[1][2:]}, both),
        (answers[0], [["system: s", "user: u"], "a", ""]),
        ({"messages": talk, "response": "a"}, [["system: s", "user: u"], "a", ""]),
        ({"id": 3}, [["user: "], "", ""]),
        ("just words", [["user: "], "", ""]),
    ]

    def steps(up):
        opened(browser, up)
        for row, expected in rows:
            text = row if isinstance(row, str) else json.dumps(row)
            browser.evaluate("byId('clear').click()")
            browser.evaluate(
                f"""(() => {{
                    const clipboardData = new DataTransfer();
                    clipboardData.setData('text', {json.dumps(text)});
                    const pasted = new ClipboardEvent('paste', {{clipboardData, bubbles: true, cancelable: true}});
                    document.querySelector('#turns textarea').dispatchEvent(pasted);
                }})()"""
            )
            assert browser.evaluate(said) == expected
        browser.evaluate("byId('add').click(); byId('a').value = 'x'; byId('swap').click()")
        assert browser.evaluate(said) == [["user: ", "assistant: "], "", "x"]
        browser.evaluate("document.querySelector('#turns button').click()")
        assert browser.evaluate(said)[0] == ["assistant: "]

    async with running(monkeypatch, worker_of(lengths), page=True) as up:
        await beside(steps, up)


@in_chromium
@in_loop
async def test_what_is_missing_is_said_with_what_to_do(monkeypatch, browser, final):
    missing = "document.querySelector('#scores tr[data-judge=implicit] .none').textContent"

    def steps(up):
        opened(browser, up)
        score(browser)
        assert "start the server with --credit" in browser.evaluate(missing)
        assert len(browser.evaluate(VALUES)["reward"]) == 3
        assert browser.evaluate("byId('credit').hidden") and "log π" in browser.evaluate("byId('scores').textContent")

    async with running(monkeypatch, model=final, page=True) as up:
        await beside(steps, up)


@in_chromium
@in_loop
async def test_attributes_stand_below_the_judges(monkeypatch, browser, tmp_path):
    rows = "[...document.querySelectorAll('#scores tr.beside')].map(row => [row.cells[0].firstChild.data, "
    rows += "...[...row.querySelectorAll('data')].map(each => parseFloat(each.value))])"

    def steps(up, expected):
        opened(browser, up)
        score(browser)
        for row, (name, (a, b)) in zip(browser.evaluate(rows), expected.items()):
            assert row == [name, *(pytest.approx(value, abs=1e-4) for value in (a, b, a - b))]

    model = save_tiny_final(tmp_path / "final", attributes=("length", "tone"))
    async with running(monkeypatch, model=model, page=True) as up:
        told = [row["attributes"] for row in (await up.post("/score", ROWS)).json()["rows"]]
        await beside(steps, up, {name: [each[name] for each in told] for name in ("length", "tone")})


@in_chromium
@in_loop
async def test_the_judge_that_is_served_is_named(monkeypatch, browser, final, tmp_path):
    def steps(up):
        opened(browser, up)
        score(browser)
        assert {judge: len(values) for judge, values in browser.evaluate(VALUES).items()} == {
            **{"reward": 0, "implicit": 3, "combined": 3}
        }
        expected = written_by_score_py(final, tmp_path, "combined")
        assert browser.evaluate(VALUES)["combined"][:2] == pytest.approx(expected, abs=1e-4)
        assert "both as one" in browser.evaluate("byId('about').textContent")

    async with running(monkeypatch, model=final, judge="combined", page=True) as up:
        await beside(steps, up)


@in_chromium
@in_loop
async def test_a_key_is_asked_for_and_sent_in_a_header(monkeypatch, browser):
    def steps(up):
        opened(browser, up)
        assert browser.evaluate(FAULTS) == ["This server wants a key."]
        for key, fault in (("falsch", ["The key is wrong."]), ("geheim", [])):
            browser.evaluate(f"byId('key').value = '{key}'; document.querySelector('#key-form button').click()")
            until(browser, "judges !== null" if not fault else f"({FAULTS})[0] === {json.dumps(*fault)}")
            assert browser.evaluate(FAULTS) == fault
        score(browser, ["four", "sevens!"])
        assert browser.evaluate(VALUES) == {"composition": [4, 7, -3]}
        assert browser.evaluate("byId('key-form').hidden")
        assert "geheim" not in str(requested(browser)) + browser.evaluate("location.href")

    async with running(monkeypatch, worker_of(lengths), key="geheim", page=True) as up:
        await beside(steps, up)


@in_chromium
@in_loop
async def test_a_bad_answer_is_named_and_the_other_is_scored(monkeypatch, browser, final):
    def steps(up):
        opened(browser, up)
        score(browser, ["fine", "b" * 3000])
        (fault,) = browser.evaluate(FAULTS)
        assert fault.startswith("Answer B cannot be scored: the conversation has 3,0")
        assert len(browser.evaluate(VALUES)["reward"]) == 1
        assert browser.evaluate(TOKEN_TEXTS) == ["fine</s>"]
        score(browser, ["a" * 3000, ""])
        faults = browser.evaluate(FAULTS)
        assert any(each.startswith("Answer A cannot be scored") for each in faults)
        score(browser)
        assert browser.evaluate(FAULTS) == []

    async with running(monkeypatch, model=final, credit=True, page=True) as up:
        await beside(steps, up)


@in_chromium
@in_loop
async def test_a_busy_server_and_one_that_is_gone(monkeypatch, browser):
    free = threading.Event()

    def answers(questions):
        free.wait(20)
        return lengths(questions)

    def busy(up):
        opened(browser, up)
        score(browser)
        assert browser.evaluate(FAULTS) == [
            "The server is busy: 1 conversations wait already (--max_queue). Try again in 1 s."
        ]
        free.set()

    def gone(up):
        score(browser)
        assert browser.evaluate(FAULTS) == [f"The server at 127.0.0.1:{up.port} does not answer. Does it still run?"]

    row = [{"prompt": "p", "response": "a"}]
    async with running(monkeypatch, worker_of(answers), max_queue=1, max_wait_ms=0, page=True) as up:
        before = [asyncio.create_task(up.post("/score", row))]
        while await up.metric("batches_total") < 1:
            await asyncio.sleep(0.01)
        before.append(asyncio.create_task(up.post("/score", row)))
        while await up.metric("queue_conversations") < 1:
            await asyncio.sleep(0.01)
        await beside(busy, up)
        assert [(await each).status_code for each in before] == [200, 200]
    await beside(gone, up)
