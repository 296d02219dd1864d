"""A client of launch/serve.py: rows in, rewards out, with time-outs and retries. It needs Python alone.

    HAFRM_REWARD_URL       where the server is (http://127.0.0.1:5000)
    HAFRM_REWARD_KEY       its key, if it has one
    HAFRM_REWARD_TIMEOUT   seconds of one attempt (120)

A row that cannot be scored, or a server that is gone, is an error, never a 0.
"""

import asyncio
import contextlib
import http.client
import json
import logging
import math
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hafrm_ds.errors import UserError

LONGEST_PAUSE = 30.0
TRANSIENT = (408, 429, 500, 502, 503, 504)
"""Statuses after which another attempt may succeed."""


class RewardError(UserError):
    """There is no reward: the server cannot be reached, or a row cannot be scored."""


@dataclass(frozen=True)
class RewardClient:
    """Asks a server for rewards.

    timeout: seconds of one attempt. attempts: how many a request has.
    """

    url: str = "http://127.0.0.1:5000"
    key: str | None = None
    timeout: float = 120.0
    attempts: int = 6

    @classmethod
    def of(cls, url: str | None = None, key: str | None = None) -> "RewardClient":
        """Of the environment, where nothing is given."""
        environment = os.environ
        return cls(
            url or environment.get("HAFRM_REWARD_URL", cls.url),
            key or environment.get("HAFRM_REWARD_KEY"),
            float(environment.get("HAFRM_REWARD_TIMEOUT", cls.timeout)),
        )

    def scores(self, rows: Sequence[dict[str, Any]]) -> list[float]:
        """The reward of each row (`prompt` and `response`, or `messages`). Raises RewardError if one has none."""
        values, errors = self.ask(rows)
        if errors:
            raise RewardError(f"{self.url}: {len(errors)} of {len(rows)} rows have no reward: {errors[0]}")
        return [value for value in values if value is not None]

    def scores_or_none(self, rows: Sequence[dict[str, Any]]) -> list[float | None]:
        """As `scores`, with None for a row that has none, which is logged. Raises RewardError if nothing has come."""
        values, errors = self.ask(rows)
        for error in errors:
            logging.getLogger(__name__).warning("no reward: %s", error)
        return values

    async def scores_async(self, rows: Sequence[dict[str, Any]]) -> list[float]:
        """As `scores`, beside other coroutines."""
        return await asyncio.to_thread(self.scores, rows)

    async def scores_or_none_async(self, rows: Sequence[dict[str, Any]]) -> list[float | None]:
        """As `scores_or_none`, beside other coroutines."""
        return await asyncio.to_thread(self.scores_or_none, rows)

    def ask(self, rows: Sequence[dict[str, Any]]) -> tuple[list[float | None], list[str]]:
        """Rows -> (the reward of each or None, what is wrong with those without)."""
        if not rows:
            return [], []
        scored = self.post("/score", {"rows": list(rows)}).get("rows")
        if not isinstance(scored, list) or len(scored) != len(rows):
            raise RewardError(f"{self.url} has not answered for each of {len(rows)} rows")
        values: list[float | None] = []
        errors = []
        for number, row in enumerate(scored):
            value = row.get("score")
            is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            values.append(float(value) if is_number else None)
            if not is_number:
                errors.append(row.get("score_error") or f"rows[{number}]: the server gave {value!r}")
        return values, errors

    def post(self, path: str, body: Any) -> Any:
        """The JSON that answers a request, also where rows in it are refused (422). Raises RewardError."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url.rstrip("/") + path, json.dumps(body).encode(), headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxies the environment names
        fault = ""
        for attempt in range(self.attempts):
            pause = min(2.0**attempt, LONGEST_PAUSE) * (0.5 + random.random() / 2)
            try:
                with opener.open(request, timeout=self.timeout) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                content = content_of(error)
                if error.code == 422:
                    with contextlib.suppress(ValueError):  # what stands between may say it in its own words
                        return json.loads(content)
                fault = f"status {error.code}: {content[:500].decode(errors='replace')}"
                if error.code not in TRANSIENT:
                    break
                seconds = error.headers.get("Retry-After", "")
                pause = max(pause, int(seconds) if seconds.isdecimal() else 0)  # else it is a date
            except (OSError, http.client.HTTPException, ValueError) as error:  # URLError and time-outs among them
                fault = f"{type(error).__name__}: {error}"
            if attempt + 1 < self.attempts:
                time.sleep(pause)
        raise RewardError(f"{self.url}{path} gave no reward ({fault})")


def content_of(error: urllib.error.HTTPError) -> bytes:
    """Read the body of an answer with an error; it is empty where the connection has broken off."""
    try:
        return error.read()
    except (OSError, http.client.HTTPException):
        return b""
