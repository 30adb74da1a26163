"""Engines of small models for tests, and how to drive them."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from llmos_jax.config import ModelConfig, ServeConfig
from llmos_jax.models.decoder import abstract_params
from llmos_jax.serve.block_manager import BlockManager
from llmos_jax.serve.engine import Engine
from llmos_jax.serve.limits import Costs, Limits
from llmos_jax.serve.request import Output, Request, Sampling
from llmos_jax.serve.runner import Runner
from llmos_jax.serve.scheduler import Scheduler
from llmos_jax.serve.weights import served_params
from tests import tiny

MODEL = tiny.model(max_seq_len=128, num_kv_heads=4, dtype="float32", param_dtype="float32")
SERVE = ServeConfig(
    max_model_len=96, max_sequences=4, max_step_tokens=32, page_size=4, num_pages=96, kv_dtype="float32"
)


def runner(model: ModelConfig = MODEL, serve: ServeConfig = SERVE, mesh: Any = None, seed: int = 0) -> Runner:
    mesh = mesh or tiny.mesh()
    plain = dataclasses.replace(model, quantize="none")
    places = abstract_params(plain, mesh)
    params = {path: jax.device_put(x, places[path].sharding) for path, x in tiny.params(plain, seed).items()}
    built = Runner(model, serve, mesh, lambda: served_params(model, params, mesh))
    built.allocate(built.calibrate(list(range(1, 65))) if serve.kv_dtype in ("int8", "float8_e4m3fn") else None)
    built.warm_up()
    return built


def engine(built: Runner, num_pages: int | None = None, chunk: int = 0, host_pages: int = 0, **options: Any) -> Engine:
    """A fresh engine over a runner. With host pages, swapping is always the cheaper way to preempt."""
    serve = built.serve
    limits = Limits(serve.max_step_tokens, built.max_rows, serve.max_sequences, built.max_model_len, chunk)
    costs = Costs(1.0, 1e15, 1) if host_pages else None
    blocks = BlockManager(num_pages or serve.num_pages, serve.page_size, host_pages)
    return Engine(built, Scheduler(limits, blocks, costs), **options)


def request(id: str, prompt: Iterable[int], max_tokens: int = 12, **fields: Any) -> Request:
    names = {field.name for field in dataclasses.fields(Request)}
    own = {name: fields.pop(name) for name in list(fields) if name in names}
    sampling = Sampling(max_tokens, **{"temperature": 0.0, **fields})
    return Request(id, tuple(prompt), sampling, **own)


def drive(engine: Engine, requests: Iterable[Request], every: int = 0) -> dict[tuple[str, int], list[Output]]:
    """Adds the requests, one after each `every` steps or all at once, and runs until nothing is left."""
    told: dict[tuple[str, int], list[Output]] = {}
    waiting = list(requests)
    steps = 0
    while waiting or engine.has_work:
        while waiting and (not every or steps % every == 0 or not engine.has_work):
            engine.add(waiting.pop(0))
            if every:
                break
        for output in engine.step():
            told.setdefault((output.id, output.index), []).append(output)
        steps += 1
        assert steps < 20_000
    return told


def tokens(told: Mapping[tuple[str, int], list[Output]]) -> dict[tuple[str, int], list[int]]:
    return {key: [token for output in outputs for token in output.tokens] for key, outputs in told.items()}
