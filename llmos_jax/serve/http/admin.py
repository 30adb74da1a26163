"""Routes beside OpenAI's: the web page, its live view, metrics, and what administers a server. No jax."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from llmos_jax.config import UserError
from llmos_jax.serve.http import accounts, audit
from llmos_jax.serve.http.app import secured_router
from llmos_jax.serve.http.errors import ANY_ROUTE, ApiError, bad, declared
from llmos_jax.serve.http.gatekeeper import Gatekeeper
from llmos_jax.serve.http.hooks import ADMIN, METRICS, Caller
from llmos_jax.serve.http.metrics import CONTENT_TYPE, HasStats, Metrics, gather
from llmos_jax.serve.http.schemas import Int

PAGE = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "live.js": "text/javascript; charset=utf-8",
    "plot.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}

Number = Annotated[Int, Field(ge=1, le=2**53)]
Scope = Literal["infer", "admin", "metrics"]
Action = Callable[[], Awaitable[dict[str, Any]]]
ModelAction = Callable[[str], Awaitable[dict[str, Any]]]
AdapterAction = Callable[["AdapterBody"], Awaitable[dict[str, Any]]]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class QuotaBody(Body):
    requests_per_minute: Number | None = None
    tokens_per_minute: Number | None = None
    tokens: Number | None = None
    concurrent: Number | None = None
    kv_bytes: Number | None = None


class KeyBody(Body):
    name: str = Field(min_length=1, max_length=200)
    tenant: str = Field("", max_length=200)
    scopes: list[Scope] = Field(default=["infer"], min_length=1, max_length=8)
    models: list[str] | None = Field(None, max_length=1000)
    expires_in: float | None = Field(None, gt=0, le=1e10, description="seconds")
    priority: Int = Field(0, ge=-1000, le=1000)
    quota: QuotaBody = QuotaBody()


class ModelBody(Body):
    model: str


class AdapterBody(Body):
    model: str
    name: str = Field(min_length=1, max_length=200)
    path: str = Field("", description="where its PEFT files lie, on the server; not needed to unload it")


@dataclass(frozen=True)
class Operations:
    """What the server at hand can do when told to; a route exists for each one given, and for no other.

    Each returns what the caller is told, and raises ApiError or UserError for what it cannot do.
    """

    load_adapter: AdapterAction | None = None
    unload_adapter: AdapterAction | None = None
    load_model: ModelAction | None = None
    unload_model: ModelAction | None = None
    sleep: ModelAction | None = None
    wake: ModelAction | None = None
    drain: Action | None = None


def router(
    gatekeeper: Gatekeeper, clients: Mapping[str, HasStats], database: Path, operations: Operations | None = None
) -> APIRouter:
    """All routes of this file. clients: of each served model, who tells its engine's stats."""

    routes = secured_router(gatekeeper)
    _add_views(routes, gatekeeper.metrics, clients)
    _add_keys(routes, database)
    _add_operations(routes, operations or Operations())

    @routes.get("/admin/audit/verify", tags=["admin"], responses=ANY_ROUTE)
    async def verify_audit() -> dict[str, Any]:
        """Reads the whole audit log: whether it is as it was written, and if not, the first row that is not."""
        if gatekeeper.audit is None:
            raise ApiError(404, "this server keeps no audit log; start it with --audit")
        broken = await asyncio.to_thread(audit.verify, database)
        if broken is not None:
            return {"intact": False, "sequence": broken.sequence, "reason": broken.reason}
        head = await asyncio.to_thread(audit.head, database)
        return {"intact": True, "sequence": head.sequence, "hash": head.hash}

    _add_page(routes)
    return routes


def live(metrics: Metrics, stats: Mapping[str, Mapping[str, Any]], caller: Caller) -> dict[str, Any]:
    """What the page draws. Who may neither administer nor scrape sees its own tenant and models; others are summed.

    time: of day, in seconds. models: each one's stats. latency: see `Metrics.recent`. tenants: tokens served.
    """
    shown = {model: dict(counts) for model, counts in stats.items() if caller.may_use(model)}
    tenants: dict[str, float] = {**metrics.tenants}
    if not caller.scopes & {ADMIN, METRICS}:
        tenants = _own(tenants, caller.tenant)
        for counts in shown.values():
            for name in ("tenant_pages", "tenant_service"):
                if name in counts:
                    counts[name] = _own(counts[name], caller.tenant)
    return {"time": time.time(), "models": shown, "latency": metrics.recent(), "tenants": tenants}


