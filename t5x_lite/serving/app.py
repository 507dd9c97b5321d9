"""The routes: HTTP and JSON around a `Host` and the `Worker` that runs it.

| route | takes | gives |
|---|---|---|
| GET / | | the page |
| GET /health | | 200 while the model's thread runs, else 503 |
| GET /api/model | | what the model can do, its adapters, the limits |
| POST /api/generate | `requests.Generate` | a text, or with `stream` a JSON line a piece |
| POST /api/infill | `requests.Generate` | the text with its `<mask>`s filled |
| POST /api/fill_mask | `requests.FillMask` | candidates and probabilities |
| POST /api/embed | `requests.Embed` | vectors and their cosines |

What is refused comes back as `{"error": message}`: 400 no JSON, 404, 405, 408 a body that doesn't
arrive, 413 a body too large, 415 no JSON by its type, 422 what can't be asked of this model, 503
too many at once (with Retry-After) or no model any more, 504 out of time.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.resources
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
from absl import logging
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from t5x_lite.serving import requests
from t5x_lite.serving.hosting import Answer, Host
from t5x_lite.serving.texts import TextStream
from t5x_lite.serving.worker import Full, Stopped, Ticket, Worker
from t5x_lite.types import InputError

T = TypeVar("T")
BODY_SECONDS: Final = 10.0  # for a body to arrive
RETRY_SECONDS: Final = 1
# The page is one file that asks nobody else.
PAGE_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; connect-src 'self'; img-src data:; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
_LOST: Final = 499  # nobody reads this answer


@dataclass(frozen=True)
class Limits:
    """What a client may ask for."""

    body_bytes: int = 1 << 16
    seconds: float = 300.0  # for an answer, waiting included


class Outcomes:
    """What the worker delivers for one ticket, awaited on the event loop. Ends out of time.

    `hand_in` takes the callback to deliver to. Raises what that raises: Full, Stopped.
    """

    def __init__(self, hand_in: Callable[[Callable[[Any], None]], Ticket], seconds: float):
        loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._deadline = loop.time() + seconds

        def deliver(outcome: Any) -> None:
            with contextlib.suppress(RuntimeError):  # a loop closed while the server goes down
                loop.call_soon_threadsafe(self._queue.put_nowait, outcome)

        self.ticket = hand_in(deliver)

    async def next(self) -> Any:
        """The next one. Raises it if it is an exception, and TimeoutError."""
        async with asyncio.timeout_at(self._deadline):
            outcome = await self._queue.get()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


class JsonLines(StreamingResponse):
    """A line of JSON for each record; its ticket is cancelled when nobody reads on."""

    media_type = "application/x-ndjson"

    def __init__(self, records: AsyncIterator[Mapping[str, Any]], ticket: Ticket):
        super().__init__(self._lines(records), headers={"cache-control": "no-store"})
        self._ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.cancel()

    @staticmethod
    async def _lines(records: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[bytes]:
        try:
            async for record in records:
                yield _json_line(record)
        except Exception as error:  # the status is long sent
            yield _json_line({"error": _explain(error)[1]})


class Api:
    """The endpoints."""

    def __init__(self, host: Host, worker: Worker, limits: Limits):
        self._host, self._worker, self._limits = host, worker, limits

    async def page(self, request: Request) -> Response:
        text = importlib.resources.files(__package__).joinpath("page.html").read_text("utf-8")
        return HTMLResponse(text, headers=PAGE_HEADERS)

    async def health(self, request: Request) -> Response:
        alive = self._worker.alive
        record = {"status": "ok" if alive else "stopped", "requests": self._worker.held}
        return JSONResponse(record, status_code=200 if alive else 503)

    async def model(self, request: Request) -> Response:
        limits = {"body_bytes": self._limits.body_bytes, "seconds": self._limits.seconds}
        described = self._host.describe()
        return JSONResponse({**described, "limits": {**described["limits"], **limits}})

    async def generate(self, request: Request) -> Response:
        asked = requests.Generate.read(await self._body(request))
        answer = self._host.generate(asked)
        outcomes = self._start(answer)
        stream = TextStream(answer.decode, asked.stop)
        if asked.stream:
            return JsonLines(_spoken(outcomes, stream), outcomes.ticket)
        return await self._unless_gone(request, outcomes, _last(_spoken(outcomes, stream)))

    async def infill(self, request: Request) -> Response:
        asked = requests.Generate.read(await self._body(request))
        if asked.stream or asked.stop:
            raise InputError("infill neither streams nor stops early: leave stream and stop out")
        answer = self._host.infill(asked)
        outcomes = self._start(answer)

        async def work() -> dict[str, Any]:
            stream = TextStream(answer.decode)
            spoken = await _last(_spoken(outcomes, stream))
            return {**spoken, **answer.record(np.asarray(stream.tokens, np.int32))}

        return await self._unless_gone(request, outcomes, work())

    async def fill_mask(self, request: Request) -> Response:
        asked = requests.FillMask.read(await self._body(request))
        return await self._call(request, self._host.fill_mask(asked))

    async def embed(self, request: Request) -> Response:
        asked = requests.Embed.read(await self._body(request))
        return await self._call(request, self._host.embed(asked))

    def _start(self, answer: Answer) -> Outcomes:
        return Outcomes(
            lambda deliver: self._worker.generate(answer.name, answer.request, deliver),
            self._limits.seconds,
        )

    async def _call(self, request: Request, function: Callable[[], dict[str, Any]]) -> Response:
        outcomes = Outcomes(
            lambda deliver: self._worker.call(function, deliver), self._limits.seconds
        )
        return await self._unless_gone(request, outcomes, outcomes.next())

    async def _unless_gone(
        self, request: Request, outcomes: Outcomes, work: Awaitable[Any]
    ) -> Response:
        """The JSON of what `work` gives; a client that leaves, or no time left, cancels it."""
        working = asyncio.ensure_future(work)
        leaving = asyncio.ensure_future(request.receive())  # the body is read: only the end comes
        try:
            await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                return Response(status_code=_LOST)
            return JSONResponse(working.result())
        finally:
            outcomes.ticket.cancel()
            working.cancel()
            leaving.cancel()

    async def _body(self, request: Request) -> bytes:
        """The body, of at most so many bytes. Raises HTTPException."""
        most = self._limits.body_bytes
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HTTPException(415, f"content-type is '{kind}': expected application/json")
        too_large = HTTPException(413, f"the body is over {most} bytes: shorten it")
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        raise too_large
        except TimeoutError as error:
            raise HTTPException(
                408, f"the body has not arrived within {BODY_SECONDS:g} seconds"
            ) from error
        return bytes(body)


def build(
    host: Host, worker: Worker, limits: Limits = Limits(), hosts: tuple[str, ...] = ("*",)
) -> Starlette:
    """The application.

    Args:
      host: the model.
      worker: runs it.
      limits: see there.
      hosts: the names under which clients may know the server. For one that is on loopback alone,
        the names of loopback: else a page of elsewhere, whose name is made to lead here, may ask.
    """
    api = Api(host, worker, limits)
    routes = [
        Route("/", api.page),
        Route("/health", api.health),
        Route("/api/model", api.model),
        Route("/api/generate", api.generate, methods=["POST"]),
        Route("/api/infill", api.infill, methods=["POST"]),
        Route("/api/fill_mask", api.fill_mask, methods=["POST"]),
        Route("/api/embed", api.embed, methods=["POST"]),
    ]

    async def refuse(request: Request, error: Exception) -> Response:
        status, message = _explain(error)
        path = request.url.path
        if status == 404:
            message = f"there is nothing at {path}; the API is at /api/, the page at /"
        elif status == 405:
            message = f"{path} doesn't take {request.method}"
        headers = dict(getattr(error, "headers", None) or {})  # Allow, of 405
        if isinstance(error, Full):
            headers["retry-after"] = str(RETRY_SECONDS)
        return JSONResponse({"error": message}, status_code=status, headers=headers)

    kinds = (HTTPException, InputError, Full, Stopped, TimeoutError, ClientDisconnect, Exception)
    return Starlette(
        routes=routes,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))],
        exception_handlers=dict.fromkeys(kinds, refuse),
    )


def _explain(error: Exception) -> tuple[int, str]:
    """The status, and what a client is told."""
    match error:
        case HTTPException(status_code=status, detail=detail):
            return status, detail
        case requests.Malformed():
            return 400, str(error)
        case InputError():
            return 422, str(error)
        case Full() | Stopped():
            return 503, str(error)
        case TimeoutError():
            return 504, "no answer in time: ask for fewer tokens, or when fewer others ask"
        case ClientDisconnect():
            return _LOST, "the client has left"
        case _:
            logging.error("a request failed", exc_info=error)
            return 500, "the server failed at this; its log says how"


async def _spoken(outcomes: Outcomes, stream: TextStream) -> AsyncIterator[dict[str, Any]]:
    """`{"piece": text}` as tokens come, then `{"text": all, "finished": why, "tokens": number}`."""
    finished = None
    while finished is None:
        event = await outcomes.next()
        piece = "" if event.token is None else stream.add(event.token)
        if stream.stopped or event.finished is not None:
            piece += stream.rest()
            finished = "stop" if stream.is_cut else event.finished
        if piece:
            yield {"piece": piece}
    outcomes.ticket.cancel()  # after a stop string the engine would go on
    yield {"text": stream.text, "finished": finished, "tokens": len(stream.tokens)}


async def _last(records: AsyncIterator[T]) -> T:
    async for record in records:
        last = record
    return last


def _json_line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"
