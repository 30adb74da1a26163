"""Time of prefill and decode by formula: a server's half of analytic.py, under the same assumptions.

Sequences are split over data, fsdp and expert, heads over tensor. Weights that fsdp splits are gathered in every step.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from llmos_jax.compiler.analytic import BATCH_AXES, Sizes, itemsize, known, layer_flops
from llmos_jax.compiler.chips import MEMORY_SHARE, Chip
from llmos_jax.compiler.interconnect import AxisLinks
from llmos_jax.compiler.roofline import weights
from llmos_jax.compiler.target import Target
from llmos_jax.config import MeshConfig, ModelConfig


@dataclass(frozen=True)
class ServingTime:
    """Seconds of one program call: memory and arithmetic side by side, communication after them."""

    memory: float
    compute: float
    communication: float
    tokens: int  # that the call takes in (prefill) or gives (decode), over all devices

    @property
    def seconds(self) -> float:
        return max(self.memory, self.compute) + self.communication

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def cache_bytes(model: ModelConfig, batch: float, length: int) -> float:
    """Keys and values of `batch` sequences of `length` tokens, every layer whole, on all devices together."""
    return 2.0 * model.num_layers * model.num_kv_heads * model.head_dim * itemsize(model.dtype) * batch * length


def decode_time(
    model: ModelConfig,
    sizes: Sizes,
    target: Target,
    batch: int,
    length: int,
    links: Mapping[str, AxisLinks] | None = None,
) -> ServingTime:
    """One token for each of `batch` sequences of `length` tokens: all weights, keys and values are read."""
    return _time(model, sizes, target, batch, 1, length, links)


def prefill_time(
    model: ModelConfig,
    sizes: Sizes,
    target: Target,
    batch: int,
    length: int,
    links: Mapping[str, AxisLinks] | None = None,
) -> ServingTime:
    """`batch` prompts of `length` tokens each."""
    return _time(model, sizes, target, batch, length, length, links)


def _time(model: ModelConfig, sizes: Sizes, target: Target, batch: int, query: int, length: int, links) -> ServingTime:
    chip, compute = known(target.chip), itemsize(model.dtype)
    links = links or target.axis_links(target.mesh(MeshConfig(**sizes)))
    rows = math.ceil(batch / math.prod(sizes[axis] for axis in BATCH_AXES))
    tokens, tensor = rows * query, sizes["tensor"]
    read = _weights_read(model, sizes, tokens) * compute + _cache_read(model, rows, length) / tensor
    bandwidth = chip.memory_bandwidth * MEMORY_SHARE
    return ServingTime(
        memory=read / bandwidth,
        compute=_flop_seconds(model, sizes, chip, rows, query, length),
        communication=_communication(model, sizes, links, tokens),
        tokens=batch * query,
    )


def _weights_read(model: ModelConfig, sizes: Sizes, tokens: int) -> float:
    """Elements a device reads: all it multiplies with, of the experts those that some token chose (on average, of
    tokens that choose evenly)."""
    total, tokens = 0.0, tokens * sizes["expert"]  # tokens of the expert group come together
    unchosen = (1 - model.num_experts_per_token / model.num_experts) ** tokens if model.num_experts else 0.0
    for weight in weights(model):
        if weight.part == "embedding" and not model.tie_embeddings:
            continue  # a lookup
        share = 1 - unchosen if weight.part == "experts" else 1.0
        total += share * weight.local_size(sizes, ("fsdp",))
    return total


def _cache_read(model: ModelConfig, rows: int, length: int) -> float:
    """Bytes of keys and values that queries at the end of `length` tokens see."""
    seen = [min(length, model.sliding_window or length) if kind == "local" else length for kind, _ in model.layer_kinds]
    return cache_bytes(model, rows, 1) / model.num_layers * sum(seen)


def _flop_seconds(model: ModelConfig, sizes: Sizes, chip: Chip, rows: int, query: int, length: int) -> float:
    dense, grouped, attention = layer_flops(model, length)
    if query == 1:  # one query for each sequence, against all of its keys
        pairs = _cache_read(model, 1, length) / (2 * model.num_kv_heads * model.head_dim * itemsize(model.dtype))
        attention = 4.0 * model.num_heads * model.head_dim * pairs
    peak, tensor = chip.peak_flops(model.dtype), sizes["tensor"]
    head = model.embed_dim * model.vocab_size  # of the last token only
    products = 2.0 * rows * (query * (dense + grouped) + head) / (peak * chip.matmul_share)
    return (products + rows * attention / (peak * chip.attention_share)) / tensor


def _communication(model: ModelConfig, sizes: Sizes, links: Mapping[str, AxisLinks], tokens: int) -> float:
    """Two sums of the stream over tensor a layer, tokens of the experts gathered and summed, weights gathered."""
    compute = itemsize(model.dtype)
    stream = tokens * model.embed_dim * compute
    num_moe = sum(kind == "moe" for _, kind in model.layer_kinds)
    gathered = stream * sizes["expert"]
    expert = links["expert"].seconds("all-gather", gathered) + links["expert"].seconds("reduce-scatter", gathered)
    fsdp = sum(
        weight.layers
        * links["fsdp"].seconds("all-gather", weight.local_size(sizes, ("fsdp",)) / weight.layers * compute)
        for weight in weights(model)
        if weight.part not in ("norms", "router")
    )
    return 2 * model.num_layers * links["tensor"].seconds("all-reduce", stream) + num_moe * expert + fsdp
