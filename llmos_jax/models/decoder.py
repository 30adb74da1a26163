"""The one decoder: every family is a `ModelConfig`, none is a class.

`Decoder` is a Flax NNX module whose layers are stacked over their repeats and scanned. Outside of a program its
parameters are a flat dict from dotted path ("segments.0.0.attention.q") to array; `bind` puts the two together.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from llmos_jax.config import ModelConfig
from llmos_jax.models.attention import Attention, Ragged
from llmos_jax.models.cache import Cache
from llmos_jax.models.layers import INIT_STD, Adapters, Embed, Mlp, Norm, Stack, parameter, rope_tables
from llmos_jax.models.moe import Moe
from llmos_jax.models.parameters import Params
from llmos_jax.models.quantized import QuantizedTensor, product
from llmos_jax.sharding import constrain, sharding, token_dims
from pallas_kernels import KVPages
from pallas_kernels.cpu import NAME as NAME_OF_PRODUCTS
from pallas_kernels.cpu import matmul_float32
from pallas_kernels.dispatch import current_chip

Layer = jax.Array | QuantizedTensor
Unstacked = dict[str, Layer | tuple[Layer, ...]]  # a stack of layers as one array each


class Block(nnx.Module):
    """One layer: attention and feed-forward, each with its norm before (and after, where the family has it)."""

    def __init__(self, config: ModelConfig, kinds: tuple[str, str], rngs: nnx.Rngs, stack: Stack = ()):
        self.kind, feed_forward = kinds
        self.attention_norm = Norm(config, rngs, stack)
        self.attention = Attention(config, self.kind, rngs, stack)
        self.attention_out_norm = Norm(config, rngs, stack) if config.sandwich_norm else None
        self.mlp_norm = Norm(config, rngs, stack)
        self.mlp = Mlp(config, rngs, stack) if feed_forward == "mlp" else None
        self.moe = Moe(config, rngs, stack) if feed_forward == "moe" else None
        self.mlp_out_norm = Norm(config, rngs, stack) if config.sandwich_norm else None

    def __call__(self, x, context: "Context", cache: Cache | KVPages | None = None, adapters: Any = None):
        """x [B, T, D] -> (x, load-balance loss, cache)."""
        aux = jnp.zeros((), jnp.float32)
        with jax.named_scope("attention"):
            y, cache = self.attention(
                self.attention_norm(x), context.rope[self.kind], context.segment_ids, cache, context.offset, adapters
            )
            x = x + (y if self.attention_out_norm is None else self.attention_out_norm(y))
        with jax.named_scope("mlp" if self.moe is None else "moe"):
            y = self.mlp_norm(x)
            if self.moe is not None:
                y, aux = self.moe(y, context.token_mask)
            elif self.mlp is not None:
                y = self.mlp(y, adapters)
            x = x + (y if self.mlp_out_norm is None else self.mlp_out_norm(y))
        return x, aux, cache


class Context(NamedTuple):
    """What every layer of one forward pass shares."""

    rope: dict[str, tuple[Array, Array] | None]
    segment_ids: Int[Array, "B T"] | None
    token_mask: Float[Array, "B T"]
    offset: Int[Array, "B"] | Ragged | None


class Output(NamedTuple):
    hidden: Float[Array, "B T D"]  # after the last norm
    aux_loss: Float[Array, ""]  # mean load-balance loss of the MoE layers, 0 for a dense model
    cache: tuple[Cache | KVPages, ...] | None  # one a layer


class Decoder(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embed(config, rngs)
        self.segments = nnx.List(
            nnx.List(Block(config, kinds, rngs, (segment.repeats,)) for kinds in segment.kinds)
            for segment in config.segments
        )
        self.final_norm = Norm(config, rngs)
        self.head = None if config.tie_embeddings else Head(config, rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: tuple[Cache | KVPages, ...] | None = None,
        offset: Int[Array, "B"] | Ragged | None = None,
        adapters: Adapters | None = None,
    ) -> Output:
        """Hidden states of `tokens`.

        Args:
          positions: of each token in its document; 0, 1, 2, ... (from `offset`) if None.
          segment_ids: documents packed into one row; a token sees its own only. 0 is padding.
          cache, offset: decode. The T tokens of sequence b stand at offset[b]; the cache holds what came before. With
            pages as cache, tokens are [1, T] of many sequences, `offset` says which, and `positions` are needed.
          adapters: with a cache only.
        """
        if positions is None:
            assert not isinstance(offset, Ragged), "a ragged batch needs positions"
            start = jnp.zeros((tokens.shape[0],), jnp.int32) if offset is None else offset
            positions = jnp.arange(tokens.shape[1]) + start[:, None]
        token_mask = jnp.ones(tokens.shape, jnp.float32) if segment_ids is None else (segment_ids > 0) * 1.0
        context = Context(self._rope(positions), segment_ids, token_mask, offset)
        with jax.named_scope("embed"):
            x = self.embed(tokens, positions)
        if cache is None:
            x, aux = self._scan(x, context)
        else:
            x, aux, cache = self._unrolled(x, context, cache, adapters)
        num_moe = sum(kind == "moe" for _, kind in self.config.layer_kinds)
        return Output(self.final_norm(x), aux / max(num_moe, 1), cache)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """In float32, for generation; training never builds them (see train/objectives.py)."""
        weight, transposed = self.output_weight()
        if isinstance(weight, QuantizedTensor):
            logits = product(hidden, weight, jnp.float32)
        else:
            logits = matmul_float32(hidden, weight.astype(hidden.dtype), transposed)
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def output_weight(self) -> tuple[Array | QuantizedTensor, bool]:
        """The output projection and whether it is transposed, [V, D]: the embedding table where they are tied."""
        return (self.embed.table.get_value(), True) if self.head is None else (self.head.kernel.get_value(), False)

    def _rope(self, positions):
        config = self.config
        if config.position != "rope":
            return dict.fromkeys(config.layer_pattern)
        return {
            kind: rope_tables(config.rope, config.head_dim, positions, local=kind == "local")
            for kind in sorted(set(config.layer_pattern))
        }

    def _scan(self, x, context: Context):
        aux = jnp.zeros((), jnp.float32)
        for segment in self.segments:
            graphs, states = zip(*(nnx.split(block) for block in segment), strict=True)

            def body(carry, layer, graphs=graphs):
                x, aux = carry
                x = checkpoint_name(x, "input")
                for graph, state in zip(graphs, layer, strict=True):
                    x, extra, _ = nnx.merge(graph, state)(x, context)
                    aux = aux + extra
                return (constrain(x, *token_dims(x.shape), None), aux), None

            body = rematerialized(body, self.config)
            if self.config.scan_layers:
                (x, aux), _ = jax.lax.scan(body, (x, aux), states)
                continue
            leaves, structure = jax.tree.flatten(states)
            for parts in zip(*map(unstack, leaves), strict=True):
                (x, aux), _ = body((x, aux), jax.tree.unflatten(structure, parts))
        return x, aux

    def _unrolled(self, x, context: Context, cache: tuple[Cache | KVPages, ...], adapters: Adapters | None):
        aux = jnp.zeros((), jnp.float32)
        caches: list[Cache | KVPages | None] = []
        for layer in range(self.config.num_layers):
            s, j, r = self.config.layer_slot(layer)
            graph, state = nnx.split(self.segments[s][j])
            values = {path: variable.get_value()[r] for path, variable in nnx.to_flat_state(state)}
            own = None if adapters is None else (adapters.mask, adapters.layers[layer])
            x, extra, layer_cache = _merge(graph, values)(x, context, cache[layer], own)
            aux = aux + extra
            caches.append(layer_cache)
        return x, aux, tuple(caches)


class Head(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        shape = (config.embed_dim, config.vocab_size)
        self.kernel = parameter(rngs, config, (), shape, ("embed", "vocab"), INIT_STD)


@jax.custom_vjp
def unstack(stacked: Float[Array, "R *rest"]) -> tuple[Array, ...]:
    """The parts of a stack. Their gradients are stacked once; those of slices would each be padded to the whole stack."""
    return tuple(stacked[i] for i in range(stacked.shape[0]))


unstack.defvjp(lambda stacked: (unstack(stacked), None), lambda _, parts: (jnp.stack(parts),))


def rematerialized(body, config: ModelConfig):
    """`body` recomputing in the backward pass what the configuration (model.remat) does not keep."""
    policies = jax.checkpoint_policies
    if config.remat == "none":
        return body
    if config.remat == "names":
        on_host = () if current_chip().platform == "cpu" else config.remat_offload  # a CPU's memory is the host's
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[*config.remat_save, *(set(config.remat_offload) - set(on_host))],
            names_which_can_be_offloaded=list(on_host),
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        kept = {
            "full": policies.nothing_saveable,
            "dots": policies.dots_saveable,
            "dots_no_batch": policies.dots_with_no_batch_dims_saveable,
        }[config.remat]
        ours = policies.save_only_these_names(NAME_OF_PRODUCTS)
        policy = kept if config.remat == "full" else policies.save_from_both_policies(kept, ours)
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


# The parameters outside of a program.


@functools.lru_cache(maxsize=32)
def _structure(config: ModelConfig):
    """The module's graph, and (path, shape, dtype, logical dimensions) of each parameter, without any array."""
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
        model = nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(params=0)))
    graph, state = nnx.split(model)
    return graph, tuple(
        (path, variable.get_value().shape, variable.get_value().dtype, variable.get_metadata("logical"))
        for path, variable in nnx.to_flat_state(state)
    )


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def _merge(graph, values: Mapping[tuple, Any]):
    return nnx.merge(graph, nnx.from_flat_state([(path, nnx.Param(value)) for path, value in values.items()]))


def logical_dims(config: ModelConfig) -> dict[str, tuple[str | None, ...]]:
    """The names of the dimensions of every parameter, by its dotted path."""
    return {_dotted(path): logical for path, _, _, logical in _structure(config)[1]}


def abstract_params(config: ModelConfig, mesh: Mesh | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter, and its sharding where a mesh is given; no memory is taken."""
    return {
        _dotted(path): jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, logical) if mesh else None)
        for path, shape, dtype, logical in _structure(config)[1]
    }


def init_params(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh parameters; under `jax.jit` with `out_shardings` they are born sharded, the same on every mesh."""
    _, state = nnx.split(Decoder(config, nnx.Rngs(params=key)))
    return {_dotted(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def bind(config: ModelConfig, params: Params | Unstacked) -> Decoder:
    """The module with `params` as its parameters; call it inside a program."""
    graph, entries = _structure(config)
    return _merge(graph, {path: params[_dotted(path)] for path, *_ in entries})


def num_params(config: ModelConfig) -> int:
    return sum(leaf.size for leaf in abstract_params(config).values())


def forward_logits(config: ModelConfig, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Logits of every position in float32; for tests and scoring of short texts."""
    model = bind(config, params)
    return model.logits(model(tokens).hidden)
