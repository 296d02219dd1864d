"""What the server has done, as Prometheus reads it."""

import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from hafrm_ds.serving.dispatcher import Dispatcher

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Seconds of a request."""


@dataclass
class Metrics:
    """Counters of the front.

    requests: (path, status) -> how many. rows, row_errors: conversations asked about, and those without a value.
    seconds: (path, bucket) -> how many requests took no longer.
    """

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    rows: int = 0
    row_errors: int = 0
    in_flight: int = 0
    seconds: Counter[tuple[str, float]] = field(default_factory=Counter)
    total_seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def took(self, path: str, status: int, started: float) -> None:
        """Count a request. started: time.monotonic() when it came."""
        elapsed = time.monotonic() - started
        self.requests[path, status] += 1
        self.total_seconds[path] += elapsed
        for bucket in (*BUCKETS, float("inf")):
            self.seconds[path, bucket] += elapsed <= bucket

    def text(self, dispatcher: Dispatcher) -> str:
        """All of them in Prometheus's text format."""
        lines: list[str] = []

        def add(name: str, kind: str, about: str, values: Mapping[str, float], series: str = "") -> None:
            if not series:
                lines.append(f"# HELP hafrm_{name} {about}")
                lines.append(f"# TYPE hafrm_{name} {kind}")
            lines.extend(f"hafrm_{name}{series}{labels} {value:.12g}" for labels, value in values.items())

        requests = {f'{{path="{path}",status="{status}"}}': n for (path, status), n in sorted(self.requests.items())}
        add("requests_total", "counter", "Requests that were answered.", requests)
        add("request_seconds", "histogram", "Seconds from a request to its answer.", {})
        for path, total in sorted(self.total_seconds.items()):
            label = f'path="{path}"'
            buckets = [*map(str, BUCKETS), "+Inf"]
            counts = {f'{{{label},le="{bucket}"}}': self.seconds[path, float(bucket)] for bucket in buckets}
            add("request_seconds", "", "", counts, "_bucket")
            add("request_seconds", "", "", {f"{{{label}}}": total}, "_sum")
            add("request_seconds", "", "", {f"{{{label}}}": self.seconds[path, float("inf")]}, "_count")
        add("conversations_total", "counter", "Conversations that were asked about.", {"": self.rows})
        add("conversation_errors_total", "counter", "Conversations that could not be scored.", {"": self.row_errors})
        add("tokens_total", "counter", "Tokens of the conversations scored by a model.", {"": dispatcher.tokens})
        add("batches_total", "counter", "Batches that workers were given.", {"": dispatcher.batches})
        add("worker_restarts_total", "counter", "Workers that were started anew.", {"": dispatcher.restarts})
        add("workers_ready", "gauge", "Workers that have loaded the reward.", {"": dispatcher.num_ready})
        add("queue_conversations", "gauge", "Conversations that wait.", {"": len(dispatcher.queue)})
        add("requests_in_flight", "gauge", "Requests that are being answered.", {"": self.in_flight})
        return "\n".join(lines) + "\n"
