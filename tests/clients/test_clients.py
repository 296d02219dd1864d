"""Each trainer's call, word for word, against a server that answers, hesitates or fails."""

import asyncio
import inspect
import json
import math
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import ModuleType, SimpleNamespace

import pytest
import torch

from hafrm_ds.clients import client as module
from hafrm_ds.clients.client import RewardClient, RewardError
from tests.tiny_models import save_tiny_final

PROMPT = [{"role": "user", "content": "hi"}]


@pytest.fixture
def server(monkeypatch):
    """Scores an answer by its length. `plan`: what it does instead, request by request: a status, or this and
    a JSON or what a proxy writes."""
    plan, seen = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append(SimpleNamespace(path=self.path, body=body, key=self.headers.get("Authorization")))
            step = plan.pop(0) if plan else None
            if step == "hang up":
                self.connection.close()
                return
            if self.path == "/score":
                reply = {"rows": [row | {"score": length(row)} for row in body["rows"]]}
            else:
                lengths = [float(len(query)) for query in body["query"]]
                reply = {"rewards": lengths, "scores": lengths, "extra_logs": {}}
            status = step if isinstance(step, int) else step[0] if step else 200
            body = step[1] if isinstance(step, tuple) else reply
            is_proxy = isinstance(body, bytes)  # which breaks off, too
            content = body if is_proxy else json.dumps(body).encode()
            self.send_response(status)
            if is_proxy:
                self.send_header("Retry-After", "Wed, 21 Oct 2026 07:28:00 GMT")
            self.send_header("Content-Length", str(len(content) + is_proxy))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    def length(row):
        answer = row["response"] if "response" in row else row["messages"][-1]["content"]
        return float(len(answer if isinstance(answer, str) else answer[-1]["content"]))

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    monkeypatch.setenv("HAFRM_REWARD_URL", f"http://127.0.0.1:{listening.server_port}")
    monkeypatch.setenv("HAFRM_REWARD_KEY", "k")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    yield SimpleNamespace(plan=plan, seen=seen)
    listening.shutdown()
    listening.server_close()


def row(answer):
    return {"prompt": PROMPT, "response": answer}


def test_hiccups_are_tried_again(server):
    server.plan += [503, "hang up", 500]
    assert RewardClient.of().scores([row("abc")]) == [3.0]
    assert len(server.seen) == 4 and server.seen[0].key == "Bearer k"


@pytest.mark.parametrize("status, attempts", [(503, 6), (401, 1), (400, 1), (413, 1)])
def test_a_server_that_does_not_answer_is_an_error(server, status, attempts):
    for ask in (RewardClient.of().scores, RewardClient.of().scores_or_none):
        server.plan[:], server.seen[:] = [status] * 10, []
        with pytest.raises(RewardError, match=f"status {status}"):
            ask([row("abc")])
        assert len(server.seen) == attempts


def test_what_stands_between_may_answer_in_its_own_words(server):
    """A proxy writes HTML, breaks off, and gives a date as Retry-After."""
    server.plan += [(503, b"<html>"), (502, b"<html>")]
    assert RewardClient.of().scores([row("abc")]) == [3.0]
    server.plan += [(422, b"<html>")]
    with pytest.raises(RewardError, match="gave no reward"):
        RewardClient.of().scores([row("abc")])


def test_nobody_is_there():
    with pytest.raises(RewardError, match="gave no reward"):
        RewardClient("http://127.0.0.1:1", attempts=1).scores([row("abc")])


@pytest.mark.parametrize(
    "rows", [[{"score": None, "score_error": "rows[0]: too long"}], [{"score": float("nan")}], [{}], [{"score": True}]]
)
def test_a_row_without_a_reward_is_no_zero(server, rows):
    server.plan += [(422, {"rows": rows}), (422, {"rows": rows})]
    with pytest.raises(RewardError, match=r"rows\[0\]"):
        RewardClient.of().scores([row("abc")])
    assert RewardClient.of().scores_or_none([row("abc")]) == [None]


def test_a_wrong_count_is_an_error(server):
    server.plan += [(200, {"rows": []}), (422, {"error": {}})]
    for _ in range(2):
        with pytest.raises(RewardError, match="each of 1 rows"):
            RewardClient.of().scores([row("abc")])


def test_nothing_is_asked_about_nothing(server):
    assert RewardClient.of().scores([]) == [] and not server.seen


# ---- trainers --------------------------------------------------------------------------------------------------------


def test_trl(server):
    from hafrm_ds.clients.for_trl import served, served_async

    given = {
        "completion_ids": [[1], [2]],
        "trainer_state": None,
        "log_extra": None,
        "log_metric": None,
        "answer": [1, 2],
    }
    messages = [[{"role": "assistant", "content": "abc"}], [{"role": "assistant", "content": ""}]]
    assert served()(prompts=[PROMPT, PROMPT], completions=messages, **given) == [3.0, 0.0]
    assert served()(prompts=["hi", "hi"], completions=["abc", "a"], **given) == [3.0, 1.0]
    reward = served_async()
    assert inspect.iscoroutinefunction(reward)
    assert asyncio.run(reward(prompts=[PROMPT, PROMPT], completions=messages, **given)) == [3.0, 0.0]
    server.plan.append((422, {"rows": [{"score": None}, {"score": 2.0}]}))
    assert served()(prompts=["hi", "hi"], completions=["abc", "a"], **given) == [None, 2.0]
    assert served().__name__ == "hafrm_reward"


def trainer_of(folder, reward_funcs):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    options = {"output_dir": str(folder / "run"), "report_to": [], "use_cpu": True, "bf16": False}
    return GRPOTrainer(
        model=str(save_tiny_final(folder / "trained")),
        reward_funcs=reward_funcs,
        args=GRPOConfig(**options, num_generations=3, per_device_train_batch_size=3),
        train_dataset=Dataset.from_list([{"prompt": PROMPT}]),
    )


