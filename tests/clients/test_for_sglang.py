"""The reward that is put together from an engine's states, against the model itself; the engine is an imitation."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from hafrm_ds.clients.client import RewardError
from hafrm_ds.clients.for_sglang import Engine
from hafrm_ds.errors import ModelError
from hafrm_ds.saved.reward_model import HybridRewardModel
from tests.tiny_models import save_tiny_final

PROMPT = [{"role": "user", "content": "how are you?"}]


@pytest.fixture(params=[False, True], ids=["no bias", "bias"])
def final(tmp_path, request):
    return save_tiny_final(tmp_path / "final", bias=request.param)


@pytest.fixture
def sglang(final):
    """`/generate` as SGLang 0.5.23 answers it. sent: what stands in place of the last state; None: that itself."""
    model = AutoModelForCausalLM.from_pretrained(final)
    set_up = SimpleNamespace(sent=None, seen=[])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            set_up.seen.append(body)
            if body.get("return_hidden_states") == "last":
                with torch.no_grad():
                    [states] = model.model(torch.tensor([body["input_ids"]])).last_hidden_state.tolist()
                sent = states[-1] if set_up.sent is None else set_up.sent
                reply = {"text": "x", "meta_info": {"hidden_states": sent}}
            else:
                reply = [{"text": f" answer {number}"} for number in range(body["sampling_params"]["n"])]
            content = json.dumps(reply).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    set_up.engine = Engine.open(final, f"http://127.0.0.1:{listening.server_port}")
    yield set_up
    listening.shutdown()
    listening.server_close()


def test_scores_are_those_of_the_model(final, sglang):
    conversations = [[*PROMPT, {"role": "assistant", "content": "fine, " * number}] for number in range(1, 6)]
    expected = HybridRewardModel.from_pretrained(final).score(conversations)
    assert [score.value for score in sglang.engine.scores(conversations)] == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 5


def test_answers_continue_the_rendered_prompt(sglang):
    assert sglang.engine.answers(PROMPT, 2, temperature=0.5) == ["answer 0", "answer 1"]
    [asked] = sglang.seen
    assert asked["input_ids"] == sglang.engine.formatter.encode_prompt(PROMPT)
    assert asked["sampling_params"] == {"n": 2, "temperature": 0.5}


@pytest.mark.parametrize("sent", [[], [1.0, 2.0], [[1.0] * 32] * 2, ["x"], "x"])
def test_a_server_without_states_gives_no_reward(sglang, sent):
    sglang.sent = sent
    with pytest.raises(RewardError, match="--return-hidden-states-mode last"):
        sglang.engine.scores([[*PROMPT, {"role": "assistant", "content": "fine"}]])


def test_messages_are_read_as_those_of_a_file_are(sglang):
    said = {"role": "gpt", "content": [{"type": "text", "text": "fine"}]}
    first, second, third = sglang.engine.scores(
        [[*PROMPT, said], [*PROMPT, {"role": "assistant", "content": "fine"}], [*PROMPT, {"role": "assistant"}]]
    )
    assert first == second and first.value is not None
    assert third.error.startswith("the conversation: message 2 of field 'messages' is an object with the keys role")


def test_a_conversation_that_is_too_long_has_an_error_and_the_next_a_value(sglang):
    long, short = ([*PROMPT, {"role": "assistant", "content": "a" * length}] for length in (600, 3))
    first, second = sglang.engine.scores([long, short])
    assert first.value is None and "tokens" in first.error and second.value is not None


def test_a_head_that_was_not_trained_is_refused(tmp_path):
    final = save_tiny_final(tmp_path / "dpo", objective={"rm_weight": 0})
    with pytest.raises(ModelError, match="no reward head"):
        Engine.open(final)
