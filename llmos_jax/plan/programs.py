"""The programs of a configuration on a target, each with what it does for its user. The same ones that train and serve."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from llmos_jax.compiler.analytic import training_time
from llmos_jax.compiler.analytic_serving import decode_time, prefill_time
from llmos_jax.compiler.interconnect import AxisLinks
from llmos_jax.compiler.program import OutOfMemory, Program
from llmos_jax.compiler.report import Report, Work, refused, report
from llmos_jax.compiler.roofline import forward_flops, matmul_params, train_flops
from llmos_jax.compiler.target import Target
from llmos_jax.config import RunConfig, UserError, check, mesh_shape
from llmos_jax.train.step import train_program

Say = Callable[[str], None]
STATE = {"params": "parameters", "opt_state": "optimizer state", "step": "other", "rng": "other"}


class Serving(NamedTuple):
    """The shapes of a server's programs."""

    batch: int = 1  # sequences
    prompt: int = 2_048  # tokens that one prefill takes of each
    length: int = 8_192  # tokens that a sequence may have


def build(config: RunConfig, target: Target, name: str, serving: Serving) -> tuple[Program, Work]:
    """The program `name` ("train", "prefill" or "decode") of `config` on `target`, abstract."""
    check(config, target.num_devices)
    mesh, model = target.mesh(config.mesh), config.model
    if name == "train":
        train = config.train
        useful = train_flops(model, train.seq_len) * train.batch_size
        work = Work(train.batch_size * train.seq_len, useful, (STATE, "batch"), train.steps, "step")
        return train_program(config, mesh), work
    from llmos_jax.models.generate import abstract_serving_params, decode_program, prefill_program

    params = abstract_serving_params(model, mesh)
    batch, prompt, length = serving
    if name == "prefill":
        program = prefill_program(model, mesh, params, batch, prompt, length)
        work = Work(batch * prompt, batch * forward_flops(model, prompt), _parts(program), unit="prefill")
    elif name == "decode":
        program = decode_program(model, mesh, params, batch, length)
        attended = 4.0 * model.num_heads * model.head_dim * length * model.num_layers
        work = Work(batch, batch * (2.0 * matmul_params(model) + attended), _parts(program), unit="token")
    else:
        raise UserError(f"--program {name} is not known; use train, prefill, decode or all")
    return program, work


def _parts(program: Program) -> tuple[str, ...]:
    """Of a serving program's arguments: the parameters, the cache (the only other tree), and small ones."""
    import jax

    sizes = [len(jax.tree.leaves(argument)) for argument in program.args]
    return ("parameters", *("KV cache" if size > 1 else "other" for size in sizes[1:]))


def plan(config: RunConfig, target: Target, name: str, serving: Serving, say: Say = lambda _: None) -> Report:
    """Compiles the program for the target, or finds what was compiled before, and reports on it."""
    program, work = build(config, target, name, serving)
    links = target.axis_links(program.mesh)
    analytic = _analytic(config, target, links, name, serving)
    say(f"compiling the {name} program for {target.name}")
    try:
        return report(program, program.compile(), target, links, work, analytic)
    except OutOfMemory as problem:
        return refused(program, problem, target, work, analytic)


def _analytic(
    config: RunConfig, target: Target, links: Mapping[str, AxisLinks], name: str, serving: Serving
) -> dict[str, Any]:
    sizes = mesh_shape(config.mesh, target.num_devices)
    if name == "train":
        found = training_time(config, sizes, target, links)
        return {
            "seconds": found.step,
            "core": max(found.compute, found.memory) + found.optimizer,
            "communication": {axis: seconds for axis, seconds in found.communication.items() if seconds},
            "exposed": {axis: seconds for axis, seconds in found.exposed.items() if seconds},
            "mfu": found.mfu,
        }
    time = decode_time if name == "decode" else prefill_time
    one = time(
        config.model, sizes, target, serving.batch, serving.length if name == "decode" else serving.prompt, links
    )
    return {
        "seconds": one.seconds,
        "core": max(one.memory, one.compute),
        "communication": {"all": one.communication} if one.communication else {},
        "exposed": {"all": one.communication} if one.communication else {},
        "mfu": 0.0,
    }


def for_target(config: RunConfig, target: Target) -> RunConfig:
    """`config` with a free mesh axis where its own mesh does not divide the target's devices."""
    try:
        mesh_shape(config.mesh, target.num_devices)
        return config
    except UserError:
        return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=1, fsdp=-1))
