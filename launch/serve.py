"""Serve a reward to RL trainers: a model, a function FILE.py:NAME or a composition FILE.yaml.

    python launch/serve.py --model RUN/final [--port 5000] [--key @FILE] [--workers N]

One worker process a GPU holds the reward. Requests that arrive together go through one forward, and answers to one
prompt share its computation. Routes, all POST, all JSON:

    /get_reward   OpenRLHF        {"query": [...], "prompts": [...], "labels": [...]} -> {"rewards": [...], ...}
    /reward       slime           {"prompt", "response", "label"} -> a number
    /classify     vLLM            {"messages": [...]} or {"input": [...]} -> {"data": [{"probs": [x]}]}
    /score        rows of launch/score.py -> the same rows with score or scores
    /logprobs     rows of launch/score.py -> log-prob of each token, with --credit its implicit reward too

and GET /model, /health, /metrics (Prometheus) and /openapi.json; with --page a page at / that shows two answers side by
side. A row that cannot be scored is answered with status 422, which names it, never with a number; a full queue with
503. SIGTERM ends the server when it has answered what it was asked.
"""

import importlib.util
import sys

from hafrm_ds.errors import ConfigError, run_alone
from hafrm_ds.options import read
from hafrm_ds.serving.options import ServingOptions


def main() -> None:
    options = read(ServingOptions, sys.argv[1:], about=__doc__)
    missing = [name for name in ("starlette", "uvicorn", "h11") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError([f"launch/serve.py needs {', '.join(missing)}: pip install -e '.[serve]'"])
    from hafrm_ds.serving.server import serve

    serve(options, lambda message: print(message, file=sys.stderr, flush=True))


if __name__ == "__main__":
    run_alone(main)
