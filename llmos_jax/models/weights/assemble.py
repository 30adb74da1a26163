"""Fills a model's parameters from a file, one layer of one parameter at a time, straight into their sharding."""

import functools
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from llmos_jax.config import ModelConfig
from llmos_jax.models.weights.names import Entry, Index, Slot, slots
from llmos_jax.models.weights.threads import NUM_THREADS, threads

Progress = Callable[[int, int], None]  # bytes placed so far, bytes in all


class Source(Protocol):
    """An open file of weights."""

    def read(self, entry: Entry, layer: int | None, index: Index) -> np.ndarray:
        """The part `index` of one layer's parameter, in our layout (with the leading E for experts)."""


def assemble(
    model: ModelConfig,
    abstract: dict[str, jax.ShapeDtypeStruct],
    source: Source,
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """The parameters that `abstract` describes, read through `source` and cast to their dtypes.

    A stacked parameter is allocated once, sharded, and its layers are written into it in place. Beside the parameters
    there is never more on the host than one layer of one, and of that only what this process's devices hold.
    """
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in abstract.values())
    params, done = {}, 0
    for slot in slots(model, abstract):
        leaf = abstract[slot.path]
        sharding = leaf.sharding or SingleDeviceSharding(jax.devices()[0])
        if slot.layers is None:
            params[slot.path] = _place(source, slot, None, leaf.shape, leaf.dtype, sharding)
        elif is_on_host(sharding):
            params[slot.path] = _stack_on_host(source, slot, leaf, sharding)
        else:
            stacked = _zeros(leaf.shape, leaf.dtype, sharding)()
            piece_sharding = _without_layers(sharding)
            for i, layer in enumerate(slot.layers):
                piece = _place(source, slot, layer, leaf.shape[1:], leaf.dtype, piece_sharding)
                stacked = _writer(sharding)(stacked, piece, jnp.int32(i))
            params[slot.path] = stacked
        done += leaf.size * leaf.dtype.itemsize
        if progress is not None:
            progress(done, total)
    return params


def _place(source: Source, slot: Slot, layer: int | None, shape, dtype, sharding: Sharding) -> jax.Array:
    def part(index: Index) -> np.ndarray:
        return np.ascontiguousarray(source.read(slot.entry, layer, index).astype(dtype, copy=False))

    # Transfers are asynchronous: without the wait, layers would pile up on the host.
    return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, part))  # type: ignore[arg-type]


def is_on_host(sharding: Sharding) -> bool:
    """Whether an array with `sharding` lies whole in this host's memory, where no program is needed to fill it."""
    first: Any = next(iter(sharding.device_set))
    return sharding.num_devices == 1 and first.platform == "cpu"


def _stack_on_host(source: Source, slot: Slot, leaf: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.Array:
    stacked = _aligned(leaf.shape, leaf.dtype)
    for i, layer in enumerate(slot.layers or ()):
        _copy(stacked[i], source.read(slot.entry, layer, (slice(None),) * (len(leaf.shape) - 1)))
    return jax.device_put(stacked, sharding, may_alias=True)


def _copy(target: np.ndarray, values: np.ndarray) -> None:
    """In threads: the pages of `target` are new, and the kernel has to find memory for them."""
    if target.ndim < 2:
        target[...] = values
        return
    rows = -(-len(target) // NUM_THREADS)

    def part(start: int) -> None:
        target[start : start + rows] = values[start : start + rows]

    list(threads().map(part, range(0, len(target), rows)))


def _aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An array that a CPU device takes over as it is, without a copy: XLA wants it at a multiple of 64 bytes."""
    size, boundary = math.prod(shape) * np.dtype(dtype).itemsize, 64
    memory = np.empty(size + boundary, np.uint8)
    start = -memory.ctypes.data % boundary
    return memory[start : start + size].view(dtype).reshape(shape)


def _without_layers(sharding: Sharding) -> Sharding:
    """The sharding of one layer of an array with `sharding`."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]), memory_kind=sharding.memory_kind)


@functools.lru_cache(maxsize=64)
def _zeros(shape, dtype, sharding: Sharding):
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _writer(sharding: Sharding):
    """(stacked, piece, i) -> stacked with the piece at i, in place."""
    return jax.jit(
        lambda stacked, piece, i: jax.lax.dynamic_update_index_in_dim(stacked, piece, i, 0),
        donate_argnums=0,
        out_shardings=sharding,
    )
