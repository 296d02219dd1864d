"""A server on loopback: what comes together goes through together, and whatever goes wrong gets no number."""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import threading

import httpx
import pytest
import torch.distributed as dist

from hafrm_ds.errors import ConfigError, ModelError
from hafrm_ds.processes.ranks import Processes
from hafrm_ds.scoring.files import ScoringOptions, score_file
from hafrm_ds.serving import front, server
from hafrm_ds.serving.dispatcher import WorkerFailed
from hafrm_ds.serving.options import ServingOptions
from tests.serving.loopback import ThreadWorker, in_loop, lengths, running, worker_of
from tests.tiny_models import save_tiny_final, save_tiny_model

FUNCTIONS = """
import os, time
def odd(prompt, answer):
    if answer == "raise": raise ValueError("no")
    if answer == "hang": time.sleep(60)
    if answer == "die": os._exit(3)
    return float("nan") if answer == "nan" else len(answer)
def few(prompts, answers):
    return [1.0] * (len(answers) - 1)
"""
ROW = {"prompt": "hi", "response": "yes"}


@pytest.fixture(scope="module")
def final(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return save_tiny_final(folder / "final", base=save_tiny_model(folder / "policy"))


# ---- the same values -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(final, tmp_path_factory):
    """Rows of all forms, and what score.py says of them."""
    source = random.Random(0)

    def text():
        return "".join(source.choice("abc ") for _ in range(source.randrange(1, 30))) + "x"

    prompts = [text() for _ in range(6)]
    rows = [
        {"id": number, "prompt": prompts[number % 6]}
        | ({"response": text()} if number % 3 else {"responses": [text(), text()]})
        for number in range(40)
    ]
    rows.append({"prompt": "a", "response": "b" * 3000})
    folder = tmp_path_factory.mktemp("scored")
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ScoringOptions(model=final, input=folder / "in.jsonl", output=folder / "out.jsonl")
    score_file(options, Processes(rank=0, local_rank=0, world_size=1, store=dist.HashStore()))
    return rows, [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("size, budget", [(1, 8192), (7, 600), (41, 8192)])
@in_loop
async def test_served_equals_score_py_under_any_batching(monkeypatch, final, scored, num_workers, size, budget):
    rows, expected = scored
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    options = {"model": final, "max_tokens_per_micro_batch": budget, "max_wait_ms": 20}
    async with running(monkeypatch, num_workers=num_workers, **options) as up:
        replies = await asyncio.gather(*(up.post("/score", {"rows": part}) for part in parts))
        batches = await up.metric("batches_total")
    assert [reply.status_code for reply in replies] == [200] * (len(parts) - 1) + [422]
    assert batches < len(parts) or size > 1
    for found, wanted in zip((row for reply in replies for row in reply.json()["rows"]), expected, strict=True):
        for name in ("score", "scores"):
            assert found.get(name) == (
                wanted[name] and pytest.approx(wanted[name], abs=1e-5) if name in wanted else None
            )
    assert "3,0" in found["score_error"] and found["score"] is None


@in_loop
async def test_each_route_gives_the_same_value(monkeypatch, final):
    async with running(monkeypatch, model=final) as up:
        (row,) = (await up.post("/score", [ROW])).json()["rows"]
        value = pytest.approx(row["score"], abs=1e-5)
        prompt, answer = "user:hi</s>assistant:", "yes</s>"
        body = {"query": [prompt + answer], "prompts": [prompt], "labels": ["72"]}
        assert (await up.post("/get_reward", body)).json()["rewards"] == [value]
        assert (await up.post("/reward", {"prompt": prompt, "response": answer, "label": None})).json() == value
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
        for asked in ({"messages": messages}, {"input": prompt + answer}):
            data = (await up.post("/classify", asked | {"use_activation": False})).json()["data"]
            assert data[0]["probs"] == [value]
        body["query"] = ["Q: hi A: yes"]
        assert (await up.post("/get_reward", body)).status_code == 422


@pytest.mark.parametrize("options", [{}, {"credit": True}, {"judge": "implicit"}])
@in_loop
async def test_tokens_have_log_probs_and_implicit_rewards(monkeypatch, final, options):
    from hafrm_ds import HybridRewardModel

    async with running(monkeypatch, model=final, **options) as up:
        rows = (await up.post("/logprobs", [ROW, {"prompt": "hi", "responses": ["yes", "n"]}])).json()["rows"]
        alone = await up.post("/logprobs", [{"messages": [{"role": "user", "content": "hi"}]}])
        score = (await up.post("/score", [ROW])).json()["rows"][0]["score"]
    assert alone.status_code == 422
    (first,), (same, other) = (row["answers"] for row in rows)
    model = HybridRewardModel.from_pretrained(final)
    question = [{"role": "user", "content": "hi"}]
    expected = model.log_probs(question, ["yes", "n"], per_token=True)
    assert first["logprobs"] == same["logprobs"] == pytest.approx(expected[0], abs=1e-5)
    assert other["logprobs"] == pytest.approx(expected[1], abs=1e-5)
    assert first["tokens"] == ["y", "e", "s", "</s>"]
    assert ("implicit_rewards" in first) == bool(options)
    if "judge" in options:
        assert sum(first["implicit_rewards"]) == pytest.approx(score, abs=1e-5)


# ---- merging ---------------------------------------------------------------------------------------------------------


@in_loop
async def test_what_comes_together_goes_through_together(monkeypatch):
    sizes = []

    def answers(questions):
        sizes.append(len(questions))
        return lengths(questions)

    async with running(monkeypatch, worker_of(answers), max_wait_ms=200) as up:
        rows = [{"prompt": f"{number % 4}", "response": "x" * number} for number in range(1, 33)]
        replies = await asyncio.gather(*(up.post("/score", [row]) for row in rows))
        assert [reply.json()["rows"][0]["score"] for reply in replies] == list(range(1, 33))
        assert sum(sizes) == 32 and len(sizes) <= 3
        assert await up.metric("conversations_total") == 32


@in_loop
async def test_a_batch_has_about_a_micro_batch(monkeypatch):
    sizes = []

    def answers(questions):
        sizes.append(len(questions))
        return lengths(questions)

    async with running(monkeypatch, worker_of(answers), max_tokens_per_micro_batch=100) as up:
        reply = await up.post("/score", [{"prompt": "p", "response": "x" * 99}] * 10)
    assert [row["score"] for row in reply.json()["rows"]] == [99] * 10
    assert sizes == [3, 3, 3, 1]  # 300 characters


# ---- what is refused -------------------------------------------------------------------------------------------------


@in_loop
async def test_a_key_is_asked_for(monkeypatch, tmp_path):
    (tmp_path / "key").write_text("geheim\n")
    async with running(monkeypatch, worker_of(lengths), key=f"@{tmp_path / 'key'}") as up:
        for path in ("/score", "/score?key=wrong", "/score?key="):
            assert (await up.post(path, [ROW])).status_code == 401
        for header, status in (("Bearer wrong", 401), ("Basic geheim", 200)):  # a key in the header counts
            reply = await up.post("/score?key=geheim", [ROW], headers={"Authorization": header})
            assert reply.status_code == status
        assert (await up.post("/score", [ROW], headers={"Authorization": "Bearer ungeheim"})).status_code == 401
        assert (await up.post("/score", [ROW], headers={"Authorization": "Bearer geheim"})).status_code == 200
        assert (await up.post("/score?key=geheim", [ROW])).json()["rows"] == [ROW | {"score": 3.0}]
        assert (await up.client.get("/metrics")).status_code == 401
        assert (await up.client.get("/health")).status_code == 200


@in_loop
async def test_what_is_no_request(monkeypatch):
    async with running(monkeypatch, worker_of(lengths)) as up:
        for content in (b"", b"{", b"\xff", b"[" * 100_000, b'{"query": 3}'):
            reply = await up.client.post("/get_reward", content=content)
            assert reply.status_code == 400 and reply.json()["error"]["message"]
        assert (await up.client.get("/score")).status_code == 405
        assert (await up.client.post("/nothing")).status_code == 404
        assert (await up.post("/get_reward", {"query": [], "prompts": [], "labels": []})).json()["rewards"] == []
        assert (await up.client.get("/openapi.json")).json()["openapi"] == "3.1.0"


@in_loop
async def test_what_a_row_brings_along_goes_back_as_it_came(monkeypatch):
    rows = [ROW | {"of": [float("inf"), "half \ud83d", "é"]}, {"prompt": "hi", "of": "\ud83d"}]
    async with running(monkeypatch, worker_of(lengths)) as up:
        replies = [await up.client.post("/score", content=json.dumps(part)) for part in (rows[:1], rows)]
    assert [reply.status_code for reply in replies] == [200, 422]
    for reply in replies:
        for found, sent in zip(json.loads(reply.content)["rows"], rows):
            assert {name: found[name] for name in sent} == sent


@in_loop
async def test_a_large_body_is_refused_and_not_kept(monkeypatch):
    async with running(monkeypatch, worker_of(lengths), max_body_mb=1) as up:
        reply = await up.client.post("/score", content=b"x" * 50_000_000)
        assert reply.status_code == 413 and "50,000,000 bytes" in reply.json()["error"]["message"]

        async def chunks():
            for _ in range(30):
                yield b"x" * 100_000

        assert (await up.client.post("/score", content=chunks())).status_code == 413
        assert (await up.post("/score", [ROW])).status_code == 200
        assert (await up.post("/score", [ROW] * 5000)).status_code == 413


@in_loop
async def test_a_full_queue_is_503(monkeypatch):
    free = threading.Event()

    def answers(questions):
        free.wait(20)
        return lengths(questions)

    async with running(monkeypatch, worker_of(answers), max_queue=4, max_wait_ms=0) as up:
        first = asyncio.create_task(up.post("/score", [ROW]))
        while await up.metric("batches_total") < 1:
            await asyncio.sleep(0.01)
        waiting = asyncio.create_task(up.post("/score", [ROW] * 4))
        while await up.metric("queue_conversations") < 4:
            await asyncio.sleep(0.01)
        refused = await up.post("/score", [ROW])
        assert refused.status_code == 503 and refused.headers["Retry-After"] == "1"
        free.set()
        assert [(await each).status_code for each in (first, waiting)] == [200, 200]
        assert (await up.post("/score", [ROW])).status_code == 200


@in_loop
async def test_slow_and_half_open_clients_are_let_go(monkeypatch):
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(front, "BODY_SECONDS", 0.3)
    async with running(monkeypatch, worker_of(lengths)) as up:
        head = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n[{"
        for sent, answered in ((b"", b""), (b"POST /score HT", b""), (head, b"HTTP/1.1 408")):
            reader, writer = await asyncio.open_connection("127.0.0.1", up.port)
            writer.write(sent)
            received = await asyncio.wait_for(reader.read(), 5)  # until it is closed
            assert received.startswith(answered) and bool(received) == bool(answered)
            writer.close()
        assert (await up.post("/score", [ROW])).status_code == 200


@in_loop
async def test_who_has_left_is_not_scored(monkeypatch):
    free, asked = threading.Event(), []

    def answers(questions):
        asked.append(len(questions))
        free.wait(20)
        return lengths(questions)

    async with running(monkeypatch, worker_of(answers), max_wait_ms=0) as up:
        first = asyncio.create_task(up.post("/score", [ROW]))
        while not asked:
            await asyncio.sleep(0.01)
        with pytest.raises(httpx.ReadTimeout):
            await up.post("/score", [ROW] * 3, timeout=0.3)
        await asyncio.sleep(0.1)
        free.set()
        assert (await first).status_code == 200
        assert (await up.post("/score", [ROW] * 2)).status_code == 200
        assert asked == [1, 2]
        assert '{path="/score",status="499"} 1' in (await up.client.get("/metrics")).text


# ---- rows without a value --------------------------------------------------------------------------------------------


@in_loop
async def test_a_function_s_faults_are_those_of_its_row(monkeypatch, tmp_path):
    (tmp_path / "f.py").write_text(FUNCTIONS)
    (tmp_path / "odd.yaml").write_text("function: f.py:odd\ntimeout: 0.5\n")
    (tmp_path / "few.yaml").write_text("function: f.py:few\nbatched: true\n")
    async with running(monkeypatch, model=tmp_path / "odd.yaml") as up:
        answers = ["nan", "raise", "hang", "die"]
        reply = await up.post("/score", [{"prompt": "p", "response": each} for each in (*answers, "good")])
        assert reply.status_code == 422
        assert [row["score"] for row in reply.json()["rows"]] == [None] * 4 + [4.0]
        errors = [each["error"] for each in reply.json()["error"]["rows"]]
        for error, expected in zip(errors, ("not finite", "ValueError: no", "longer than 0.5", "ended its process")):
            assert expected in error
        body = {"prompt": [{"role": "user", "content": "p"}], "label": None}
        reply = await up.post("/reward", body | {"response": "nan"})
        assert reply.status_code == 422 and reply.json()["error"]["rows"][0]["row"] == "response"
        assert (await up.post("/reward", body | {"response": "good"})).json() == 4.0
        reply = await up.post("/reward", {"prompt": "a text", "response": "good"})
        assert reply.status_code == 422 and "--prompts text" in reply.json()["error"]["message"]
        assert (await up.post("/logprobs", [ROW])).status_code == 422
    async with running(monkeypatch, model=tmp_path / "few.yaml") as up:
        reply = await up.post("/score", [ROW, ROW])
        assert reply.status_code == 422 and "gave 1 values for 2" in reply.json()["error"]["message"]


# ---- workers ---------------------------------------------------------------------------------------------------------


@in_loop
async def test_a_dead_worker_is_named_and_started_anew(monkeypatch):
    def answers(questions):
        if questions[0].item[-1]["content"] == "die":
            raise WorkerFailed("worker 0 died (status -9) while it scored this request")
        return lengths(questions)

    class Dying(worker_of(answers)):
        def ask(self, questions):
            try:
                return super().ask(questions)
            except WorkerFailed:
                self.stop()
                raise

    async with running(monkeypatch, Dying) as up:
        for _ in range(20):
            reply = await up.post("/score", [{"prompt": "p", "response": "die"}])
            assert reply.status_code == 500 and "worker 0 died" in reply.json()["error"]["message"]
            assert (await up.post("/score", [ROW])).json()["rows"][0]["score"] == 3.0
        assert await up.metric("worker_restarts_total") == 20


@in_loop
async def test_no_answer_in_time_is_504(monkeypatch):
    free = threading.Event()

    def answers(questions):
        free.wait(20)
        return lengths(questions)

    async with running(monkeypatch, worker_of(answers), timeout=0.3) as up:
        reply = await up.post("/score", [ROW])
        free.set()
        assert reply.status_code == 504 and "--timeout" in reply.json()["error"]["message"]


@in_loop
async def test_a_reward_that_cannot_be_loaded_ends_the_server(monkeypatch):
    async with running(monkeypatch, worker_of(lengths, ["no weights"])) as up:
        with pytest.raises(ModelError, match="no weights"):
            await up.task


# ---- stopping --------------------------------------------------------------------------------------------------------


@in_loop
async def test_sigterm_under_load_answers_what_has_come(monkeypatch):
    free, asked = threading.Event(), []

    def answers(questions):
        asked.extend(questions)
        free.wait(20)
        return lengths(questions)

    async with running(monkeypatch, worker_of(answers), max_wait_ms=0) as up:
        under_way = [asyncio.create_task(up.post("/score", [ROW])) for _ in range(30)]
        while not asked or await up.metric("queue_conversations") + len(asked) < 30:
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.1)
        refused = await up.post("/score", [ROW])
        assert refused.status_code == 503 and "Retry-After" in refused.headers
        assert (await up.client.get("/health")).json()["status"] == "stopping"
        free.set()
        assert [(await each).json()["rows"][0]["score"] for each in under_way] == [3.0] * 30
        await asyncio.wait_for(up.task, 10)
        with pytest.raises(httpx.ConnectError):
            await up.post("/score", [ROW])


def test_an_address_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}"):
            server.listen(ServingOptions(model="m", port=port))


@pytest.mark.parametrize("host, local", [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False)])
def test_whether_others_can_ask(host, local):
    assert ServingOptions(model="m", host=host).is_local == local


# ---- the loops of trainers -------------------------------------------------------------------------------------------


@in_loop
async def test_two_urls_as_openrlhf_asks_them(monkeypatch, final):
    """A sample goes to the first URL and an empty list to the second; the first answer is used; five attempts."""

    async def post(up, body):
        for _ in range(5):
            with contextlib.suppress(httpx.HTTPError):
                reply = await up.post("/get_reward?key=k", body)
                reply.raise_for_status()
                return reply.json()
            await asyncio.sleep(0.2)
        raise RuntimeError

    fails = iter([True, True])

    class Hiccups(ThreadWorker):
        def ask(self, questions):
            if next(fails, False):
                raise WorkerFailed("worker 0 died")
            return super().ask(questions)

    async with running(monkeypatch, Hiccups, model=final, key="k") as up:
        prompt = "user:hi</s>assistant:"
        queries, prompts, labels = [prompt + "yes</s>"], [prompt], ["72"]
        size = -(-len(queries) // 2)
        slices = [slice(number * size, min((number + 1) * size, len(queries))) for number in range(2)]
        bodies = [{"query": queries[each], "prompts": prompts[each], "labels": labels[each]} for each in slices]
        first, second = await asyncio.gather(*(post(up, body) for body in bodies))
        (row,) = (await up.post("/score?key=k", [ROW])).json()["rows"]
        assert first["rewards"] == [pytest.approx(row["score"], abs=1e-5)] and second["rewards"] == []
