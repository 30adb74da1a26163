"""The application: the OpenAI-compatible routes, behind keys, over a client of the engine."""

import logging
import time
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from llmos_jax import __version__
from llmos_jax.serve.http import errors, prompting, served
from llmos_jax.serve.http.chat import chat
from llmos_jax.serve.http.completions import completions
from llmos_jax.serve.http.embeddings import embed
from llmos_jax.serve.http.errors import ANY_ROUTE, ENGINE_ROUTE, ApiError, bad, declared
from llmos_jax.serve.http.hooks import Caller, Hooks, NullHooks
from llmos_jax.serve.http.responses import Store, respond
from llmos_jax.serve.http.responses_schemas import Deleted, Response, ResponseBody
from llmos_jax.serve.http.schemas import (
    ChatBody,
    ChatCompletion,
    Completion,
    CompletionBody,
    DetokenizeBody,
    Detokenized,
    EmbeddingBody,
    Embeddings,
    Health,
    ModelCard,
    ModelList,
    TokenizeBody,
    Tokenized,
)
from llmos_jax.serve.http.served import Client, Served, Service

__all__ = ["Client", "Served", "build_app", "secured_router"]

MAX_BODY_BYTES = 8 << 20
log = logging.getLogger(__name__)
_EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}
_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"itemSchema": _EVENT}}, "description": "The answer"}
}


def build_app(
    served: Callable[[], dict[str, Served]],
    client: Client,
    hooks: Hooks | None = None,
    *,
    max_body_bytes: int = MAX_BODY_BYTES,
    title: str = "llmos",
) -> FastAPI:
    """The OpenAI-compatible server.

    Args:
      served: the models by name, as they are now.
      client: the engine. Where it has a coroutine `ready() -> bool`, /ready asks it; otherwise its `stats` must answer.
      hooks: keys, quotas, audit and metrics; None lets everybody do everything.
      max_body_bytes: larger bodies are refused with 413.
    """
    service = Service(served, client, hooks or NullHooks())
    app = FastAPI(title=title, version=__version__, openapi_url=None, docs_url=None, redoc_url=None)
    errors.install(app)
    app.add_middleware(errors.BodyLimit, max_bytes=max_body_bytes)
    app.include_router(_health(client))
    app.include_router(_answering(service))
    app.include_router(_listing(service))
    app.include_router(_document(app, service, secured=hooks is not None))
    return app


def secured_router(hooks: Hooks) -> APIRouter:
    """A router each of whose routes asks `hooks` for the caller, before anything of the body is looked at.

    The caller is `request.state.caller`. JSON is read strictly (`errors.strict_json`).
    """

    class Secured(APIRoute):
        def get_route_handler(self) -> Callable:
            handler = super().get_route_handler()

            async def secured(request: Request) -> Any:
                strict = _StrictRequest(request.scope, request.receive)
                strict.state.caller = hooks.authorize(request.headers.get("authorization"), request.url.path)
                return await handler(strict)

            return secured

    return APIRouter(route_class=Secured)


class _StrictRequest(Request):
    async def json(self) -> Any:
        return errors.strict_json(await self.body())


def _caller(http: Request) -> Caller:
    return http.state.caller


def _answering(service: Service) -> APIRouter:
    router, store = secured_router(service.hooks), Store()

    @router.post("/v1/chat/completions", response_model=ChatCompletion, responses=ENGINE_ROUTE | _EVENTS)
    async def chat_completions(body: ChatBody, http: Request) -> Any:
        return await chat(service, _caller(http), body, http)

    @router.post("/v1/completions", response_model=Completion, responses=ENGINE_ROUTE | _EVENTS)
    async def text_completions(body: CompletionBody, http: Request) -> Any:
        return await completions(service, _caller(http), body, http)

    @router.post("/v1/responses", response_model=Response, responses=ENGINE_ROUTE | _EVENTS)
    async def create_response(body: ResponseBody, http: Request) -> Any:
        return await respond(service, store, _caller(http), body, http)

    @router.get("/v1/responses/{id}", response_model=Response, responses=ANY_ROUTE | declared(400, 404))
    async def get_response(id: str, http: Request) -> Any:
        return store.get(_caller(http).tenant, id).response

    @router.delete("/v1/responses/{id}", response_model=Deleted, responses=ANY_ROUTE | declared(400, 404))
    async def delete_response(id: str, http: Request) -> Any:
        store.drop(_caller(http).tenant, id)
        return Deleted(id=id)

    @router.post("/v1/embeddings", response_model=Embeddings, responses=ENGINE_ROUTE)
    async def embeddings(body: EmbeddingBody, http: Request) -> Any:
        return await embed(service, _caller(http), body, http)

    return router


