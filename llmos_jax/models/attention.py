"""The attention layer: projections, head norms, rotary positions, the KV cache, and the kernel under its mesh."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import pallas_kernels
from llmos_jax.config import ModelConfig
from llmos_jax.models.layers import INIT_STD, Norm, Stack, apply_rope, out_std, parameter, project
from llmos_jax.sharding import axis_size, constrain, sharded


class Cache(NamedTuple):
    """Keys and values of one layer for S tokens."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]


class Attention(nnx.Module):
    """Grouped-query attention. `kind`: "global", or "local" (sees `sliding_window` tokens)."""

    def __init__(self, config: ModelConfig, kind: str, rngs: nnx.Rngs, stack: Stack = ()):
        self.config = config
        self.window = config.sliding_window if kind == "local" else None
        d, n, k, h = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        make = functools.partial(parameter, rngs, config, stack)
        self.q = make((d, n, h), ("embed", "heads", "head_dim"), INIT_STD)
        self.k = make((d, k, h), ("embed", "kv_heads", "head_dim"), INIT_STD)
        self.v = make((d, k, h), ("embed", "kv_heads", "head_dim"), INIT_STD)
        self.o = make((n, h, d), ("heads", "head_dim", "embed"), out_std(config))
        self.q_bias = make((n, h), ("heads", "head_dim"), 0.0) if config.qkv_bias else None
        self.k_bias = make((k, h), ("kv_heads", "head_dim"), 0.0) if config.qkv_bias else None
        self.v_bias = make((k, h), ("kv_heads", "head_dim"), 0.0) if config.qkv_bias else None
        self.o_bias = make((d,), ("norm",), 0.0) if config.attention_out_bias else None
        self.q_norm = Norm(config, rngs, stack, h, "rmsnorm") if config.qk_norm else None
        self.k_norm = Norm(config, rngs, stack, h, "rmsnorm") if config.qk_norm else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope: tuple[Array, Array] | None,
        segment_ids: Int[Array, "B T"] | None,
        cache: Cache | None = None,
        offset: Int[Array, "B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """With a cache, the T new tokens of sequence b are written at offset[b] and see all before them."""
        q = self._project(x, self.q, self.q_bias, self.q_norm, "heads")
        k = self._project(x, self.k, self.k_bias, self.k_norm, "kv_heads")
        v = self._project(x, self.v, self.v_bias, None, "kv_heads")
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        if cache is None:
            out = self._attend(q, k, v, segment_ids)
        else:
            assert offset is not None, "a cache needs the place of its new tokens"
            cache = Cache(_write(cache.k, k, offset), _write(cache.v, v, offset))
            out = pallas_kernels.attention(q, cache.k, cache.v, q_offset=offset, **self._options())
        out = project(out, self.o[...], num_in=2)
        if self.o_bias is not None:
            out = out + self.o_bias[...].astype(x.dtype)
        return constrain(out, "batch", "sequence", None), cache

    def _project(self, x, weight, bias, norm, heads: str) -> Float[Array, "B T N H"]:
        y = project(x, weight[...])
        if bias is not None:
            y = y + bias[...].astype(x.dtype)
        if norm is not None:
            y = norm(y)
        return constrain(y, "batch", "sequence", heads, None)

    def _options(self) -> dict:
        config = self.config
        return {"window": self.window, "softcap": config.attention_softcap, "scale": config.attention_scale}

    def _attend(self, q, k, v, segment_ids):
        """Each device takes its own sequences, heads and queries; keys and values are gathered over `context`."""
        if segment_ids is None:
            segment_ids = jnp.zeros(q.shape[:2], jnp.int32)
        num_parts = axis_size("context")

        def local(q, k, v, q_ids, kv_ids):
            offset = jax.lax.axis_index("context") * q.shape[1] if num_parts > 1 else 0
            return pallas_kernels.attention(
                q, k, v, q_offset=offset, q_segment_ids=q_ids, kv_segment_ids=kv_ids, **self._options()
            )

        queries, keys = ("batch", "sequence", "heads", None), ("batch", None, "kv_heads", None)
        run = sharded(local, (queries, keys, keys, ("batch", "sequence"), ("batch", None)), queries)
        return run(q, k, v, segment_ids, segment_ids)


def _write(cache: Float[Array, "B S K H"], new: Float[Array, "B T K H"], offset: Int[Array, "B"]):
    write = jax.vmap(lambda row, part, at: jax.lax.dynamic_update_slice(row, part, (at, 0, 0)))
    return write(cache, new.astype(cache.dtype), offset)
