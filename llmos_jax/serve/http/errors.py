"""Errors as OpenAI's API writes them: {"error": {"message", "type", "param", "code"}}, whatever went wrong."""

import asyncio
import contextlib
import json
import logging
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmos_jax.config import UserError

LINGER_SECONDS = 30.0
log = logging.getLogger(__name__)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    499: "client_closed_request",
    503: "service_unavailable",
    504: "timeout_error",
}


class ApiError(Exception):
    """An answer that is an error. status: of HTTP; message: one sentence for the user; retry_after: seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str | None = None,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.type = type or _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        told = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": told}

    def response(self, headers: dict[str, str] | None = None) -> JSONResponse:
        headers = dict(headers or {})
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


_WHAT = {
    400: "The request is malformed, or asks for what the model cannot do",
    401: "No valid key was given",
    403: "The key does not cover this",
    404: "There is no such model or object",
    413: "The body is too large",
    429: "A quota or limit is reached, or the server is full; see Retry-After",
    500: "The server failed",
    503: "The engine is not there at the moment",
    504: "The request was not begun before its deadline",
}


def declared(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error responses of a route, for the OpenAPI document."""
    return {status: {"model": ErrorBody, "description": _WHAT[status]} for status in statuses}


ANY_ROUTE = declared(401, 403, 413, 500)
ENGINE_ROUTE = declared(400, 401, 403, 404, 413, 429, 500, 503, 504)


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def as_api_error(error: BaseException) -> ApiError:
    """What a client is told of `error`; the log has the rest."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return bad(str(error))
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed to answer this request; its log says why")


def of_validation(error: RequestValidationError) -> ApiError:
    """One of pydantic's findings: the field by its path, and what is wrong with it.

    Where a field may be of several types there is a finding for each; the one that goes deepest is of the type meant.
    """
    found = max(error.errors(), key=lambda one: (len(one["loc"]), not one["type"].endswith("_type")))
    place = [part for part in found["loc"] if part not in ("body", "query", "path")]
    if found["type"] == "json_invalid":
        return bad(f"the body is not JSON: {found.get('ctx', {}).get('error', 'it cannot be parsed')}")
    if not place:
        return bad("the body must be a JSON object, sent with Content-Type: application/json")
    # A path through a union names its branches, which are no fields: keep to names and numbers.
    names = [str(part) for part in place if isinstance(part, int) or part.isidentifier()]
    path = ".".join(names).encode("utf-8", "replace").decode()
    return bad(f"{path}: {found['msg'].encode('utf-8', 'replace').decode()}", param=path)


def install(app: FastAPI) -> None:
    """Makes every error of `app` one of ours."""

    @app.exception_handler(ApiError)
    async def _(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(UserError)
    async def _(request: Request, error: UserError) -> JSONResponse:
        return bad(str(error)).response()

    @app.exception_handler(RecursionError)
    async def _(request: Request, error: RecursionError) -> JSONResponse:
        return bad("the body is nested too deeply").response()

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        return of_validation(error).response()

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        message = {404: f"there is no {request.url.path}", 405: f"{request.url.path} does not take {request.method}"}
        told = message.get(error.status_code, str(error.detail))
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(_methods(request))
        return ApiError(error.status_code, told).response(headers)

    @app.exception_handler(Exception)
    async def _(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()


def _methods(request: Request) -> list[str]:
    """What the path takes. The framework tells the methods of its first route only."""
    known = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
    scopes = {method: dict(request.scope) | {"method": method} for method in known}
    routes = request.app.routes
    return [name for name, scope in scopes.items() if any(one.matches(scope)[0] is Match.FULL for one in routes)]


class BodyLimit:
    """ASGI middleware: a body of more than `max_bytes` is answered with 413, whether its length was told or not.

    The rest of such a body is thrown away, for half a minute at most, then the connection is closed: were it closed at
    once, the client, which is still sending, would see a broken connection in place of the answer.
    """

    def __init__(self, app: ASGIApp, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if told.isdigit() and int(told) > self.max_bytes:
            return await self._refuse(scope, receive, send)
        seen, started = 0, False

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self.max_bytes:
                    raise _TooLargeError
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            # What the routes made of the broken-off body is not sent: the client is told the reason.
            if seen > self.max_bytes and not started:
                raise _TooLargeError
            started = True
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except _TooLargeError:
            await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = ApiError(413, f"the body is larger than the {self.max_bytes} bytes that this server takes")
        response = error.response({"Connection": "close"})
        await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
        await send({"type": "http.response.body", "body": response.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                while (await receive()).get("more_body"):
                    pass
        await send({"type": "http.response.body"})


class _TooLargeError(Exception):
    pass


def strict_json(body: bytes) -> Any:
    """The JSON in `body`. Raises ApiError 400 for what Python's own reader would let pass or stumble over.

    That is NaN and infinities, numbers of thousands of digits, bytes that are no UTF-8, halves of surrogate pairs,
    which no tokenizer takes, and nesting that exhausts the stack.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON number")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=refuse, parse_float=_finite)
        if rb"\u" in body:  # only an escape can make a lone surrogate
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeEncodeError:
        raise bad(r"the body has half of a surrogate pair (\ud800 to \udfff alone), which is no character") from None
    except UnicodeDecodeError as error:
        raise bad(f"the body is not UTF-8: byte {error.start} cannot be read") from None
    except RecursionError:
        raise bad("the body is nested too deeply") from None
    except ValueError as error:
        raise bad(f"the body is not JSON: {error}") from None


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text[:20]} is too large a number")
    return value
