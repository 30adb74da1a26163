"""From a name to an engine: finds a model, reads its weights, sizes its pages, and compiles its programs."""

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from llmos_jax import opening
from llmos_jax.compiler.target import Target
from llmos_jax.config import MeshConfig, ModelConfig, ServeConfig, UserError, mesh_shape
from llmos_jax.data.tokenizer import Tokenizer
from llmos_jax.models.decoder import Unstacked
from llmos_jax.models.quantized import check_quantize
from llmos_jax.serve import cache
from llmos_jax.serve.block_manager import BlockManager
from llmos_jax.serve.draft import DraftModel
from llmos_jax.serve.engine import Engine
from llmos_jax.serve.limits import Costs, Limits
from llmos_jax.serve.request import Token
from llmos_jax.serve.runner import Runner, fit_pages
from llmos_jax.serve.scheduler import Scheduler
from llmos_jax.serve.structured import Vocabulary
from llmos_jax.serve.weights import abstract_served_params, served_params
from llmos_jax.sharding import make_mesh
from pallas_kernels.native import native

Say = Callable[[str], None]
CALIBRATION = """The capital of France is Paris, and 3 times 17 is 51. "Where were you?" she asked; nobody knew.
def mean(values: list[float]) -> float:
    return sum(values) / len(values)  # fails for an empty list
{"name": "Ada", "born": 1815, "languages": ["English", "fran\u00e7ais", "\u4e2d\u6587"]}
1. Water boils at 100 \u00b0C at sea level. 2. Light travels 299,792,458 metres a second.
"""
CPU_POOL_BYTES = 2 << 30  # a CPU's memory is everybody's: its pages take no more, unless num_pages says so


class ServedModel(NamedTuple):
    """What is to be served. name: as clients call it. reference: where it is."""

    name: str
    reference: str
    serve: ServeConfig = ServeConfig()
    dtype: str = ""
    quantize: str = "none"


class Resolved(NamedTuple):
    """The model with all that needs no weights."""

    source: opening.Source
    model: ModelConfig
    serve: ServeConfig


def resolve(wanted: ServedModel, platform: str) -> Resolved:
    """Raises UserError where there is no such model or the settings do not fit it."""
    source = opening.find(wanted.reference)
    dtype = wanted.dtype or default_dtype(platform)
    model = dataclasses.replace(opening.for_inference(source.model, dtype), quantize=wanted.quantize)
    if platform == "cpu" and wanted.quantize == "int8" and not wanted.dtype:
        # Products take int8 anyway, and what lies between them is faster in float32; see also cache.resolve_kv_dtype.
        model = dataclasses.replace(model, dtype="float32")
    serve = cache.resolve_kv_dtype(model, wanted.serve)
    length = serve.max_model_len or model.max_seq_len
    if length > model.max_seq_len:
        raise UserError(f"max_model_len={length} is more than the model's context, {model.max_seq_len}; lower it")
    if not serve.max_sequences <= serve.max_step_tokens:
        raise UserError(
            f"max_step_tokens={serve.max_step_tokens} is less than max_sequences={serve.max_sequences}, and every "
            "running sequence takes a token in each step; raise it"
        )
    return Resolved(source, model, dataclasses.replace(serve, max_model_len=length))


def default_dtype(platform: str) -> str:
    """bfloat16, but float32 on a CPU that has no products of it: neither kernels of ours nor instructions for XLA's."""
    if platform != "cpu" or not native().missing:
        return "bfloat16"
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def build_engine(
    wanted: ServedModel, mesh_config: MeshConfig, say: Say = lambda _: None, poison: tuple[Token, ...] = ()
) -> Engine:
    """An engine that is ready: compiled, its memory taken. Raises UserError where the model does not fit."""
    started = time.perf_counter()
    mesh = _mesh(mesh_config)
    platform = mesh.devices.flat[0].platform
    source, model, serve = resolve(wanted, platform)
    check_quantize(model, mesh.shape["tensor"])
    tokenizer = opening.tokenizer_of(source)
    serve = _sized(model, serve, mesh)
    say(f"{wanted.name}: {serve.num_pages} pages of {serve.page_size} tokens; reading weights and compiling")
    runner = Runner(model, serve, mesh, _reader(source, model, mesh), say)
    quantized_pages = cache.page_dtype(serve).itemsize == 1
    runner.allocate(runner.calibrate(_calibration(tokenizer, serve)) if quantized_pages else None)
    seconds = runner.warm_up()
    draft = _draft_model(serve, model, mesh, wanted.dtype, say) if serve.draft_model else None
    engine = Engine(runner, _scheduler(model, serve, seconds), _vocabulary(tokenizer, model), draft, poison)
    say(f"{wanted.name} is ready after {time.perf_counter() - started:.1f} s")
    return engine


