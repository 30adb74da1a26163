"""The server as a whole: the engines' supervisor, the routes, keys and log, and an end that loses nothing."""

import asyncio
import contextlib
import ctypes
import dataclasses
import hashlib
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from llmos_jax import opening
from llmos_jax.config import UserError
from llmos_jax.serve import cache, models
from llmos_jax.serve.http import admin
from llmos_jax.serve.http.app import build_app
from llmos_jax.serve.http.database import default_path
from llmos_jax.serve.http.gatekeeper import Gatekeeper
from llmos_jax.serve.http.served import Served
from llmos_jax.serve.supervisor import Supervisor
from llmos_jax.serve.worker import Job

Say = Callable[[str], None]
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of glibc's malloc.h
LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How the server meets the world. jobs: one for each replica, all with the same models."""

    jobs: tuple[Job, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    require_keys: bool = False
    database: Path | None = None
    audit: bool = True
    store_text: bool = False
    certificate: str | None = None
    private_key: str | None = None
    max_body_bytes: int = 8 << 20
    max_requests: int = 4096
    drain_seconds: float = 60.0
    hang_seconds: float = 120.0


class _StatsOf:
    """The stats of one model among those of a supervisor."""

    def __init__(self, supervisor: Supervisor, model: str):
        self._supervisor, self._model = supervisor, model

    async def stats(self) -> dict[str, Any]:
        return (await self._supervisor.stats()).get(self._model, {})


class _Server(uvicorn.Server):
    """A first signal lets running answers finish; a second one ends at once."""

    def __init__(self, config: uvicorn.Config, supervisor: Supervisor, seconds: float, say: Say):
        super().__init__(config)
        self._supervisor, self._seconds, self._say = supervisor, seconds, say
        self._draining: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining is not None or sig == signal.SIGINT:
            super().handle_exit(sig, frame)
            return
        self._say(f"draining: {self._supervisor.num_live} requests are being answered")
        self._draining = asyncio.get_running_loop().create_task(self.drain())

    async def drain(self) -> None:
        await self._supervisor.drain(self._seconds)
        self.should_exit = True


async def serve(settings: Settings, say: Say) -> None:
    """Runs until a signal ends it. Raises UserError where a model cannot be served."""
    _bound_heaps()
    served = {one.name: _served(one) for one in settings.jobs[0].models}
    hashes = {one.name: _model_hash(one) for one in settings.jobs[0].models}
    supervisor = Supervisor(
        list(settings.jobs), most=settings.max_requests, hang_seconds=settings.hang_seconds, say=say
    )
    first = settings.jobs[0].models[0]
    resolved = models.resolve(first, "cpu")
    gate = Gatekeeper.open(
        settings.database,
        require_keys=settings.require_keys,
        local=settings.host in LOCAL,
        page_bytes=cache.page_bytes(resolved.model, resolved.serve),
        log=settings.audit,
        store_text=settings.store_text,
        model_hashes=hashes,
    )
    try:
        await supervisor.start()
        starting = asyncio.create_task(supervisor.wait_ready())
        app = build_app(lambda: served, supervisor, gate, max_body_bytes=settings.max_body_bytes)
        await starting
        server = _server(settings, app, supervisor, gate, served, say)
        say(f"serving {', '.join(served)} at {_address(settings)}")
        await server.serve()
    finally:
        await supervisor.close()
        gate.close()


def _bound_heaps() -> None:
    """Has glibc's malloc keep two heaps, not one a thread, and give buffers from 256 KiB back at once (mallopt(3)).

    Otherwise texts and lists of megabytes, which come and go in many threads, leave holes in all of them.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_ARENA_MAX, 2)
        mallopt(M_MMAP_THRESHOLD, 1 << 18)


def _server(
    settings: Settings, app: FastAPI, supervisor: Supervisor, gate: Gatekeeper, served: Mapping[str, Served], say: Say
) -> _Server:
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.private_key,
        log_level="warning",
        timeout_graceful_shutdown=10,
    )
    server = _Server(config, supervisor, settings.drain_seconds, say)
    if settings.host in LOCAL and not settings.require_keys:
        # A page elsewhere could have its name resolve to this machine, and ask in a browser that is on it.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", "testserver"])
    clients = {name: _StatsOf(supervisor, name) for name in served}
    operations = _operations(supervisor, served, server)
    app.include_router(admin.router(gate, clients, settings.database or default_path(), operations))
    return server


def _operations(supervisor: Supervisor, served: Mapping[str, Served], server: _Server) -> admin.Operations:
    def known(model: str) -> Served:
        if model not in served:
            raise UserError(f"there is no model {model!r}; served: {', '.join(served)}")
        return served[model]

    async def load(body: admin.AdapterBody) -> dict[str, Any]:
        target = known(body.model)
        answer = await supervisor.call("load_adapter", body.model, body.name, body.path)
        target.adapters[body.name] = body.model
        return answer

    async def unload(body: admin.AdapterBody) -> dict[str, Any]:
        target = known(body.model)
        answer = await supervisor.call("unload_adapter", body.model, body.name)
        target.adapters.pop(body.name, None)
        return answer

    async def sleep(model: str) -> dict[str, Any]:
        return await supervisor.call("sleep", known(model).name)

    async def wake(model: str) -> dict[str, Any]:
        return await supervisor.call("wake", known(model).name)

    async def drain() -> dict[str, Any]:
        open_now = supervisor.num_live
        server._draining = asyncio.create_task(server.drain())
        return {"draining": True, "open": open_now}

    return admin.Operations(load_adapter=load, unload_adapter=unload, sleep=sleep, wake=wake, drain=drain)


def _served(wanted: models.ServedModel) -> Served:
    source, model, serve = models.resolve(wanted, "cpu")  # of the platform only the pages' dtype depends
    return Served(wanted.name, opening.tokenizer_of(source), model, serve.max_model_len)


def _model_hash(wanted: models.ServedModel) -> str:
    """Of a pulled model its manifest's; otherwise of its files' names, sizes and times, which change with it."""
    path = Path(opening.find(wanted.reference).path)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    told = [
        (str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()
    ]
    return hashlib.sha256(repr((told, wanted.quantize, wanted.dtype)).encode()).hexdigest()


def _address(settings: Settings) -> str:
    return f"http{'s' if settings.certificate else ''}://{settings.host}:{settings.port}"
