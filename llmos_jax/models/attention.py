"""The attention layer: projections, head norms, rotary positions, the KV cache, and the kernel, on each device's part."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

import pallas_kernels
from llmos_jax.config import ModelConfig
from llmos_jax.models.cache import Cache
from llmos_jax.models.layers import (
    INIT_STD,
    Norm,
    Stack,
    adapted,
    add_adapters,
    norm,
    out_std,
    parameter,
    present,
    project,
    project_together,
)
from llmos_jax.sharding import axis_size, gather_tokens, sharded, sum_over_tensor, token_dims, whole
from pallas_kernels import KVPages

Rope = tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]

WEIGHTS = {
    "q": ("embed", "heads", "head_dim"),
    "k": ("embed", "kv_heads", "head_dim"),
    "v": ("embed", "kv_heads", "head_dim"),
    "o": ("heads", "head_dim", "embed"),
    "q_bias": ("heads", "head_dim"),
    "k_bias": ("kv_heads", "head_dim"),
    "v_bias": ("kv_heads", "head_dim"),
    "o_bias": ("norm",),
}


class Ragged(NamedTuple):
    """Which tokens of a flat batch belong to which sequence and where its pages are; see `paged_attention`."""

    block_tables: Int[Array, "R C"]
    lengths: Int[Array, "R"]
    starts: Int[Array, "R+1"]
    num_sequences: Int[Array, ""]


class Attention(nnx.Module):
    """Grouped-query attention. `kind`: "global", or "local" (sees `sliding_window` tokens)."""

    def __init__(self, config: ModelConfig, kind: str, rngs: nnx.Rngs, stack: Stack = ()):
        self.config = config
        self.window = config.sliding_window if kind == "local" else None
        d, n, k, h = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim

        def make(name: str, shape: tuple[int, ...], std: float) -> nnx.Param:
            return parameter(rngs, config, stack, shape, WEIGHTS[name], std)

        self.q = make("q", (d, n, h), INIT_STD)
        self.k = make("k", (d, k, h), INIT_STD)
        self.v = make("v", (d, k, h), INIT_STD)
        self.o = make("o", (n, h, d), out_std(config))
        self.q_bias = make("q_bias", (n, h), 0.0) if config.qkv_bias else None
        self.k_bias = make("k_bias", (k, h), 0.0) if config.qkv_bias else None
        self.v_bias = make("v_bias", (k, h), 0.0) if config.qkv_bias else None
        self.o_bias = make("o_bias", (d,), 0.0) if config.attention_out_bias else None
        self.q_norm = Norm(config, rngs, stack, h, "rmsnorm") if config.qk_norm else None
        self.k_norm = Norm(config, rngs, stack, h, "rmsnorm") if config.qk_norm else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: Rope | None,
        segment_ids: Int[Array, "B T"] | None,
        cache: Cache | KVPages | None = None,
        offset: Int[Array, "B"] | Ragged | None = None,
        adapters: tuple[Array, dict] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | KVPages | None]:
        """With a cache, the T new tokens of sequence b are written at offset[b] and see all before them.

        With pages, B is 1 and the T tokens are those of many sequences, as `offset` (then a Ragged) says.
        """
        weights, names = present(self, WEIGHTS)
        for name, head_norm in (("q_norm", self.q_norm), ("k_norm", self.k_norm)):
            if head_norm is not None:
                weights[name], names[name] = head_norm.scale[...], ("norm",)
        options = {
            "window": self.window,
            "softcap": self.config.attention_softcap,
            "scale": self.config.attention_scale,
        }
        batch, sequence = token_dims(x.shape)
        if cache is not None and axis_size("context") > 1:
            sequence = None  # the cache is not split by tokens
        tokens = (batch, "sequence" if sequence else None)
        add_adapters(weights, names, WEIGHTS, adapters, (batch, None))
        turns = None if rope is None else ((*tokens, None, None),) * 2
        stream = (batch, sequence, None)
        if cache is None:
            if segment_ids is None:
                segment_ids = jnp.zeros(x.shape[:2], jnp.int32)
            run = functools.partial(_attend, self.config, options, sequence)
            return sharded(run, (stream, turns, tokens, names), stream)(x, rope, segment_ids, weights), None
        assert offset is not None, "a cache needs the place of its new tokens"
        if isinstance(cache, KVPages):
            pool: Any = (None, "kv_heads", None, None, None)
            scales: Any = None if cache.scales is None else ("kv_heads", None, None)
            paged, places = KVPages(pool, scales), Ragged((None, None), (None,), (None,), ())  # type: ignore[arg-type]
            run = functools.partial(_attend_paged, self.config, options, sequence)
            return sharded(run, (stream, turns, paged, places, names), (stream, paged))(x, rope, cache, offset, weights)
        layer: Any = (batch, None, "kv_heads", None)
        kept = Cache(layer, layer)
        run = functools.partial(_attend_cached, self.config, options, sequence)
        return sharded(run, (stream, turns, kept, (batch,), names), (stream, kept))(x, rope, cache, offset, weights)


def _attend(config: ModelConfig, options: dict, sequence: str | None, x, rope, segment_ids, w: dict[str, Any]):
    """One device's sequences, heads and queries; keys and values are gathered over `context`."""
    q, k, v = _project_in(config, gather_tokens(x, sequence), rope, w)
    offset: int | jax.Array = 0
    key_ids = segment_ids
    if sequence is not None and axis_size("context") > 1:
        offset = jax.lax.axis_index("context") * q.shape[1]
        k, v, key_ids = (jax.lax.all_gather(a, "context", axis=1, tiled=True) for a in (k, v, segment_ids))
    out = pallas_kernels.attention(
        q, k, v, q_offset=offset, q_segment_ids=segment_ids, kv_segment_ids=key_ids, **options
    )
    return _project_out(out, sequence, w)


