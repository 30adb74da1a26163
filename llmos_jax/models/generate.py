"""Generation: a compiled prefill, a compiled decode step, and a KV cache that both write in place."""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from llmos_jax.compiler.program import Executable, Program
from llmos_jax.config import ModelConfig, UserError
from llmos_jax.models.cache import Cache
from llmos_jax.models.parameters import Params, known_params
from llmos_jax.sharding import RULES, replicated, sharding

if TYPE_CHECKING:
    from llmos_jax.models.decoder import Unstacked  # takes Flax, which a program that was compiled before does not need

SMALLEST_BUCKET = 32
Key = tuple[str, int, int]  # of a program: its kind, the tokens it takes, and the size of the cache


def bucket(length: int, most: int) -> int:
    """The smallest power of two that holds `length`, so that few programs serve every length."""
    size = SMALLEST_BUCKET
    while size < length:
        size *= 2
    return min(size, most)


class Generator:
    """Generates from one prompt at a time. Programs are compiled when a length is first seen, and kept."""

    def __init__(self, model: ModelConfig, params: Params | Callable[[], Params], mesh: Mesh):
        """params: or what reads them, laid out as `known_params(model, mesh)`: called once, beside the first compilation."""
        self._model, self._mesh = model, mesh
        self._read: Callable[[], Params] | None = params if callable(params) else None
        self._unstack = mesh.devices.flat[0].platform == "cpu" and mesh.size == 1
        self._params: Any = None if callable(params) else self._laid_out(params)
        self._programs: dict[Key, Future[Executable]] = {}
        self.timings: dict[str, float] = {}  # seconds: compile (and read), prefill, decode; tokens: decoded

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
        started = time.perf_counter()
        prefill, *decode = self._begin(("prefill", length, size), *[("decode", 1, size)] * (max_tokens > 1))
        run = prefill.result()
        self.timings = {"compile": time.perf_counter() - started, "prefill": 0.0, "decode": 0.0, "tokens": 0}

        started = time.perf_counter()
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : len(prompt)] = prompt
        draw = (np.array([temperature], np.float32), np.array([seed], np.uint32))
        token, cache = run(self._params, tokens, np.array([len(prompt)], np.int32), *draw)
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
            run = decode[0].result()
            self.timings["compile"] += time.perf_counter() - started
            started = time.perf_counter()
            token, cache = run(self._params, token, np.array([position], np.int32), cache, *draw)
            step = int(np.asarray(token)[0, 0])
            self.timings["decode"] += time.perf_counter() - started

    def logits(self, tokens: list[int]) -> Float[Array, "T V"]:
        """Logits at every position of a text, float32."""
        ids = jax.ShapeDtypeStruct((1, len(tokens)), jnp.int32, sharding=replicated(self._mesh))
        self._begin()
        program = Program("score", score, (self._model,), (self._abstract(), ids), self._mesh).compile()
        return program(self._params, np.asarray([tokens], np.int32))

    def _begin(self, first: Key | None = None, *others: Key) -> list[Future[Executable]]:
        """The programs, and the parameters there to call them with: what is missing is compiled, or loaded, and read at
        the same time.

        What has to be compiled is waited for: nothing runs before all of it is known to fit. Where every program was
        compiled before, only the first is waited for, and the others are loaded beside its run.
        """
        wanted = [key for key in (first, *others) if key is not None]
        abstract = self._abstract()
        missing = {key: self._program(abstract, key) for key in wanted if key not in self._programs}
        all_stored = all(program.was_compiled() for program in missing.values())
        with ThreadPoolExecutor(len(wanted) + 1) as threads:
            reading = threads.submit(self._read) if self._read else None
            made = {
                key: threads.submit(program.compile)
                for key, program in missing.items()
                if key == first or not all_stored
            }
        if reading:
            self._params, self._read = self._laid_out(reading.result()), None
        for future in made.values():
            future.result()  # raises what went wrong
        beside = ThreadPoolExecutor(1)
        self._programs |= made | {key: beside.submit(missing[key].compile) for key in missing.keys() - made.keys()}
        beside.shutdown(wait=False)
        return [self._programs[key] for key in wanted]

    def _program(self, params, key: Key) -> Program:
        kind, length, size = key
        if kind == "prefill":
            return prefill_program(self._model, self._mesh, params, 1, length, size)
        return decode_program(self._model, self._mesh, params, 1, size)

    def _laid_out(self, params: Params) -> "Params | Unstacked":
        return _unstacked(params, self._mesh) if self._unstack else params

    def _abstract(self):
        """Of the parameters as the programs take them, whether they have been read or not."""
        if self._params is not None:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self._params)
        params = known_params(self._model, self._mesh)
        if not self._unstack:
            return params
        alone = replicated(self._mesh)

        def of(path: str, leaf: jax.ShapeDtypeStruct) -> Any:
            if not path.startswith("segments."):
                return leaf
            return (jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=alone),) * leaf.shape[0]

        return {path: of(path, leaf) for path, leaf in params.items()}


def _unstacked(params: Params, mesh: Mesh) -> "Unstacked":
    """Stacked layers as one array each. A CPU would copy each layer's slice out of the stack at every step.

    The slices are taken by the host, whose memory this is: nothing is compiled for it.
    """

    def split(stack: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jax.device_put(list(np.asarray(stack)), replicated(mesh)))

    return {path: split(x) if path.startswith("segments.") else x for path, x in params.items()}