def _draft_model(serve: ServeConfig, model: ModelConfig, mesh: Mesh, dtype: str, say: Say) -> DraftModel:
    """Raises UserError where it has another vocabulary."""
    platform = mesh.devices.flat[0].platform
    wanted = ServedModel(
        "draft", serve.draft_model, dataclasses.replace(serve, max_model_len=0, kv_dtype="auto"), dtype
    )
    source, small, sizes = resolve(wanted, platform)
    if small.vocab_size != model.vocab_size:
        raise UserError(
            f"the draft model has {small.vocab_size} tokens and the model {model.vocab_size}; use one with the same ones"
        )
    if small.max_seq_len < serve.max_model_len:
        raise UserError(
            f"the draft model's context is {small.max_seq_len}, less than max_model_len={serve.max_model_len}; lower it"
        )
    sizes = dataclasses.replace(
        sizes, max_model_len=serve.max_model_len, num_pages=serve.num_pages, num_drafts=0, max_adapters=0
    )
    runner = Runner(small, sizes, mesh, _reader(source, small, mesh), say)
    runner.allocate()
    runner.warm_up()
    return DraftModel(runner, serve.num_drafts)


def _reader(source: opening.Source, model: ModelConfig, mesh: Mesh) -> Callable[[], Unstacked]:
    return lambda: served_params(model, opening.weights_of(source, model, mesh), mesh)


def _mesh(config: MeshConfig) -> Mesh:
    devices = jax.local_devices()
    sizes = dataclasses.asdict(config)
    if -1 not in sizes.values():
        devices = devices[: math.prod(sizes.values())]
    mesh_shape(config, len(devices))
    return make_mesh(config, devices)


def _sized(model: ModelConfig, serve: ServeConfig, mesh: Mesh) -> ServeConfig:
    if mesh.devices.flat[0].platform == "cpu":
        if not serve.num_pages:
            most = CPU_POOL_BYTES // cache.page_bytes(model, serve)
            least = serve.max_model_len // serve.page_size + 2
            serve = dataclasses.replace(serve, num_pages=max(min(cache.useful_pages(model, serve), most), least))
        return serve
    leaves = jax.tree.leaves(abstract_served_params(model, mesh))
    weights = float(sum(math.prod(one.sharding.shard_shape(one.shape)) * one.dtype.itemsize for one in leaves))
    return fit_pages(model, serve, mesh, weights, Target.parse("local").chip.memory_bytes)


def _calibration(tokenizer: Tokenizer, serve: ServeConfig) -> list[Token]:
    """Some text of several kinds, so that each head shows how large its keys and values get."""
    tokens = tokenizer.encode_prompt(CALIBRATION)
    return (tokens * (256 // max(len(tokens), 1) + 1))[: min(256, serve.max_model_len)]


def _scheduler(model: ModelConfig, serve: ServeConfig, seconds: float) -> Scheduler:
    """seconds: what a step of max_step_tokens takes, which decides whether a preempted sequence is swapped."""
    limits = Limits(
        max_tokens=serve.max_step_tokens,
        max_rows=max(8, serve.max_sequences * (1 + serve.num_drafts)),
        max_sequences=serve.max_sequences,
        max_model_len=serve.max_model_len,
        chunk=serve.chunk,
    )
    blocks = BlockManager(serve.num_pages, serve.page_size, serve.host_pages)
    page = cache.page_bytes(model, serve)
    # Bytes a second between device and host: PCIe, or a copy in a CPU's memory.
    costs = Costs(serve.max_step_tokens / max(seconds, 1e-6), 8e9, page) if serve.host_pages else None
    return Scheduler(limits, blocks, costs)


def _vocabulary(tokenizer: Tokenizer, model: ModelConfig) -> Vocabulary | None:
    return Vocabulary(tokenizer, model.vocab_size) if tokenizer.eos_ids else None
