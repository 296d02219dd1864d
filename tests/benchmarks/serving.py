"""Requests a second of launch/serve.py under 64 clients of one sample each, against one forward a request and vLLM.

    python tests/benchmarks/serving.py --model FINAL [--seconds 30] [--clients 64] [--prompt_words 150] [--workers 1]
    python tests/benchmarks/serving.py --model FINAL --soak_minutes 60
    python tests/benchmarks/serving.py --model FINAL --vllm http://127.0.0.1:8000

The samples are 16 prompts with 8 answers each, then 16 others, as an RL trainer asks, in words drawn by a fixed seed;
none is asked twice. A client sends its next when it has its answer. Beside the server stands the same model asked by as
many clients without HTTP, each request a forward of its own, one after the other: the most that a server without
merging could reach. Loading is not counted.

--vllm: ask this server too, of the same model (`vllm serve EXPORT --runner pooling --convert classify`), which is idle
while the others are measured.

--soak_minutes: then requests come at random moments, at 80% of the rate that the clients reached, for so long; a line
every minute says how they fared, and what the server's processes have resident.
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
import psutil

from hafrm_ds.saved.opening import load_judge

ROOT = Path(__file__).parents[2]
PROMPTS, ANSWERS, BLOCKS, SEED = 16, 8, 64, 0
TOLERANCE = 1e-3
"""Of a value under another batching; in bfloat16 take a model with float32 weights to see less."""
WORDS = Path(__file__).read_text().split()


def samples(prompt_words: int, answer_words: int) -> list[tuple[str, str]]:
    """(prompt, answer), in BLOCKS of prompts, in each of which answers to one prompt are not neighbours."""
    source = random.Random(SEED)

    def text(number: int) -> str:
        return " ".join(source.choice(WORDS) for _ in range(number))

    found = []
    for _ in range(BLOCKS):
        prompts = [text(prompt_words) for _ in range(PROMPTS)]
        found += [(prompt, text(answer_words)) for _ in range(ANSWERS) for prompt in prompts]
    return found


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


async def soak(
    ask: Callable[[str, str], Awaitable[float]],
    given: list[tuple[str, str]],
    expected: dict[tuple[str, str], float],
    rate: float,
    minutes: int,
    server: psutil.Process,
) -> None:
    """Requests at random moments, `rate` a second on average, whether or not those before are answered."""
    source = random.Random(SEED)
    print(f"\n{rate:.1f} requests a second\n")
    print("| minute | answered | failed | wrong | p50 ms | p99 ms | MiB resident |\n|---|---|---|---|---|---|---|")
    took: list[float] = []
    failed: list[str] = []
    wrong: list[float] = []
    running: set[asyncio.Task[None]] = set()

    async def request(sample: tuple[str, str]) -> None:
        started = time.perf_counter()
        try:
            difference = abs(await ask(*sample) - expected[sample])
        except (httpx.HTTPError, AssertionError) as error:
            failed.append(repr(error))
            return
        took.append(time.perf_counter() - started)
        wrong.extend([difference] * (difference > TOLERANCE))

    begin = due = time.perf_counter()
    for minute in range(1, minutes + 1):
        while due < begin + 60 * minute:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(request(source.choice(given)))
            running.add(task)
            task.add_done_callback(running.discard)
            due += source.expovariate(rate)
        resident = sum(each.memory_info().rss for each in (server, *server.children(recursive=True))) / 2**20
        p50, p99 = (1000 * np.percentile(took or [np.nan], each) for each in (50, 99))
        print(
            f"| {minute} | {len(took):,} | {len(failed)} | {len(wrong)} | {p50:,.0f} | {p99:,.0f} | {resident:,.0f} |"
        )
        for each in failed[:3]:
            print(each)
        sys.stdout.flush()
        for seen in (took, failed, wrong):
            seen.clear()
    await asyncio.gather(*running)


def row(name: str, took: list[float], seconds: float) -> str:
    p50, p99 = (1000 * np.percentile(took, each) for each in (50, 99))
    return f"| {name} | {len(took):,} | {len(took) / seconds:.1f} | {p50:,.0f} | {p99:,.0f} |"


async def measure_vllm(
    address: str, given: list[tuple[str, str]], options: argparse.Namespace, values: dict[tuple[str, str], float]
) -> None:
    """The line of a vLLM server, and how far its values are from ours."""
    async with httpx.AsyncClient(
        base_url=address, timeout=300, limits=httpx.Limits(max_connections=options.clients)
    ) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]

        async def classified(prompt: str, answer: str) -> float:
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            body = {"model": model, "messages": messages, "add_generation_prompt": False, "use_activation": False}
            reply = await http.post("/classify", json=body)
            assert reply.is_success, reply.text
            return reply.json()["data"][0]["probs"][0]

        await classified(*given[0])
        took, elapsed, theirs = await load(classified, given, options.clients, options.seconds)
    print(row("vLLM", took, elapsed), flush=True)
    print(f"largest difference of a value: {max(abs(values[each] - theirs[each]) for each in values.keys() & theirs)}")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--prompt_words", type=int, default=150)
    parser.add_argument("--answer_words", type=int, default=60)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--soak_minutes", type=int, default=0)
    parser.add_argument("--vllm")
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
            if options.soak_minutes:
                rate = 0.8 * len(took) / elapsed
                await soak(served, list(values), values, rate, options.soak_minutes, psutil.Process(server.pid))
                return
    finally:
        server.terminate()
        server.wait()

    if options.vllm:
        await measure_vllm(options.vllm, given, options, values)

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