ANSWERS = ["abc", "a", "yes, it is"]
COMPLETIONS = [[{"role": "assistant", "content": answer}] for answer in ANSWERS]


def test_grpo_trainer_asks_the_server(server, tmp_path):
    from hafrm_ds.clients.for_trl import served, served_async

    trainer = trainer_of(tmp_path, [served(), served_async()])
    server.plan += [(422, {"rows": [{"score": 1.0}, {"score": None}, {"score": 3.0}]})]
    rewards = trainer._calculate_rewards([{"prompt": PROMPT}] * 3, [PROMPT] * 3, COMPLETIONS, [[0]] * 3)
    assert rewards[:, 0].tolist() == pytest.approx([1.0, math.nan, 3.0], nan_ok=True)
    assert rewards[:, 1].tolist() == [3.0, 1.0, 10.0]


@pytest.mark.distributed
def test_a_process_beside_a_rank_is_not_partitioned(tmp_path):
    """A composition gives TRL what it gives elsewhere, with DeepSpeed's ZeRO-3 in the process of the trainer."""
    from transformers.integrations import HfDeepSpeedConfig

    from hafrm_ds.clients.for_trl import beside
    from hafrm_ds.rewards.loading import load_reward

    save_tiny_final(tmp_path / "final")
    (tmp_path / "f.py").write_text(
        "def length(prompt, answer):\n    return len(answer) if answer != 'a' else float('nan')"
    )
    (tmp_path / "both.yaml").write_text("ensemble: [final, f.py:length]")
    conversations = [[*PROMPT, *completion] for completion in COMPLETIONS]
    expected = [score.value for score in load_reward(tmp_path / "both.yaml", device="cpu").scores(conversations)]
    assert expected[1] is None
    active = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        reward = beside(tmp_path / "both.yaml")
    finally:
        del active
    values = reward(prompts=[PROMPT] * 3, completions=COMPLETIONS, completion_ids=[[0]] * 3, trainer_state=None)
    assert values == [pytest.approx(expected[0], abs=1e-5), None, pytest.approx(expected[2], abs=1e-5)]


def test_verl(server):
    from hafrm_ds.clients.for_verl import compute_score

    arguments = {"data_source": "hh", "solution_str": "abc", "ground_truth": None}
    assert asyncio.run(compute_score(**arguments, extra_info={"prompt": PROMPT, "index": 3}, url=None)) == 3.0
    with pytest.raises(RewardError, match="has no prompt"):
        asyncio.run(compute_score(**arguments, extra_info={}))


def test_openrlhf(server):
    from hafrm_ds.clients.for_openrlhf import reward_func

    answer = reward_func(["abc"], ["a"], ["72"])
    assert answer == {"rewards": [3.0], "scores": [3.0], "extra_logs": {}}
    assert server.seen[0].body == {"query": ["abc"], "prompts": ["a"], "labels": ["72"]}
    server.plan.append((422, {"error": {"message": "query[0]: the score is not finite"}}))
    with pytest.raises(RewardError, match="not finite"):
        reward_func(["abc"], ["a"], ["72"])


def test_verifiers(server):
    from hafrm_ds.clients.for_verifiers import hafrm_reward

    completion = [{"role": "assistant", "content": "abc"}]
    assert asyncio.run(hafrm_reward(prompt=PROMPT, completion=completion, answer="", info={}, state={})) == 3.0


def pretend(monkeypatch, name: str, **content) -> None:
    """A package that is not installed."""
    whole = ""
    for part in name.split("."):
        whole = f"{whole}.{part}".removeprefix(".")
        monkeypatch.setitem(sys.modules, whole, ModuleType(whole))
    vars(sys.modules[name]).update(content)


def test_swift(server, monkeypatch):
    orms = {}
    pretend(monkeypatch, "swift.rewards", AsyncORM=object, orms=orms)
    monkeypatch.delitem(sys.modules, "hafrm_ds.clients.for_swift", raising=False)
    from hafrm_ds.clients import for_swift

    assert orms == {"hafrm": for_swift.HafrmReward}
    messages = [PROMPT, [*PROMPT, {"role": "assistant", "content": "abc"}]]
    assert asyncio.run(orms["hafrm"]()(["abc", "abc"], messages=messages, solution=[1, 2])) == [3.0, 3.0]
    assert [each["prompt"] for each in server.seen[0].body["rows"]] == [PROMPT, PROMPT]


def test_nemo_rl(server, monkeypatch):
    pretend(monkeypatch, "ray", remote=lambda each: each)
    pretend(
        monkeypatch, "nemo_rl.environments.interfaces", EnvironmentInterface=object, EnvironmentReturn=SimpleNamespace
    )
    from hafrm_ds.clients.for_nemo_rl import HafrmEnvironment

    log = [*PROMPT, {"role": "assistant", "content": "abc", "token_ids": torch.ones(3)}]
    returned = HafrmEnvironment({}).step([log, log], [None, None])
    assert returned.rewards.tolist() == [3.0, 3.0] and returned.terminateds.tolist() == [1.0, 1.0]


def test_skyrl(server, monkeypatch):
    pretend(monkeypatch, "skyrl_gym.envs.base_text_env", BaseTextEnv=object, BaseTextEnvStepOutput=dict)
    from hafrm_ds.clients.for_skyrl import HafrmEnv

    environment = HafrmEnv()
    environment.init(PROMPT)
    assert environment.step("abc") == {"observations": [], "reward": 3.0, "done": True, "metadata": {}}
