"""A chat endpoint on loopback that speaks OpenAI's JSON and answers as a script says."""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import MappingProxyType
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """What a script gives for a request. text: of the message; body: instead of a chat completion."""

    text: str | None = ""
    status: int = 200
    headers: Mapping[str, str] = MappingProxyType({})
    body: bytes | None = None
    finish_reason: str = "stop"
    usage: dict[str, Any] | None = None
    seconds: float = 0.0


Script = Callable[[dict[str, Any]], Answer | str]


class ScriptedEndpoint:
    """url: of its API. requests: the bodies that it got. most_at_once: of them."""

    def __init__(self, script: Script):
        self.script, self.requests, self.now, self.most_at_once = script, [], 0, 0
        self.lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = endpoint.answer(self.path, body)
                content = answer.body
                if content is None:
                    message = {"role": "assistant", "content": answer.text}
                    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason}
                    is_error = answer.status != 200
                    completion = {"object": "x", "choices": [choice], "usage": answer.usage}
                    content = json.dumps({"error": {"message": answer.text}} if is_error else completion).encode()
                try:
                    self.send_response(answer.status)
                    for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:  # the client has given up
                    pass

            def log_message(self, *words: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def answer(self, path: str, body: dict[str, Any]) -> Answer:
        if path != "/v1/chat/completions":
            return Answer(f"no {path}", 404)
        with self.lock:
            self.requests.append(body)
            self.now += 1
            self.most_at_once = max(self.most_at_once, self.now)
        try:
            given = self.script(body)
            answer = Answer(given) if isinstance(given, str) else given
            time.sleep(answer.seconds)
            return answer
        finally:
            with self.lock:
                self.now -= 1


@contextmanager
def scripted(script: Script) -> Iterator[ScriptedEndpoint]:
    endpoint = ScriptedEndpoint(script)
    thread = threading.Thread(target=endpoint.server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.server.shutdown()
        endpoint.server.server_close()


def last_said(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"]


def in_turn(*answers: Answer | str) -> Script:
    """One answer after another, the last for ever."""
    left, lock = list(answers), threading.Lock()

    def script(body: dict[str, Any]) -> Answer | str:
        with lock:
            return left.pop(0) if len(left) > 1 else left[0]

    return script
