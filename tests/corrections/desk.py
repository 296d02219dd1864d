"""A small scenario whose three seats are models of one scripted endpoint."""

from typing import Any

import torch.distributed as dist

from hafrm_ds.corrections.scenario import Scenario
from hafrm_ds.processes.ranks import Processes
from tests.rewards.scripted import Script, last_said

CASES = [
    {"name": "Ines Okafor", "trouble": "the chain is off", "cover": "repairs alone", "code": 4711},
    {"name": "Tobias Lind", "trouble": "a flat tyre", "cover": "none at all", "code": 8256},
]


def seat(url: str, model: str, system: str, **more: Any) -> dict[str, Any]:
    endpoint = {"url": url, "model": model, "timeout": 5.0, "attempts": 3} | more
    return {"endpoint": endpoint, "system": system, "temperature": 0.5, "max_tokens": 50}


def desk(folder, url: str = "http://127.0.0.1:9/v1", **more: Any) -> Scenario:
    """The scenario; `more` replaces options of it."""
    seats = {
        "user": seat(url, "customer", "You are {name}: {trouble}."),
        "assistant": seat(url, "desk", "You answer the telephone."),
        "supervisor": seat(url, "chief", "You supervise the desk."),
    }
    options = {
        "output_dir": folder,
        "name": "desk",
        "seats": seats,
        "fields": {"name": ["user"], "trouble": ["user"], "cover": [], "code": ["user"]},
        "withhold": ["code"],
        "cases": CASES,
        "rules": {"assistant": ["Ask where the customer is."]},
        "max_turns": 6,
    }
    return Scenario(**options | more)


def alone() -> Processes:
    return Processes(rank=0, local_rank=0, world_size=1, store=dist.HashStore())


def played(**seats: Script | str) -> Script:
    """What each seat says, a text or a script. By default the customer asks three times, the desk is brief, and the
    chief has advice for every second seed."""

    def customer(body: dict[str, Any]) -> str:
        number = len(body["messages"]) // 2
        return f"My question {number} of seed {body['seed']}" + (" [END]" if number == 3 else "")

    def answer(body: dict[str, Any]) -> str:
        if "You have been given this advice" in last_said(body):
            return f"Where are you? I shall help you with {body['seed']}."
        return f"Yes, {body['seed']}."

    def chief(body: dict[str, Any]) -> str:
        return "No problem." if body["seed"] % 2 else "Ask where they are."

    scripts = {"customer": customer, "desk": answer, "chief": chief} | seats

    def script(body: dict[str, Any]):
        said = scripts[body["model"]]
        return said if isinstance(said, str) else said(body)

    return script
