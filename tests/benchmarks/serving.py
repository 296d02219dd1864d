"""Requests a second of launch/serve.py under 64 clients of one sample each, against one forward a request.

    python tests/benchmarks/serving.py --model FINAL [--seconds 30] [--clients 64] [--prompt_words 150] [--workers 1]

The samples are 16 prompts with 8 answers each, in words drawn by a fixed seed; a client sends its next when it has its
answer. Beside the server stands the same model asked by as many clients without HTTP, each request a forward of its
own, one after the other: the most that a server without merging could reach. Loading is not counted.
"""

import argparse
import asyncio
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import numpy as np

from hafrm_ds.saved.opening import load_judge

ROOT = Path(__file__).parents[2]
PROMPTS, ANSWERS, SEED = 16, 8, 0
WORDS = Path(__file__).read_text().split()


def samples(prompt_words: int, answer_words: int) -> list[tuple[str, str]]:
    """(prompt, answer), in an order in which answers to one prompt are not neighbours."""
    source = random.Random(SEED)

    def text(number: int) -> str:
        return " ".join(source.choice(WORDS) for _ in range(number))

    prompts = [text(prompt_words) for _ in range(PROMPTS)]
    return [(prompt, text(answer_words)) for _ in range(ANSWERS) for prompt in prompts]


async def load(
    ask: Callable[[str, str], Awaitable[float]], given: list[tuple[str, str]], clients: int, seconds: float
) -> tuple[list[float], float, dict[tuple[str, str], float]]:
    """Seconds of each request, seconds of them all, and the value of each sample."""
    took: list[float] = []
    values: dict[tuple[str, str], float] = {}
    begin = time.perf_counter()
    end = begin + seconds

    async def client(number: int) -> None:
        while time.perf_counter() < end:
            sample = given[number % len(given)]
            started = time.perf_counter()
            values[sample] = await ask(*sample)
            took.append(time.perf_counter() - started)
            number += clients

    await asyncio.gather(*(client(number) for number in range(clients)))
    return took, time.perf_counter() - begin, values


def row(name: str, took: list[float], seconds: float) -> str:
    p50, p99 = (1000 * np.percentile(took, each) for each in (50, 99))
    return f"| {name} | {len(took):,} | {len(took) / seconds:.1f} | {p50:,.0f} | {p99:,.0f} |"


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--prompt_words", type=int, default=150)
    parser.add_argument("--answer_words", type=int, default=60)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    given = samples(options.prompt_words, options.answer_words)
    print("| | requests | requests a second | p50 ms | p99 ms |\n|---|---|---|---|---|")

    command = [sys.executable, "launch/serve.py", "--port", "0", "--model", options.model]
    server = subprocess.Popen(
        [*command, "--workers", str(options.workers)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stderr is not None
        address = next(found[0] for line in server.stderr if (found := re.findall(r"http://\S+", line)))
        limits = httpx.Limits(max_connections=options.clients)
        async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as http:

            async def served(prompt: str, answer: str) -> float:
                body = {"prompt": [{"role": "user", "content": prompt}], "response": answer, "label": None}
                reply = await http.post("/reward", json=body)
                assert reply.is_success, reply.text
                return reply.json()

            await served(*given[0])
            took, elapsed, values = await load(served, given, options.clients, options.seconds)
        print(row("served", took, elapsed), flush=True)
    finally:
        server.terminate()
        server.wait()

    judge = load_judge(options.model)
    one_at_a_time = asyncio.Lock()

    async def alone(prompt: str, answer: str) -> float:
        async with one_at_a_time:
            scores = await asyncio.to_thread(judge.score, [{"role": "user", "content": prompt}], [answer])
            assert isinstance(scores, list)
            return scores[0]

    await alone(*given[0])
    took, elapsed, expected = await load(alone, given, options.clients, options.seconds)
    print(row("one forward a request", took, elapsed))
    worst = max(abs(values[each] - expected[each]) for each in values.keys() & expected.keys())
    print(f"\nlargest difference of a value: {worst:.1e}")


if __name__ == "__main__":
    asyncio.run(main())
