"""The front of the server: HTTP in, HTTP out. It checks a request, hands it to the dispatcher and writes the answer."""

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from hafrm_ds.serving.dispatcher import Dispatcher, QueueFull, WorkerFailed
from hafrm_ds.serving.metrics import Metrics
from hafrm_ds.serving.openapi import description
from hafrm_ds.serving.options import ServingOptions
from hafrm_ds.serving.page import page
from hafrm_ds.serving.protocols import ROUTES, Asked, BadRequest
from hafrm_ds.serving.worker import Answer

BODY_SECONDS = 30.0
"""So long may a client take to send a request."""
RETRY_SECONDS = 1
"""After which a client that met a full queue may come again."""
LEFT = 499
"""Status, for the metrics, of a request whose client has left."""


class Reply(JSONResponse):
    """JSON in ASCII, in which a row's own fields go back as they came, half of a surrogate pair or NaN among them."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode()


class Refused(Exception):
    """A request that is not scored, with the response for it. rows: those that are to blame. body: what is said beside
    the error."""

    def __init__(self, status: int, message: str, rows: list[dict] | None = None, body: dict | None = None):
        super().__init__(message)
        headers = {"Retry-After": str(RETRY_SECONDS)} if status == 503 else {}
        headers |= {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        error = {"message": message, "code": status} | ({"rows": rows} if rows else {})
        self.response = Reply((body or {}) | {"error": error}, status, headers)


@dataclass
class Front:
    """The application.

    judges: what GET /model says of them. key: what a request must bring; None if everybody is served. is_draining: only
    what has come already is answered.
    """

    options: ServingOptions
    judges: dict[str, Any]
    dispatcher: Dispatcher
    key: str | None
    metrics: Metrics = field(default_factory=Metrics)
    is_draining: bool = False

    def application(self) -> Starlette:
        routes = [Route(path, self.counted(self.scored), methods=["POST"]) for path in ROUTES]
        routes += [
            Route("/health", self.health),
            Route("/metrics", self.counted(self.told)),
            Route("/model", self.counted(self.model)),
            Route("/openapi.json", self.openapi),
        ]
        if self.options.page:
            routes.append(Route("/", page))
        return Starlette(routes=routes)

    def counted(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """A handler whose requests are checked and counted."""

        async def counting(request: Request) -> Response:
            started, status = time.monotonic(), 500
            self.metrics.in_flight += 1
            try:
                self.check_key(request)
                response = await handler(request)
                status = response.status_code
                return response
            except Refused as refused:
                status = refused.response.status_code
                return refused.response
            except ClientDisconnect:
                status = LEFT
                return Response(status_code=LEFT)  # which nobody reads
            finally:
                self.metrics.in_flight -= 1
                self.metrics.took(request.url.path, status, started)

        return counting

    def check_key(self, request: Request) -> None:
        """Raises Refused unless the request brings the key."""
        if self.key is None:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else request.query_params.get("key", "")
        if not hmac.compare_digest(given.encode(), self.key.encode()):
            raise Refused(401, "the key is missing or wrong: send Authorization: Bearer KEY, or ?key=KEY in the URL")

    # ---- scoring -----------------------------------------------------------------------------------------------------

    async def scored(self, request: Request) -> Response:
        """Any of ROUTES. Raises Refused."""
        if self.is_draining:
            raise Refused(503, "the server is being stopped")
        body = await self.body_of(request)
        try:
            asked = ROUTES[request.url.path](json.loads(body), self.options)
        except BadRequest as error:
            raise Refused(400, str(error)) from error
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is no JSON that can be read: {error}") from error
        if len(asked.items) > self.options.max_queue:
            raise Refused(413, f"a request may hold {self.options.max_queue:,} conversations (--max_queue)")
        self.metrics.rows += len(asked.items) + len(asked.faults)
        if asked.faults and asked.write_rows is None:  # a request that fails costs nobody a forward
            self.metrics.row_errors += len(asked.faults)
            raise bad_rows(asked.faults)
        written, faults = asked.response(await self.answers(request, asked))
        self.metrics.row_errors += len(faults)
        if faults:
            raise bad_rows(faults, written or {})
        return Reply(written)

    async def answers(self, request: Request, asked: Asked) -> list[Answer]:
        """What the workers say. Raises Refused, or ClientDisconnect as soon as the client has left."""
        asking = asyncio.ensure_future(self.dispatcher.ask(asked.kind, asked.items))
        leaving = asyncio.ensure_future(request.receive())  # all of the body has come: what comes is its leaving
        try:
            await asyncio.wait({asking, leaving}, timeout=self.options.timeout, return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                return asking.result()
        except QueueFull as error:
            raise Refused(503, f"{self.options.max_queue:,} conversations wait already (--max_queue)") from error
        except WorkerFailed as error:
            raise Refused(500, str(error)) from error
        finally:
            asking.cancel()
            leaving.cancel()
        if leaving.done():
            raise ClientDisconnect
        raise Refused(504, f"no answer within {self.options.timeout:g} seconds (--timeout)")

    async def body_of(self, request: Request) -> bytes:
        """Raises Refused if it is too large or comes too slowly. What is too large is read to its end and thrown away,
        as a client that still sends would not see the answer."""
        limit = int(self.options.max_body_mb * 1e6)
        received = bytearray()
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    size += len(chunk)
                    received += chunk if size <= limit else b""
        except TimeoutError as error:
            raise Refused(408, f"the body did not come within {BODY_SECONDS:g} seconds") from error
        if size > limit:
            raise Refused(413, f"the body has {size:,} bytes, more than {limit:,} (--max_body_mb)")
        return bytes(received)

    # ---- about the server --------------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        """200 where requests are answered; 503 while the reward is being loaded, or the server stopped."""
        ready, number = self.dispatcher.num_ready, self.dispatcher.num_workers
        status = "stopping" if self.is_draining else "ok" if ready else "loading"
        body = {"status": status, "workers_ready": ready, "workers": number, "model": str(self.options.model)}
        return JSONResponse(body, 200 if status == "ok" else 503)

    async def told(self, request: Request) -> Response:
        return PlainTextResponse(self.metrics.text(self.dispatcher), media_type="text/plain; version=0.0.4")

    async def model(self, request: Request) -> Response:
        return JSONResponse(self.judges)

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(description())


def bad_rows(faults: dict[str, str], body: dict | None = None) -> Refused:
    """The response that names the rows which cannot be scored."""
    rows = [{"row": place, "error": error.removeprefix(f"{place}: ")} for place, error in faults.items()]
    first = rows[0]
    more = f" (and {len(rows) - 1:,} more)" if len(rows) > 1 else ""
    return Refused(422, f"{first['row']}: {first['error']}{more}", rows, body)