def abstract_serving_params(model: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """Parameters in the dtype of computation, each layer's as arrays of their own: nothing is sliced out of a stack."""
    from llmos_jax.models.decoder import abstract_params, logical_dims

    names = logical_dims(model)

    def of(path: str, shape: tuple[int, ...]) -> Any:
        if not path.startswith("segments."):
            return _abstract_array(mesh, shape, model.dtype, names[path])
        return (_abstract_array(mesh, shape[1:], model.dtype, names[path][1:]),) * shape[0]

    return {path: of(path, leaf.shape) for path, leaf in abstract_params(model).items()}


def _abstract_array(mesh: Mesh, shape: tuple[int, ...], dtype, logical: tuple[str | None, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding(mesh, logical))


def _rows(mesh: Mesh, batch: int) -> str | None:
    """The name of the dimension of sequences: split where the mesh divides it."""
    return "batch" if batch % math.prod(mesh.shape[axis] for axis in RULES["batch"]) == 0 else None


def _empty_cache(model: ModelConfig, batch: int, size: int) -> tuple[Cache, ...]:
    shape = (batch, size, model.num_kv_heads, model.head_dim)
    return tuple(Cache(*(jnp.zeros(shape, model.dtype) for _ in range(2))) for _ in range(model.num_layers))


def _abstract_cache(model: ModelConfig, mesh: Mesh, batch: int, size: int) -> tuple[Any, ...]:
    shape = (batch, size, model.num_kv_heads, model.head_dim)
    layer: Any = _abstract_array(mesh, shape, model.dtype, (_rows(mesh, batch), None, "kv_heads", None))
    return (Cache(layer, layer),) * model.num_layers


def _vectors(mesh: Mesh, batch: int, *dtypes) -> list[jax.ShapeDtypeStruct]:
    return [_abstract_array(mesh, (batch,), dtype, (_rows(mesh, batch),)) for dtype in dtypes]


def _places(model: ModelConfig, mesh: Mesh, batch: int, size: int):
    cache = _abstract_cache(model, mesh, batch, size)
    return sharding(mesh, (_rows(mesh, batch), None)), jax.tree.map(lambda x: x.sharding, cache)


@jax.vmap
def _choose(logits: Float[Array, "V"], temperature, seed, position) -> Int[Array, "1"]:
    """The next token of each sequence. The draw depends on its seed and position alone."""
    key = jax.random.fold_in(jax.random.key(seed), position)
    drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits))[None].astype(jnp.int32)


def _bound(model: ModelConfig, params):
    from llmos_jax.models.decoder import bind  # a program that was compiled before needs none of it

    return bind(model, params)


def prefill_program(model: ModelConfig, mesh: Mesh, params, batch: int, length: int, size: int) -> Program:
    """(params, tokens [B, T], prompt lengths [B], temperatures [B], seeds [B]) -> (first tokens [B, 1], cache).

    length: T, to which prompts are filled up. size: tokens that the cache has room for, of each of the B sequences.
    """
    tokens = _abstract_array(mesh, (batch, length), jnp.int32, (_rows(mesh, batch), None))
    args = (params, tokens, *_vectors(mesh, batch, jnp.int32, jnp.float32, jnp.uint32))
    return Program("prefill", prefill, (model, size), args, mesh, out_shardings=_places(model, mesh, batch, size))


def prefill(model: ModelConfig, size: int, params, tokens, prompt_lengths, temperature, seed):
    decoder, batch = _bound(model, params), tokens.shape[0]
    output = decoder(tokens, cache=_empty_cache(model, batch, size), offset=jnp.zeros((batch,), jnp.int32))
    last = jnp.take_along_axis(output.hidden, (prompt_lengths - 1)[:, None, None], axis=1)
    return _choose(decoder.logits(last)[:, 0], temperature, seed, prompt_lengths), output.cache


def decode_program(model: ModelConfig, mesh: Mesh, params, batch: int, size: int) -> Program:
    """(params, tokens [B, 1], their positions [B], cache, temperatures [B], seeds [B]) -> (next tokens [B, 1], cache).

    The cache is written in place.
    """
    tokens = _abstract_array(mesh, (batch, 1), jnp.int32, (_rows(mesh, batch), None))
    cache, draw = _abstract_cache(model, mesh, batch, size), _vectors(mesh, batch, jnp.float32, jnp.uint32)
    args = (params, tokens, *_vectors(mesh, batch, jnp.int32), cache, *draw)
    return Program("decode", decode, (model,), args, mesh, donate=(3,), out_shardings=_places(model, mesh, batch, size))


def decode(model: ModelConfig, params, tokens, positions, cache, temperature, seed):
    decoder = _bound(model, params)
    output = decoder(tokens, cache=cache, offset=positions)
    return _choose(decoder.logits(output.hidden)[:, 0], temperature, seed, positions + 1), output.cache


def score(model: ModelConfig, params, tokens):
    decoder = _bound(model, params)
    cache = _empty_cache(model, 1, tokens.shape[1])
    return decoder.logits(decoder(tokens, cache=cache, offset=jnp.zeros((1,), jnp.int32)).hidden)[0]
