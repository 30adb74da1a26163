"""Generation: a compiled prefill, a compiled decode step, and a KV cache that both write in place."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from llmos_jax.compiler.program import Executable, Program
from llmos_jax.config import ModelConfig, UserError
from llmos_jax.models.attention import Cache
from llmos_jax.models.decoder import Params, Unstacked, bind
from llmos_jax.sharding import replicated, sharding

SMALLEST_BUCKET = 32


def bucket(length: int, most: int) -> int:
    """The smallest power of two that holds `length`, so that few programs serve every length."""
    size = SMALLEST_BUCKET
    while size < length:
        size *= 2
    return min(size, most)


class Generator:
    """Generates from one prompt at a time. Programs are compiled when a length is first seen, and kept."""

    def __init__(self, model: ModelConfig, params: Params, mesh: Mesh):
        self._model, self._mesh = model, mesh
        self._params = _unstacked(params, mesh) if mesh.devices.flat[0].platform == "cpu" and mesh.size == 1 else params
        self._programs: dict[tuple[str, int, int], Executable] = {}
        self.timings: dict[str, float] = {}  # seconds: compile, prefill, decode; tokens: decoded

    def __call__(
        self,
        prompt: list[int],
        max_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        stop_ids: tuple[int, ...] = (),
    ) -> Iterator[int]:
        """Yields tokens until one of `stop_ids` (not yielded) or `max_tokens`.

        temperature 0 takes the likeliest token; otherwise tokens are drawn, the same for the same seed.
        Raises UserError where prompt and answer do not fit the model's context.
        """
        if not prompt:
            raise UserError("the prompt is empty; write at least a word")
        room = self._model.max_seq_len - len(prompt)
        if room < 1:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, and the model's context is {self._model.max_seq_len}; shorten it"
            )
        max_tokens = min(max_tokens, room)
        length = bucket(len(prompt), self._model.max_seq_len)
        size = bucket(max(len(prompt) + max_tokens, length), self._model.max_seq_len)
        self.timings = {"compile": 0.0, "prefill": 0.0, "decode": 0.0, "tokens": 0}
        prefill, decode = self._program("prefill", length, size), self._program("decode", 1, size)

        started = time.perf_counter()
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : len(prompt)] = prompt
        draw = (np.float32(temperature), np.uint32(seed))
        token, cache = prefill(self._params, tokens, np.int32(len(prompt)), *draw)
        step = int(np.asarray(token)[0, 0])
        self.timings["prefill"] = time.perf_counter() - started
        for position in range(len(prompt), len(prompt) + max_tokens):
            if step in stop_ids:
                return
            self.timings["tokens"] += 1
            yield step
            if position + 1 == len(prompt) + max_tokens:
                return
            started = time.perf_counter()
            token, cache = decode(self._params, token, np.int32(position), cache, *draw)
            step = int(np.asarray(token)[0, 0])
            self.timings["decode"] += time.perf_counter() - started

    def logits(self, tokens: list[int]) -> Float[Array, "T V"]:
        """Logits at every position of a text, float32."""
        ids = jax.ShapeDtypeStruct((1, len(tokens)), jnp.int32, sharding=replicated(self._mesh))
        program = Program("score", score, (self._model,), (_abstract(self._params), ids), self._mesh).compile()
        return program(self._params, np.asarray([tokens], np.int32))

    def _program(self, kind: str, length: int, size: int) -> Executable:
        if (kind, length, size) not in self._programs:
            build: Callable[..., Program] = prefill_program if kind == "prefill" else decode_program
            executable = build(self._model, self._mesh, _abstract(self._params), length, size).compile()
            self.timings["compile"] += executable.compile_seconds
            self._programs[kind, length, size] = executable
        return self._programs[kind, length, size]


def _unstacked(params: Params, mesh: Mesh) -> Unstacked:
    """Stacked layers as one array each. A CPU would copy each layer's slice out of the stack at every step.

    The slices are taken by the host, whose memory this is: nothing is compiled for it.
    """

    def split(stack: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jax.device_put(list(np.asarray(stack)), replicated(mesh)))

    return {path: split(x) if path.startswith("segments.") else x for path, x in params.items()}


def _abstract(params):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)


def _empty_cache(model: ModelConfig, size: int) -> tuple[Cache, ...]:
    shape = (1, size, model.num_kv_heads, model.head_dim)
    return tuple(Cache(*(jnp.zeros(shape, model.dtype) for _ in range(2))) for _ in range(model.num_layers))


def _abstract_cache(model: ModelConfig, mesh: Mesh, size: int) -> tuple[Any, ...]:
    place = sharding(mesh, (None, None, "kv_heads", None))
    shape = (1, size, model.num_kv_heads, model.head_dim)
    layer: Any = jax.ShapeDtypeStruct(shape, jnp.dtype(model.dtype), sharding=place)
    return (Cache(layer, layer),) * model.num_layers


def _scalars(mesh: Mesh, *dtypes) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((), dtype, sharding=replicated(mesh)) for dtype in dtypes]


def _choose(logits: Float[Array, "B V"], temperature, seed, position) -> Int[Array, "B 1"]:
    """The next token. The draw depends on seed and position alone."""
    key = jax.random.fold_in(jax.random.key(seed), position)
    drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits, axis=-1))[:, None].astype(jnp.int32)


def prefill_program(model: ModelConfig, mesh: Mesh, params, length: int, size: int) -> Program:
    """(params, tokens [1, length], prompt length, temperature, seed) -> (first token [1, 1], cache of `size` tokens)."""
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=replicated(mesh))
    args = (params, tokens, *_scalars(mesh, jnp.int32, jnp.float32, jnp.uint32))
    return Program("prefill", prefill, (model, size), args, mesh, out_shardings=_places(model, mesh, size))


def prefill(model: ModelConfig, size: int, params, tokens, prompt_length, temperature, seed):
    decoder = bind(model, params)
    output = decoder(tokens, cache=_empty_cache(model, size), offset=jnp.zeros((1,), jnp.int32))
    last = jax.lax.dynamic_slice_in_dim(output.hidden, prompt_length - 1, 1, axis=1)
    token = _choose(decoder.logits(last)[:, 0], temperature, seed, prompt_length)
    return token, output.cache


def decode_program(model: ModelConfig, mesh: Mesh, params, length: int, size: int) -> Program:
    """(params, token [1, 1], its position, cache, temperature, seed) -> (next token [1, 1], cache)."""
    abstract = _abstract_cache(model, mesh, size)
    token = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=replicated(mesh))
    args = (params, token, *_scalars(mesh, jnp.int32), abstract, *_scalars(mesh, jnp.float32, jnp.uint32))
    return Program("decode", decode, (model,), args, mesh, donate=(3,), out_shardings=_places(model, mesh, size))


def decode(model: ModelConfig, params, token, position, cache, temperature, seed):
    decoder = bind(model, params)
    output = decoder(token, cache=cache, offset=position[None])
    return _choose(decoder.logits(output.hidden)[:, 0], temperature, seed, position + 1), output.cache


def score(model: ModelConfig, params, tokens):
    decoder = bind(model, params)
    cache = _empty_cache(model, tokens.shape[1])
    return decoder.logits(decoder(tokens, cache=cache, offset=jnp.zeros((1,), jnp.int32)).hidden)[0]


def _places(model: ModelConfig, mesh: Mesh, size: int):
    return replicated(mesh), jax.tree.map(lambda x: x.sharding, _abstract_cache(model, mesh, size))
