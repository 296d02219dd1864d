"""launch/serve.py as users start it, with workers that are processes."""

import asyncio
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from hafrm_ds.saved.opening import load_judge
from tests.tiny_models import save_tiny_final

ROOT = Path(__file__).parents[2]
FUNCTION = """
import time
def slow(prompt, answer):
    time.sleep(2 if answer == "slow" else 0)
    return 1
"""
ROWS = [{"prompt": "hi", "responses": ["yes", "no"]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    save_tiny_final(folder / "final")
    (folder / "f.py").write_text(FUNCTION)
    (folder / "both.yaml").write_text("ensemble: [final, f.py:slow]\n")
    return folder


def line_with(text: str, log: Path, process: subprocess.Popen) -> str:
    for _ in range(1200):
        lines = [line for line in log.read_text().splitlines() if text in line]
        if lines:
            return lines[0]
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.mark.distributed
@pytest.mark.alone
def test_a_killed_worker_and_a_stopped_server(folder):
    log = folder / "log"
    command = [sys.executable, "launch/serve.py", "--model", folder / "both.yaml", "--port", "0", "--workers", "2"]
    with log.open("w") as output:
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stderr=output)
    try:
        address = re.findall(r"http://\S+", line_with("serving", log, process))[0]
        workers = asyncio.run(asyncio.wait_for(scenario(address, process, folder), 120))
        assert process.wait(30) == 0
        assert "stopped" in log.read_text()
        assert not any(each.is_running() for each in workers)
    finally:
        process.kill()
        process.wait()


async def scenario(address: str, process: subprocess.Popen, folder: Path) -> list[psutil.Process]:
    """Returns the last workers."""

    def workers() -> list[psutil.Process]:
        return [each for each in psutil.Process(process.pid).children() if "serving.worker" in str(each.cmdline())]

    async with httpx.AsyncClient(base_url=address, timeout=60) as client:
        judge = load_judge(folder / "final", device="cpu")
        expected = [(1 + each) / 2 for each in judge.score([{"role": "user", "content": "hi"}], ["yes", "no"])]
        replies = await asyncio.gather(*(client.post("/score", json=ROWS) for _ in range(8)))
        for reply in replies:
            assert reply.json()["rows"][0]["scores"] == pytest.approx(expected, abs=1e-5)

        first = workers()
        assert len(first) == 2
        for each in first:
            each.send_signal(signal.SIGTERM)  # as a cluster sends it to everybody: the front alone decides

        # Both are at work when they are killed: each request is answered by an error that names its worker.
        slow = [asyncio.create_task(client.post("/score", json=[{"prompt": "a", "response": "slow"}]))]
        await asyncio.sleep(0.5)
        slow.append(asyncio.create_task(client.post("/score", json=[{"prompt": "b", "response": "slow"}])))
        await asyncio.sleep(0.5)
        for each in first:
            each.kill()
        for reply in await asyncio.gather(*slow):
            assert reply.status_code == 500
            assert re.match(r"worker [01] died \(status -9\)", reply.json()["error"]["message"])

        # What comes while none is there waits for the next.
        reply = await client.post("/score", json=ROWS)
        assert reply.json()["rows"][0]["scores"] == pytest.approx(expected, abs=1e-5)
        assert "hafrm_worker_restarts_total 2" in (await client.get("/metrics")).text

        last = workers()
        # Stopped under load: what has come is answered, what comes is not.
        under_way = [
            asyncio.create_task(client.post("/score", json=[{"prompt": "a", "response": "slow"}])) for _ in range(3)
        ]
        await asyncio.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.2)
        assert (await client.post("/score", json=ROWS)).status_code == 503
        for reply in await asyncio.gather(*under_way):
            assert reply.status_code == 200 and reply.json()["rows"][0]["score"] is not None
        return last


@pytest.mark.distributed
def test_what_is_wrong_is_said_at_the_start(folder):
    result = subprocess.run(
        [sys.executable, "launch/serve.py", "--model", str(folder), "--modle", "x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and "did you mean model?" in result.stderr
