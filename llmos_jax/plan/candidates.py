"""Variants of a configuration that train the same model on the same tokens: what they take, by formula."""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from llmos_jax.compiler.analytic import training_memory, training_time
from llmos_jax.compiler.interconnect import AxisLinks
from llmos_jax.compiler.target import Target
from llmos_jax.config import MeshConfig, RunConfig, UserError, check, mesh_shape
from llmos_jax.overrides import apply_settings

# model.remat, remat_save and remat_offload: from keeping everything to keeping next to nothing on the device. The last three
# use the host's memory; the middle one of them is what Google's recipes for v6e keep (planning_published.json).
REMAT = (
    ("none", "", ""),
    ("names", "input,q,k,v,attention,attention_out,gate,up", ""),
    ("names", "input,q,k,v,attention,attention_out", ""),
    ("names", "input,attention", ""),
    ("full", "", ""),
    ("names", "attention", "input,q,k,v"),
    ("names", "", "input,q,k,v,attention_out"),
    ("names", "", "input"),
)
LONGEST_UNSPLIT = 16_384  # tokens of a sequence up to which the context axis is not tried
MOST_TENSOR = 16


@dataclass(frozen=True)
class Candidate:
    """settings: what `--set` takes. By formula: bytes a device, seconds of a step, tokens over all devices."""

    settings: tuple[str, ...]
    memory: float
    seconds: float
    mfu: float
    tokens_per_second: float


def evaluate(config: RunConfig, target: Target, settings: tuple[str, ...]) -> Candidate | None:
    """None where the settings break a rule, or do not fit the target's shape."""
    try:
        changed = apply_settings(config, list(settings))
        check(changed, target.num_devices)
        sizes = mesh_shape(changed.mesh, target.num_devices)
        links = _links(target, tuple(sizes.items()))
        time = training_time(changed, sizes, target, links)
    except UserError:
        return None
    rate = changed.train.batch_size * changed.train.seq_len / time.step
    return Candidate(settings, training_memory(changed, sizes, target.chip).total, time.step, time.mfu, rate)


def remats(config: RunConfig) -> Iterator[tuple[str, ...]]:
    """Each of REMAT as settings. A list of names that `config` has is cleared; of what it has not, nothing is said."""
    for remat, save, offload in REMAT:
        settings = [f"model.remat={remat}"]
        if save or config.model.remat_save:
            settings.append(f"model.remat_save={save}")
        if offload or config.model.remat_offload:
            settings.append(f"model.remat_offload={offload}")
        yield tuple(settings)


@functools.lru_cache(maxsize=4096)
def _links(target: Target, sizes: tuple[tuple[str, int], ...]) -> dict[str, AxisLinks]:
    return target.axis_links(target.mesh(MeshConfig(**dict(sizes))))


def meshes(config: RunConfig, target: Target) -> Iterator[tuple[str, ...]]:
    """Every way to split the target's devices that can be of use, as settings."""
    devices = target.num_devices
    tensors = [t for t in _divisors(devices) if t <= MOST_TENSOR]
    contexts = [c for c in _divisors(devices) if c <= 16] if config.train.seq_len > LONGEST_UNSPLIT else [1]
    experts = [e for e in _divisors(devices) if config.model.num_experts and config.model.num_experts % e == 0] or [1]
    for tensor, context, expert in itertools.product(tensors, contexts, experts):
        rest, left = divmod(devices, tensor * context * expert)
        if left:
            continue
        for fsdp in _divisors(rest):
            sizes = {"data": rest // fsdp, "fsdp": fsdp, "tensor": tensor, "context": context, "expert": expert}
            yield tuple(f"mesh.{axis}={size}" for axis, size in sizes.items())


def accumulations(config: RunConfig) -> list[int]:
    """Micro-batch counts that divide the batch. Not powers of two alone: three sequences a device are three of one each."""
    return _divisors(config.train.batch_size)


def every(config: RunConfig, target: Target) -> Iterator[Candidate | None]:
    """All of them, scored; None for each that breaks a rule, so that progress can be told."""
    for mesh, accumulate, remat in itertools.product(meshes(config, target), accumulations(config), remats(config)):
        yield evaluate(config, target, (*mesh, f"train.accumulate={accumulate}", *remat))


def number(config: RunConfig, target: Target) -> int:
    return sum(1 for _ in meshes(config, target)) * len(accumulations(config)) * len(REMAT)


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]
