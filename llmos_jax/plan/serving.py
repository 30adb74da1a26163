"""`llmos plan --program serve`: what a server holds on a target, how many sequences fit, and how fast it answers.

The programs are those that `serve/runner.py` runs: a step of decodes, a step full of prompts' tokens, and the drawing of
tokens. Speed is that of a closed loop: so many users, each of whom sends the next prompt when the answer has come.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax

from llmos_jax.compiler.analytic_serving import ServingTime, decode_time, paged_attention_work, prefill_time
from llmos_jax.compiler.chips import MEMORY_SHARE
from llmos_jax.compiler.program import OutOfMemory, Program
from llmos_jax.compiler.report import Report, Work, refused, report
from llmos_jax.compiler.roofline import forward_flops, matmul_params
from llmos_jax.compiler.target import Target
from llmos_jax.config import ModelConfig, RunConfig, ServeConfig, check_model, mesh_shape, require
from llmos_jax.models.quantized import check_quantize
from llmos_jax.plan.published import Published, matching
from llmos_jax.serve import cache, forward
from llmos_jax.serve.runner import fit_pages
from llmos_jax.serve.weights import abstract_served_params

Say = Callable[[str], None]
KERNEL = "paged_attention"


class Load(NamedTuple):
    """A closed loop of `users`, all of whose prompts and answers have so many tokens."""

    users: int
    prompt: int
    answer: int

    @property
    def mean_length(self) -> int:
        """Of a sequence that is being answered, over the time that takes."""
        return self.prompt + self.answer // 2


@dataclass(frozen=True)
class Speed:
    """By one estimate, in seconds. decode, chunk: steps of one token for each user, and full of a prompt's tokens.

    first_token: of a prompt that meets one running step and no others waiting. between_tokens: the mean in the loop, in
    which steps carry prompts too; it is `decode` at its best. tokens_per_second: answered, by all chips.
    """

    decode: float
    chunk: float
    first_token: float
    between_tokens: float
    tokens_per_second: float


@dataclass(frozen=True)
class ServingPlan:
    """room: pages that a chip's memory has room for beside weights and the compiled programs' temporaries.

    running: sequences of the load at once: its users, or fewer where max_sequences or memory end. reports: decode,
    prefill, draw.
    """

    reports: list[Report]
    load: Load
    page_size: int
    pages: int
    room: int
    running: int
    speeds: dict[str, Speed]
    dollars_per_million_tokens: float | None
    published: list[Published]

    @property
    def fits(self) -> bool:
        return all(one.fits for one in self.reports)

    def sequences(self, length: int) -> int:
        """How many of so many tokens have room at once."""
        return self.room // math.ceil(length / self.page_size)

    @property
    def main(self) -> Speed:
        return self.speeds.get("schedule") or self.speeds["analytic"]

    def as_dict(self) -> dict[str, Any]:
        num_chips = self.reports[0].num_chips
        length = self.load.prompt + self.load.answer
        return {
            "target": self.reports[0].target,
            "fits": self.fits,
            **self.load._asdict(),
            "page_size": self.page_size,
            "pages": self.pages,
            "room_pages": self.room,
            "sequences": {str(size): self.sequences(size) for size in lengths(length)},
            "running": self.running,
            "speeds": {name: asdict(one) for name, one in self.speeds.items()},
            "tokens_per_second_per_chip": self.main.tokens_per_second / num_chips,
            "dollars_per_million_tokens": self.dollars_per_million_tokens,
            "published": [asdict(one) for one in self.published],
        }


def lengths(length: int) -> list[int]:
    """Lengths of sequences that a plan counts: a quarter of the asked one, up to four times."""
    return sorted({max(1, length * times // 4) for times in (1, 2, 4, 8, 16)})


def closed_loop(load: Load, step_tokens: int, decode: float, mixed: float) -> tuple[float, float]:
    """(seconds between a user's tokens, answered tokens a second over all users).

    While each user gets one answer, the prompts of all of them take `mixed` steps with what the decodes leave of the
    step's tokens; a user sees those steps too, and the rest are `decode` steps.
    """
    room = max(1, step_tokens - load.users)
    prompts = load.users * load.prompt / room
    steps = max(prompts, load.prompt / room + load.answer - 1)
    seconds = prompts * mixed + (steps - prompts) * decode
    return seconds / steps, load.users * load.answer / seconds


def plan_serving(config: RunConfig, target: Target, load: Load, say: Say = lambda _: None) -> ServingPlan:
    """Compiles the programs for the target, or finds what was compiled before.

    Raises UserError where the settings do not fit each other, or not one sequence of max_model_len fits.
    """
    model = config.model
    check_model(model)
    _check_mesh(model, mesh_shape(config.mesh, target.num_devices))
    mesh = target.mesh(config.mesh)
    serve = cache.resolve_kv_dtype(model, config.serve)
    serve = dataclasses.replace(serve, max_model_len=serve.max_model_len or model.max_seq_len)
    _check_load(serve, load)
    params = abstract_served_params(model, mesh)
    weights = sum(_local_bytes(leaf) for leaf in jax.tree.leaves(params))
    serve = fit_pages(model, serve, mesh, weights, target.chip.memory_bytes)
    # The batch of the loop is not known before the pages, and the programs are the same for any.
    running = min(load.users, serve.max_sequences, serve.num_pages * serve.page_size // (load.prompt + load.answer))
    actual = load._replace(users=max(1, running))
    pool = cache.abstract_pool(model, serve, mesh)
    shapes = forward.shapes(model, serve, mesh.devices.flat[0].platform)
    small, large = _bucket(shapes, actual.users), shapes[-1]
    programs = {
        "decode": forward.forward_program(model, small, mesh, params, pool, None, serve.adapter_rank),
        "prefill": forward.forward_program(model, large, mesh, params, pool, None, serve.adapter_rank),
        "draw": forward.draw_program(model, serve, small.rows, mesh, False, 0),
    }
    works = _works(model, serve, mesh.shape["tensor"], actual)
    analytic = {"decode": _by_formula(config, serve, target, actual, 1)}
    analytic["prefill"] = _by_formula(config, serve, target, actual, min(serve.max_step_tokens, load.prompt))
    reports = []
    for name, program in programs.items():
        say(f"compiling the {name} program of the server for {target.name}")
        reports.append(_report(name, program, target, works[name], analytic.get(name)))
    temporary = max(one.memory["temporaries"] + one.memory.get("code", 0.0) for one in reports)
    room = cache.room(model, serve, mesh, weights, temporary, target.chip.memory_bytes)
    speeds = _speeds(reports, serve, works["decode"], model, target, actual)
    rate = (speeds.get("schedule") or speeds["analytic"]).tokens_per_second
    dollars = target.price / 3600 / rate * 1e6 if target.price and rate else None
    found = matching(model, target, load)
    return ServingPlan(reports, load, serve.page_size, serve.num_pages, room, actual.users, speeds, dollars, found)


def _check_mesh(model: ModelConfig, sizes: dict[str, int]) -> None:
    for axis in ("data", "fsdp", "context"):
        require(
            sizes[axis] == 1,
            f"mesh.{axis}={sizes[axis]}: a server splits over tensor and expert; set mesh.fsdp=1 mesh.tensor=-1",
        )
    require(
        model.num_kv_heads % sizes["tensor"] == 0,
        f"mesh.tensor={sizes['tensor']} does not divide model.num_kv_heads={model.num_kv_heads}; use fewer chips",
    )
    check_quantize(model, sizes["tensor"])


def _check_load(serve: ServeConfig, load: Load) -> None:
    length = load.prompt + load.answer
    require(load.answer >= 1, f"--prompt {load.prompt} leaves no tokens of --length {length} for an answer; lower it")
    require(
        length <= serve.max_model_len,
        f"sequences of {length} tokens are longer than serve.max_model_len={serve.max_model_len}; raise it, or lower --length",
    )
    require(
        serve.max_sequences <= serve.max_step_tokens,
        f"serve.max_step_tokens={serve.max_step_tokens} is less than serve.max_sequences={serve.max_sequences}; raise it",
    )


def _local_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize  # type: ignore[union-attr]


def _bucket(shapes: list[forward.Shape], users: int) -> forward.Shape:
    return next(shape for shape in shapes if shape.tokens >= users and shape.rows >= users)


def _works(model: ModelConfig, serve: ServeConfig, tensor: int, load: Load) -> dict[str, Work]:
    """What the programs do for their users, and the paged kernel's share, which no compiled text can tell."""
    width = cache.page_dtype(serve).itemsize
    parts = ("parameters", "KV cache", "other", "other", "parameters")  # the last is adapters
    length, chunk = load.mean_length, min(serve.max_step_tokens, load.prompt)
    decode = paged_attention_work(model, tensor, [(length - 1, 1)] * load.users, width)
    # Of a prompt in several chunks the middle one: what comes before it is half of the others.
    prefill = paged_attention_work(model, tensor, [((load.prompt - chunk) // 2, chunk)], width)
    attended = 4.0 * model.num_heads * model.head_dim * length * model.num_layers
    useful = load.users * (2.0 * matmul_params(model) + attended)
    return {
        "decode": Work(load.users, useful, parts, unit="step", kernels={KERNEL: decode}),
        "prefill": Work(chunk, forward_flops(model, chunk), parts, unit="chunk", kernels={KERNEL: prefill}),
        "draw": Work(load.users, 0.0, ("other", "logits", *("other",) * 5), unit="step"),
    }


def _by_formula(config: RunConfig, serve: ServeConfig, target: Target, load: Load, new: int) -> dict[str, Any]:
    """Fields of an Estimate for a step of one token a user, or of `new` tokens of one prompt."""
    sizes = mesh_shape(config.mesh, target.num_devices)
    width = cache.page_dtype(serve).itemsize
    if new == 1:
        time: ServingTime = decode_time(config.model, sizes, target, load.users, load.mean_length, kv_width=width)
    else:
        time = prefill_time(config.model, sizes, target, 1, new, kv_width=width)
    communication = {"all": time.communication} if time.communication else {}
    core = max(time.memory, time.compute)
    return {"seconds": time.seconds, "core": core, "communication": communication, "exposed": communication, "mfu": 0.0}


def _report(name: str, program: Program, target: Target, work: Work, analytic: dict[str, Any] | None) -> Report:
    links = target.axis_links(program.mesh)
    try:
        found = report(program, program.compile(), target, links, work, analytic)
    except OutOfMemory as problem:
        found = refused(program, problem, target, work, analytic)
    return dataclasses.replace(found, program=name)


def _speeds(
    reports: list[Report], serve: ServeConfig, decode_work: Work, model: ModelConfig, target: Target, load: Load
) -> dict[str, Speed]:
    """By each estimate that decode and prefill both have; drawing has no formula, and takes nothing there."""
    decode, prefill, draw = (one.estimates for one in reports)
    attention = decode_work.kernels[KERNEL][1] * model.num_layers  # bytes that a mixed step reads beside its prompts
    found = {}
    for name in decode:
        if name not in prefill:
            continue
        drawn = draw[name].seconds if name in draw else 0.0
        step, chunk = decode[name].seconds + drawn, prefill[name].seconds + drawn
        mixed = chunk + attention / (target.chip.memory_bandwidth * MEMORY_SHARE)
        between, rate = closed_loop(load, serve.max_step_tokens, step, mixed)
        chunks = math.ceil(load.prompt / serve.max_step_tokens)
        found[name] = Speed(step, chunk, chunks * chunk + step, between, rate)
    return found