def _attend_cached(config: ModelConfig, options: dict, sequence: str | None, x, rope, cache, offset, w: dict[str, Any]):
    q, k, v = _project_in(config, gather_tokens(x, sequence), rope, w)
    cache = Cache(_write(cache.k, k, offset), _write(cache.v, v, offset))
    # One query a sequence only reads the cache: a kernel would have all of it laid out anew first.
    wanted = "xla" if q.shape[1] == 1 else None
    out = pallas_kernels.attention(q, cache.k, cache.v, q_offset=offset, implementation=wanted, **options)
    return _project_out(out, sequence, w), cache


def _attend_paged(config: ModelConfig, options: dict, sequence: str | None, x, rope, pages, at: Ragged, w: dict):
    q, k, v = _project_in(config, gather_tokens(x, sequence), rope, w)
    out, pages = pallas_kernels.paged_attention(q[0], k[0], v[0], pages, *at, **options)
    return _project_out(out[None], sequence, w), pages


def _project_in(config: ModelConfig, x: Float[Array, "B T D"], rope: Rope | None, w: dict[str, Any]):
    weights = {name: _matrix(w, name, x.dtype) for name in ("q", "k", "v")}
    products = project_together(x, weights, {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads})

    def one(name: str) -> Float[Array, "B T heads H"]:
        y = adapted(products[name], x, w, name).reshape(*x.shape[:2], -1, config.head_dim)
        if f"{name}_bias" in w:
            y = y + w[f"{name}_bias"].astype(x.dtype)
        if f"{name}_norm" in w:
            y = norm(config, y, w[f"{name}_norm"])
        return checkpoint_name(y if rope is None or name == "v" else pallas_kernels.rotary(y, *rope), name)

    return one("q"), one("k"), one("v")


def _project_out(out: Float[Array, "B T N H"], sequence: str | None, w: dict[str, Any]) -> Float[Array, "B t D"]:
    out = out.reshape(*out.shape[:2], -1)
    y = sum_over_tensor(adapted(project(out, _matrix(w, "o", out.dtype)), out, w, "o"), sequence)
    y = y + w["o_bias"].astype(y.dtype) if "o_bias" in w else y
    return checkpoint_name(y, "attention_out")


def _matrix(w: dict[str, Any], name: str, dtype) -> Any:
    """A projection's weight, gathered, with its heads side by side: [D, heads * H], or [heads * H, D] for "o".

    Side by side before it is gathered: a TPU pads a few heads to eight, and scatters the gradient's sums only of what
    it has not padded.
    """
    weight, names = w[name], WEIGHTS[name]
    if isinstance(weight, jax.Array):
        weight = weight.reshape((weight.shape[0], -1) if name != "o" else (-1, weight.shape[-1]))
    return whole(weight, tuple(part for part in names if part != "head_dim"), dtype)


def _write(cache: Float[Array, "B S K H"], new: Float[Array, "B T K H"], offset: Int[Array, "B"]):
    new, sequences = new.astype(cache.dtype), jnp.arange(new.shape[0])
    if new.shape[1] > 1:
        return jax.vmap(lambda row, part, at: jax.lax.dynamic_update_slice(row, part, (at, 0, 0)))(cache, new, offset)
    # Of one token a sequence the compiler makes a loop over the sequences, unless it knows that they do not meet.
    place = cache.at[sequences, offset]
    return place.set(new[:, 0], unique_indices=True, indices_are_sorted=True, mode="promise_in_bounds")
