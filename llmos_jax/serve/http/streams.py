"""Server-sent events, and clients that leave: noticed while no token flows, and the answer is closed at once."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llmos_jax.serve.http.errors import ApiError, as_api_error

T = TypeVar("T")
Events = AsyncGenerator[str, None]
DONE = "data: [DONE]\n\n"


def event(data: dict[str, Any] | BaseModel, name: str | None = None) -> str:
    """One server-sent event (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""
    value = data.model_dump(mode="json") if isinstance(data, BaseModel) else data
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"event: {name}\ndata: {text}\n\n" if name else f"data: {text}\n\n"


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns; it is cancelled as soon as the client is gone, which raises ApiError 499.

    The body must have been read, or this would read it.
    """
    return await _unless_gone(request.receive, work)


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    task, gone = asyncio.create_task(work), asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client closed the connection")
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A response whose body are `events`, which are closed at its end or as soon as the client is gone.

    An error after the first event cannot change the status any more: it is told as an event of its own, by `failed`.
    """

    media_type = "text/event-stream"

    def __init__(self, events: Events, first: str, failed: Callable[[ApiError], str], last: str = ""):
        self.status_code = 200
        self.background: BackgroundTask | None = None
        self.body = b""
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.events, self.first, self.failed, self.last = events, first, failed, last

    def init_headers(self, headers: Any = None) -> None:
        super().init_headers(headers)
        self.raw_headers = [(name, value) for name, value in self.raw_headers if name != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_gone(receive, self._send_all(send))
        except (ApiError, OSError):
            pass  # the client is gone: there is nobody to tell
        finally:
            await self.events.aclose()

    async def _send_all(self, send: Send) -> None:
        async def write(text: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text.encode("utf-8", "replace"), "more_body": more})

        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await write(self.first)
            async for one in self.events:
                await write(one)
            await write(self.last, more=False)
        except OSError:
            raise
        except Exception as error:
            await write(self.failed(as_api_error(error)))
            await write(self.last, more=False)


async def stream(
    request: Request,
    events: Events,
    failed: Callable[[ApiError], str] = lambda error: event(error.body()),
    last: str = DONE,
) -> EventStream:
    """The response that sends `events`. It waits for the first one: what fails before has its own status.

    Raises what `events` raises until then, and ApiError 499 where the client leaves.
    """
    try:
        first = await while_connected(request, _first(events))
    except BaseException:
        await events.aclose()
        raise
    return EventStream(events, first, failed, last)


async def _first(events: Events) -> str:
    return await anext(events, "")