def _own(by_tenant: Mapping[str, float], tenant: str) -> dict[str, float]:
    own = by_tenant.get(tenant, 0)
    return {tenant: own, "(others)": sum(by_tenant.values()) - own}


def _add_views(routes: APIRouter, metrics: Metrics, clients: Mapping[str, HasStats]) -> None:
    @routes.get("/metrics", tags=["metrics"], response_class=Response, responses=ANY_ROUTE | _TEXT)
    async def scrape() -> Response:
        """Metrics in Prometheus's text format."""
        return Response(await metrics.scrape(clients), media_type=CONTENT_TYPE)

    @routes.get("/live", tags=["metrics"], responses=ANY_ROUTE)
    async def view(http: Request) -> dict[str, Any]:
        """The running system as the page shows it."""
        return live(metrics, await gather(clients), http.state.caller)

    @routes.get("/admin/stats", tags=["admin"], responses=ANY_ROUTE)
    async def stats(http: Request) -> dict[str, Any]:
        """The same, of all models and tenants."""
        return live(metrics, await gather(clients), http.state.caller)


def _add_keys(routes: APIRouter, database: Path) -> None:
    @routes.post("/admin/keys", tags=["admin"], status_code=201, responses=ANY_ROUTE | declared(400))
    async def create_key(body: KeyBody) -> dict[str, Any]:
        """Makes a key. It is in the answer, and never to be had again."""
        told = body.model_dump()
        quota = accounts.Quota(**told.pop("quota"))
        return await asyncio.to_thread(accounts.create_key, told.pop("name"), path=database, quota=quota, **told)

    @routes.get("/admin/keys", tags=["admin"], responses=ANY_ROUTE)
    async def list_keys() -> dict[str, Any]:
        """All keys with their use, without the keys themselves."""
        return {"data": await asyncio.to_thread(accounts.list_keys, path=database)}

    @routes.delete("/admin/keys/{id}", tags=["admin"], responses=ANY_ROUTE | declared(404))
    async def revoke_key(id: str) -> dict[str, Any]:
        """Revokes a key, from the next request on."""
        try:
            return await asyncio.to_thread(accounts.revoke_key, id, path=database)
        except UserError as error:
            raise ApiError(404, str(error)) from None


def _add_operations(routes: APIRouter, operations: Operations) -> None:
    def add(method: str, path: str, body: type[BaseModel] | None, run: Callable[..., Awaitable[dict[str, Any]]] | None):
        if run is None:
            return

        async def told(*arguments: Any) -> dict[str, Any]:
            try:
                return await run(*arguments)
            except UserError as error:
                raise bad(str(error)) from None

        async def with_body(body: Any) -> dict[str, Any]:
            return await told(body.model if isinstance(body, ModelBody) else body)

        async def without_body() -> dict[str, Any]:
            return await told()

        if body is not None:
            with_body.__annotations__["body"] = body
        name = f"{method.lower()}{path.replace('/', '_')}"
        route = without_body if body is None else with_body
        routes.add_api_route(
            path, route, methods=[method], tags=["admin"], name=name, responses=ANY_ROUTE | declared(400, 404)
        )

    add("POST", "/admin/adapters", AdapterBody, operations.load_adapter)
    add("DELETE", "/admin/adapters", AdapterBody, operations.unload_adapter)
    add("POST", "/admin/models", ModelBody, operations.load_model)
    add("DELETE", "/admin/models", ModelBody, operations.unload_model)
    add("POST", "/admin/sleep", ModelBody, operations.sleep)
    add("POST", "/admin/wake", ModelBody, operations.wake)
    add("POST", "/admin/drain", None, operations.drain)


def _add_page(routes: APIRouter) -> None:
    folder = files("llmos_jax.serve.http") / "page"
    content = {name: (folder / name).read_bytes() for name in PAGE}

    @routes.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(content["index.html"], media_type=PAGE["index.html"], headers=PAGE_HEADERS)

    @routes.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        if name not in content:
            raise ApiError(404, f"there is no /page/{name}")
        return Response(content[name], media_type=PAGE[name], headers=PAGE_HEADERS)
