"""Time of prefill and decode by formula: a server's half of analytic.py, under the same assumptions.

Sequences are split over data, fsdp and expert, heads over tensor. Weights that fsdp splits are gathered in every step.
"""

import math
from collections.abc import Iterable, Mapping
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


def cache_bytes(model: ModelConfig, batch: float, length: int, kv_width: float = 0) -> float:
    """Keys and values of `batch` sequences of `length` tokens, every layer whole, on all devices together.

    kv_width: bytes of one number, 0 for the dtype of computation.
    """
    width = kv_width or itemsize(model.dtype)
    return 2.0 * model.num_layers * model.num_kv_heads * model.head_dim * width * batch * length


def decode_time(
    model: ModelConfig,
    sizes: Sizes,
    target: Target,
    batch: int,
    length: int,
    links: Mapping[str, AxisLinks] | None = None,
    kv_width: float = 0,
) -> ServingTime:
    """One token for each of `batch` sequences of `length` tokens: all weights, keys and values are read."""
    return _time(model, sizes, target, batch, 1, length, links, kv_width)


def prefill_time(
    model: ModelConfig,
    sizes: Sizes,
    target: Target,
    batch: int,
    length: int,
    links: Mapping[str, AxisLinks] | None = None,
    kv_width: float = 0,
) -> ServingTime:
    """`batch` prompts of `length` tokens each."""
    return _time(model, sizes, target, batch, length, length, links, kv_width)


def paged_attention_work(
    model: ModelConfig, tensor: int, spans: Iterable[tuple[int, int]], kv_width: float = 0
) -> tuple[float, float]:
    """(FLOPs, HBM bytes) of a device in one call of the kernel, the mean over layers.

    spans: of each sequence (tokens before this call, new tokens); a query sees all up to itself, keys and values are
    read once a sequence. Queries, results and the new tokens' pages are next to nothing beside them.
    """
    flops = moved = 0.0
    width = 2 * model.num_kv_heads * model.head_dim * (kv_width or itemsize(model.dtype))
    for before, new in spans:
        for kind, _ in model.layer_kinds:
            window = model.sliding_window if kind == "local" and model.sliding_window else before + new
            pairs = sum(min(window, before + i + 1) for i in range(new))
            flops += 4.0 * model.num_heads * model.head_dim * pairs
            moved += width * min(before + new, window + new)
    return flops / model.num_layers / tensor, moved / model.num_layers / tensor


def _time(
    model: ModelConfig, sizes: Sizes, target: Target, batch: int, query: int, length: int, links, kv_width: float
) -> ServingTime:
    chip = known(target.chip)
    links = links or target.axis_links(target.mesh(MeshConfig(**sizes)))
    rows = math.ceil(batch / math.prod(sizes[axis] for axis in BATCH_AXES))
    tokens, tensor = rows * query, sizes["tensor"]
    read = _weights_read(model, sizes, tokens) + _cache_read(model, rows, length, kv_width) / tensor
    bandwidth = chip.memory_bandwidth * MEMORY_SHARE
    return ServingTime(
        memory=read / bandwidth,
        compute=_flop_seconds(model, sizes, chip, rows, query, length),
        communication=_communication(model, sizes, links, tokens),
        tokens=batch * query,
    )


def _weights_read(model: ModelConfig, sizes: Sizes, tokens: int) -> float:
    """Bytes a device reads: all it multiplies with, of the experts those that some token chose (on average, of
    tokens that choose evenly)."""
    total, tokens = 0.0, tokens * sizes["expert"]  # tokens of the expert group come together
    unchosen = (1 - model.num_experts_per_token / model.num_experts) ** tokens if model.num_experts else 0.0
    for weight in weights(model):
        if weight.part == "embedding" and not model.tie_embeddings:
            continue  # a lookup
        share = 1 - unchosen if weight.part == "experts" else 1.0
        total += share * weight.local_size(sizes, ("fsdp",)) * _width(model, weight.part)
    return total


def _width(model: ModelConfig, part: str) -> float:
    """Bytes of a served weight; scales and zero points are left out."""
    if model.quantize == "none" or part not in ("attention", "mlp", "experts", "embedding", "head"):
        return itemsize(model.dtype)
    return 0.5 if model.quantize == "int4" and part not in ("embedding", "head") else 1.0


def _cache_read(model: ModelConfig, rows: float, length: int, kv_width: float = 0) -> float:
    """Bytes of keys and values that queries at the end of `length` tokens see, on all devices together."""
    seen = [min(length, model.sliding_window or length) if kind == "local" else length for kind, _ in model.layer_kinds]
    return cache_bytes(model, rows, 1, kv_width) / model.num_layers * sum(seen)


def _flop_seconds(model: ModelConfig, sizes: Sizes, chip: Chip, rows: int, query: int, length: int) -> float:
    dense, grouped, attention = layer_flops(model, length)
    if query == 1:  # one query for each sequence, against all of its keys
        pairs = _cache_read(model, 1, length) / (2 * model.num_kv_heads * model.head_dim * itemsize(model.dtype))
        attention = 4.0 * model.num_heads * model.head_dim * pairs
    peak, tensor = chip.peak_flops(model.dtype), sizes["tensor"]
    of_products = chip.peak_flops("int8") if model.quantize == "int8" else peak
    head = model.embed_dim * model.vocab_size  # of the last token only
    products = 2.0 * rows * (query * (dense + grouped) + head) / (of_products * chip.matmul_share)
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
