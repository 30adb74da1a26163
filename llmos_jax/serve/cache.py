"""The pages of keys and values on the devices: how many there are, how they are made, copied, and moved to the host."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmos_jax.compiler.program import Executable, Program
from llmos_jax.config import ModelConfig, ServeConfig
from llmos_jax.sharding import replicated, sharding
from pallas_kernels import KVPages

MOVED = 8  # pages that one call of a program copies or moves
PAGE_DIMS = (None, "kv_heads", None, None, None)
Pool = tuple[KVPages, ...]  # one a layer


def resolve_kv_dtype(model: ModelConfig, serve: ServeConfig) -> ServeConfig:
    """`serve` with "auto" decided: the dtype of computation, or of the weights as they are read if that is smaller."""
    if serve.kv_dtype != "auto":
        return serve
    return dataclasses.replace(serve, kv_dtype=min(model.dtype, model.param_dtype, key=lambda d: jnp.dtype(d).itemsize))


def page_dtype(serve: ServeConfig) -> Any:
    return jnp.dtype(serve.kv_dtype)


def page_bytes(model: ModelConfig, serve: ServeConfig) -> int:
    """Of one page over all layers and devices."""
    values = 2 * serve.page_size * model.num_kv_heads * model.head_dim * model.num_layers
    return values * page_dtype(serve).itemsize


def abstract_pool(model: ModelConfig, serve: ServeConfig, mesh: Mesh) -> Pool:
    dtype = page_dtype(serve)
    if dtype == jnp.bfloat16 and mesh.devices.flat[0].platform == "cpu":
        dtype = jnp.dtype("uint16")  # its bits; see KVPages
    shape = (serve.num_pages, model.num_kv_heads, 2, serve.page_size, model.head_dim)
    data: Any = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, PAGE_DIMS))
    scales: Any = None
    if dtype.itemsize == 1:
        places = sharding(mesh, ("kv_heads", None, None))
        scales = jax.ShapeDtypeStruct((model.num_kv_heads, 2, model.head_dim), jnp.float32, sharding=places)
    return (KVPages(data, scales),) * model.num_layers


def empty_pool(abstract: Pool, scales: list[np.ndarray] | None) -> Pool:
    """Zeros on the devices. scales: of each layer, [K, 2, H], for a pool of int8 or float8."""

    def zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        def block(index: Any) -> np.ndarray:
            return np.zeros([len(range(*s.indices(n))) for s, n in zip(index, leaf.shape, strict=True)], leaf.dtype)

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, block)

    pages = []
    for layer, one in enumerate(abstract):
        leaf: Any = one
        own = None if scales is None else jax.device_put(scales[layer].astype(np.float32), leaf.scales.sharding)
        pages.append(KVPages(zeros(leaf.data), own))
    return tuple(pages)


def copy_pages(pool: Pool, source: jax.Array, target: jax.Array) -> Pool:
    """Pages `source` written over `target` [MOVED]; a target past the end is none."""
    return tuple(
        pages._replace(data=pages.data.at[target].set(pages.data[source], mode="drop", unique_indices=True))
        for pages in pool
    )


def read_pages(pool: Pool, ids: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(pages.data[ids] for pages in pool)


def write_pages(pool: Pool, ids: jax.Array, values: tuple[jax.Array, ...]) -> Pool:
    """Pages from the host; an id past the end is none."""
    return tuple(
        pages._replace(data=pages.data.at[ids].set(value, mode="drop", unique_indices=True))
        for pages, value in zip(pool, values, strict=True)
    )


def move_programs(pool: Pool, mesh: Mesh) -> dict[str, Program]:
    """copy, read, write: what happens to pages beside attention."""
    ids = jax.ShapeDtypeStruct((MOVED,), jnp.int32, sharding=replicated(mesh))
    values = tuple(
        jax.ShapeDtypeStruct((MOVED, *pages.data.shape[1:]), pages.data.dtype, sharding=pages.data.sharding)
        for pages in pool
    )
    same = jax.tree.map(lambda leaf: leaf.sharding, pool)
    moved = tuple(leaf.sharding for leaf in values)
    return {
        "copy": Program("copy_pages", copy_pages, (), (pool, ids, ids), mesh, donate=(0,), out_shardings=same),
        "read": Program("read_pages", read_pages, (), (pool, ids), mesh, out_shardings=moved),
        "write": Program("write_pages", write_pages, (), (pool, ids, values), mesh, donate=(0,), out_shardings=same),
    }


class Mover:
    """Carries out what a step says about pages, before the step's tokens run. Pages on the host are numpy arrays."""

    def __init__(self, programs: dict[str, Executable], num_pages: int):
        self._programs, self._num_pages = programs, num_pages
        self._host: dict[int, list[np.ndarray]] = {}

    def __call__(
        self,
        pool: Pool,
        swap_out: list[tuple[int, int]],
        swap_in: list[tuple[int, int]],
        copies: list[tuple[int, int]],
    ) -> Pool:
        for part in _parts(swap_out):
            found = self._programs["read"](pool, self._ids([page for page, _ in part], fill=0))
            layers = [np.asarray(layer) for layer in found]
            for at, (_, host) in enumerate(part):
                self._host[host] = [layer[at].copy() for layer in layers]
        for part in _parts(swap_in):
            held = [self._host.pop(host) for host, _ in part]
            held += [held[0]] * (MOVED - len(held))
            values = tuple(np.stack(layer) for layer in zip(*held, strict=True))
            pool = self._programs["write"](pool, self._ids([page for _, page in part]), values)
        for part in _parts(copies):
            source = self._ids([page for page, _ in part], fill=0)
            pool = self._programs["copy"](pool, source, self._ids([page for _, page in part]))
        return pool

    def _ids(self, pages: list[int], fill: int | None = None) -> np.ndarray:
        # Past the end means none; each another one, since the programs are promised that they differ.
        rest = [self._num_pages + i if fill is None else fill for i in range(MOVED - len(pages))]
        return np.array(pages + rest, np.int32)


def _parts(moves: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    return [moves[at : at + MOVED] for at in range(0, len(moves), MOVED)]


@functools.lru_cache
def useful_pages(model: ModelConfig, serve: ServeConfig) -> int:
    """More than this no batch can hold: every sequence at its full length, and one page of slack each."""
    return serve.max_sequences * (math.ceil((serve.max_model_len or model.max_seq_len) / serve.page_size) + 1)


def room(model: ModelConfig, serve: ServeConfig, mesh: Mesh, weights: float, temporary: float, capacity: float) -> int:
    """Pages that memory has room for beside weights and temporaries; all three in bytes of one device."""
    left = capacity * serve.memory_share - weights - temporary
    return max(0, int(left * mesh.shape["tensor"] / page_bytes(model, serve)))