def _listing(service: Service) -> APIRouter:
    router, created = secured_router(service.hooks), int(time.time())

    def cards(caller: Caller) -> dict[str, ModelCard]:
        found = {}
        for one in service.served().values():
            for name in (one.name, *one.adapters):
                found[name] = ModelCard(
                    id=name,
                    object="model",
                    created=created,
                    owned_by="llmos",
                    root=one.name,
                    parent=None if name == one.name else one.name,
                    max_model_len=one.max_model_len,
                )
        return {name: card for name, card in found.items() if caller.may_use(name)}

    @router.get("/v1/models", response_model=ModelList, responses=ANY_ROUTE)
    async def list_models(http: Request) -> Any:
        return ModelList(object="list", data=list(cards(_caller(http)).values()))

    @router.get("/v1/models/{id:path}", response_model=ModelCard, responses=ANY_ROUTE | declared(400, 404))
    async def get_model(id: str, http: Request) -> Any:
        found = cards(_caller(http))
        if id not in found:
            raise ApiError(404, f"there is no model {id!r}; served: {', '.join(found)}", code="model_not_found")
        return found[id]

    @router.post("/tokenize", response_model=Tokenized, responses=ANY_ROUTE | declared(400, 404))
    async def tokenize(body: TokenizeBody) -> Any:
        target = service.target(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise bad("give either prompt or messages", "prompt")
        if body.messages is not None:
            messages = prompting.as_template_takes(body.messages)
            tokens = await prompting.conversation(target, messages, [], body.add_generation_prompt is not False)
        elif body.add_special_tokens is False:
            tokens = target.tokenizer.encode(body.prompt or "")
        else:
            tokens = await served.encoded(target.tokenizer, body.prompt or "")
        return Tokenized(tokens=tokens, count=len(tokens), max_model_len=target.served.max_model_len)

    @router.post("/detokenize", response_model=Detokenized, responses=ANY_ROUTE | declared(400, 404))
    async def detokenize(body: DetokenizeBody) -> Any:
        target = service.target(body.model)
        tokens = served.check_tokens(target, body.tokens, "tokens")
        return Detokenized(prompt=target.tokenizer.decode(tokens, skip_special=False))

    return router


def _health(client: Client) -> APIRouter:
    router = APIRouter()

    @router.get("/health", response_model=Health, responses=declared(500))
    async def health() -> Any:
        return Health(status="ok")

    @router.get("/ready", response_model=Health, responses=declared(500, 503))
    async def ready() -> Any:
        try:
            ask = getattr(client, "ready", None)
            is_ready = await ask() if ask is not None else await client.stats() is not None
        except Exception:
            log.exception("the engine did not say whether it is ready")
            is_ready = False
        if not is_ready:
            raise ApiError(503, "the engine makes no progress at the moment", retry_after=1)
        return Health(status="ready")

    return router


def _document(app: FastAPI, service: Service, secured: bool) -> APIRouter:
    """GET /openapi.json, made when it is first asked for, so that routes added later are in it."""
    router = secured_router(service.hooks)
    made: dict[str, Any] = {}

    @router.get("/openapi.json", include_in_schema=False)
    async def openapi() -> JSONResponse:
        if not made:
            made.update(_openapi(app, secured))
        return JSONResponse(made)

    return router


def _openapi(app: FastAPI, secured: bool) -> dict[str, Any]:
    """FastAPI's document, without the 422 that we answer with 400, and with the key that routes ask for."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if secured and path not in ("/health", "/ready"):
                operation["security"] = [{"key": []}]
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    if secured:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document
