"""Memory and time by formula, before anything is compiled: the first of three estimates, and what a search scores with.

Bytes and seconds are of one device. What is assumed:
- Parameters, gradients and optimizer state are split as sharding.py says. The residual stream between layers is split
  over `tensor` along the sequence; inside a layer, activations are split over `tensor` by heads and by mlp columns.
- The backward pass recomputes one body of the scan at a time: one layer, or one period of `layer_pattern`.
- Products reach `matmul_share` and attention `attention_share` of the chip's peak; HBM gives MEMORY_SHARE of its
  bandwidth.
- Gathers of weights and sums of gradients (fsdp, data) run beside the layers' arithmetic, forward and backward apart,
  and cost only what is left over. Activations (tensor, context, expert) are waited for.
- Experts are equally busy. Time between steps, input and checkpoints are not in it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from llmos_jax.compiler.chips import CHIPS, MEMORY_SHARE, Chip
from llmos_jax.compiler.interconnect import AxisLinks
from llmos_jax.compiler.roofline import Weight, attention_pairs, train_flops, weights
from llmos_jax.compiler.target import Target
from llmos_jax.config import MeshConfig, ModelConfig, RunConfig, require

# Bytes of a chunk of logits and of their gradient in the fused loss (pallas_kernels/linear_cross_entropy): on a TPU one lies
# in the other's place, and a chunk has at most that share of the memory.
LOGITS_BYTES = {"tpu": 2**31, "gpu": 2**29, "cpu": 2**27}
TPU_LOGITS_SHARE = 1 / 16
FACTORED_FROM = 128  # adafactor factors a matrix whose two largest dimensions are at least this (optax)
BATCH_AXES = ("data", "fsdp", "expert")  # those that hold different sequences

Sizes = Mapping[str, int]  # of each mesh axis


def itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def known(chip: Chip) -> Chip:
    """`chip`, or UserError where the table has no peaks for it."""
    require(
        min(chip.bf16, chip.memory_bandwidth, chip.link_bandwidth) > 0,
        f"no peaks are known for a {chip.name}; name a target with one of {', '.join(CHIPS)}",
    )
    return chip


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one device at the worst moment of a step."""

    parameters: float
    optimizer: float
    gradients: float  # float32 sums of micro-batches included
    activations: float  # kept for the backward pass
    working: float  # the largest of: one body backward, the loss, the embedding's gradient
    batch: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def fits(self, chip: Chip) -> bool:
        return self.total <= chip.usable_bytes


def training_memory(config: RunConfig, sizes: Sizes, chip: Chip) -> TrainingMemory:
    """Of one step of `config` on a mesh of `sizes` (config.mesh_shape)."""
    model, train = config.model, config.train
    stored, compute = itemsize(model.param_dtype), itemsize(model.dtype)
    parameters = sum(weight.local_size(sizes) for weight in weights(model))
    tokens = _local_tokens(config, sizes)
    bodies = sum(segment.repeats for segment in model.segments)
    kept = bodies * tokens * model.embed_dim / sizes["tensor"]
    if model.remat == "names":
        kept *= "input" not in model.remat_offload
        kept += model.num_layers * tokens * _named_elements(model) / sizes["tensor"]
    elif model.remat != "full":
        kept += tokens * sum(_kept_elements(model, kind, model.remat, sizes) for kind in model.layer_kinds)
    if (
        model.remat == "none"
    ):  # stacked by the scan: the norms' float32 inputs and results, the activation's, the weights
        wide = model.mlp_dim if not model.num_experts else _rows(model, sizes) * model.expert_mlp_dim
        kept += model.num_layers * tokens * (8 * model.embed_dim + 3 * wide / sizes["tensor"])
        kept += sum(_layer_elements(model, kind, sizes, ("fsdp",)) for _, kind in model.layer_kinds)
    return TrainingMemory(
        parameters=parameters * stored,
        optimizer=_optimizer_elements(config, sizes) * stored,
        gradients=parameters * (stored + (4 if train.accumulate > 1 else 0)),
        activations=kept * compute,
        working=max(
            _body_bytes(model, tokens, sizes),
            _loss_bytes(model, tokens, sizes, chip),
            _embedding_gradient(model, sizes),
        ),
        batch=tokens * train.accumulate * 20.0,  # four int32 fields and a float32 one
    )


def _local_tokens(config: RunConfig, sizes: Sizes) -> float:
    """Tokens of a micro-batch on one device."""
    rows = config.train.batch_size / config.train.accumulate / math.prod(sizes[axis] for axis in BATCH_AXES)
    return rows * config.train.seq_len / sizes["context"]


def _kept_elements(model: ModelConfig, kind: tuple[str, str], remat: str, sizes: Sizes) -> float:
    """Elements a token that a layer keeps beyond its input. "none": what each operation's gradient needs;
    "dots": the results of dense products (attention and grouped products are kernels, and are recomputed)."""
    d, h, tensor = model.embed_dim, model.head_dim, sizes["tensor"]
    heads = (model.num_heads + 2 * model.num_kv_heads) * h / tensor
    f, k = model.mlp_dim / tensor, model.num_experts_per_token
    if remat != "none":
        mlp = (2 if model.gated_mlp else 1) * f if kind[1] == "mlp" else 0.0
        return heads + mlp + (2 * d / tensor if kind[1] == "mlp" else d / tensor)
    attended = model.num_heads * h / tensor + 2 * model.num_heads / tensor  # and the logsumexp in float32
    normed = 2 * d + d / tensor  # both norms' results, gathered; the stream between the two halves
    if model.qk_norm:
        heads += (model.num_heads + model.num_kv_heads) * h / tensor
    if kind[1] == "mlp":
        return heads + attended + normed + (3 if model.gated_mlp else 2) * f
    # Tokens are gathered over `expert`, and each has a row for each of its k choices.
    rows = k * sizes["expert"]
    return heads + attended + normed + rows * (2 * d + 3 * model.expert_mlp_dim / tensor)


def _named_elements(model: ModelConfig) -> float:
    """Elements a token and layer that model.remat_save keeps on the device."""
    heads, kv, d, f = (
        model.num_heads * model.head_dim,
        model.num_kv_heads * model.head_dim,
        model.embed_dim,
        model.mlp_dim,
    )
    sizes = {"q": heads, "k": kv, "v": kv, "attention": heads, "attention_out": d, "gate": f, "up": f, "mlp_out": d}
    return float(sum(sizes.get(name, 0) for name in model.remat_save))


def _body_bytes(model: ModelConfig, tokens: float, sizes: Sizes) -> float:
    """The backward pass of the largest body of the scan: its activations, their gradients in the widest place, its
    weights gathered over fsdp (and the next body's, on their way), and their gradients before they are scattered."""
    compute, largest = itemsize(model.dtype), 0.0
    for segment in model.segments:
        kept = sum(_kept_elements(model, kind, "none", sizes) for kind in segment.kinds)
        widest = max(
            3 * (model.mlp_dim if kind[1] == "mlp" else _rows(model, sizes) * model.expert_mlp_dim) / sizes["tensor"]
            for kind in segment.kinds
        )
        gathered = sum(_layer_elements(model, kind[1], sizes, ("fsdp",)) for kind in segment.kinds)
        largest = max(largest, tokens * (kept + widest) * compute + 3 * gathered * compute)
    return largest


def _rows(model: ModelConfig, sizes: Sizes) -> int:
    """Rows that a token has in the grouped products."""
    return model.num_experts_per_token * sizes["expert"]


def _layer_elements(model: ModelConfig, feed_forward: str, sizes: Sizes, without: tuple[str, ...] = ()) -> float:
    """Elements of one layer's matrices on a device."""
    parts = ("attention", "mlp") if feed_forward == "mlp" else ("attention", "experts", "router")
    of_this_kind = [kind for _, kind in model.layer_kinds].count(feed_forward)
    return sum(
        weight.local_size(sizes, without) / (model.num_layers if weight.part == "attention" else of_this_kind)
        for weight in weights(model)
        if weight.part in parts
    )


def _part(model: ModelConfig, *parts: str) -> list[Weight]:
    return [weight for weight in weights(model) if weight.part in parts]


def _head_elements(model: ModelConfig, sizes: Sizes, without: tuple[str, ...] = ()) -> float:
    """Of the output projection, which is the embedding table where they are tied."""
    return model.embed_dim * model.vocab_size / math.prod(sizes[a] for a in {"fsdp", "tensor"} - set(without))


def _loss_bytes(model: ModelConfig, tokens: float, sizes: Sizes, chip: Chip) -> float:
    """The last hidden states and their gradient, the gathered head, its float32 gradient as it is summed and once more
    as it leaves the loss, a chunk of logits and of their gradient."""
    compute, head = itemsize(model.dtype), _head_elements(model, sizes, ("fsdp",))
    most, each = float(LOGITS_BYTES[chip.platform]), 8
    if chip.platform == "tpu":
        most, each = min(most, TPU_LOGITS_SHARE * chip.memory_bytes), compute
    logits = min(most, tokens * model.vocab_size / sizes["tensor"] * each)
    return 2 * tokens * model.embed_dim * compute + head * (compute + 8) + logits


def _embedding_gradient(model: ModelConfig, sizes: Sizes) -> float:
    """The table's gradient before it is scattered over fsdp, float32."""
    return 4.0 * _head_elements(model, sizes, ("fsdp",))


def _optimizer_elements(config: RunConfig, sizes: Sizes) -> float:
    name, every = config.optimizer.name, weights(config.model)
    whole = sum(weight.local_size(sizes) for weight in every)
    if name == "adamw":
        return 2 * whole
    if name == "lion" or (name == "sgd" and config.optimizer.b1):
        return whole
    if name == "sgd":
        return 0.0
    if name == "muon":  # momentum for the layers' matrices, adamw for the rest
        matrices = sum(w.local_size(sizes) for w in every if w.is_matrix and w.part != "head")
        return matrices + 2 * (whole - matrices)
    return sum(_factored_elements(weight, sizes) for weight in every)


def _factored_elements(weight: Weight, sizes: Sizes) -> float:
    """Adafactor's second moments: one without the largest dimension and one without the second largest, whole on every
    device; small arrays keep one as large as themselves, split as they are."""
    second, largest = sorted(weight.shape)[-2:] if len(weight.shape) > 1 else (0, 0)
    if second < FACTORED_FROM:
        return weight.local_size(sizes)
    return weight.size / largest + weight.size / second


@dataclass(frozen=True)
class TrainingTime:
    """Seconds of one optimizer step, and what they are made of. MFU counts useful FLOPs only (roofline.train_flops)."""

    compute: float  # products and attention, recomputation included
    recompute: float  # the part of `compute` that is done again
    memory: float  # reading and writing activations and weights, beside the arithmetic
    sorting: float  # rows sorted by expert and back, which waits for memory
    optimizer: float  # the update, which waits for memory
    communication: dict[str, float]  # by mesh axis, as if nothing ran beside it
    exposed: dict[str, float]  # by mesh axis, what is waited for
    step: float
    mfu: float
    tokens_per_second_per_chip: float


def training_time(
    config: RunConfig, sizes: Sizes, target: Target, links: Mapping[str, AxisLinks] | None = None
) -> TrainingTime:
    """Of one step of `config` on `target`, whose devices form a mesh of `sizes`.

    links: of each mesh axis; None asks the target, which describes its devices for it. Raises UserError where the
    chip's peaks are not known.
    """
    chip = known(target.chip)
    links = links or target.axis_links(target.mesh(MeshConfig(**sizes)))
    model, train = config.model, config.train
    forward, backward, again = _compute_seconds(config, target)
    memory = _traffic_bytes(config, sizes) / (chip.memory_bandwidth * MEMORY_SHARE)
    share_forward = forward / (forward + backward + again)
    ahead, behind = _weight_seconds(config, sizes, links)
    beside = {axis: ahead[axis] + behind[axis] for axis in ahead}
    waited = _activation_seconds(config, sizes, links)
    # fsdp and data work at the same time, on links of their own.
    hidden_forward = max(forward, memory * share_forward)
    hidden_backward = max(backward + again, memory * (1 - share_forward))
    exposed = {
        axis: max(0.0, ahead[axis] - hidden_forward) + max(0.0, behind[axis] - hidden_backward) for axis in ahead
    }
    exposed = {axis: exposed.get(axis, 0.0) + waited.get(axis, 0.0) for axis in sizes}
    communication = {axis: beside.get(axis, 0.0) + waited.get(axis, 0.0) for axis in sizes}
    # Parameters and moments are read and written.
    stored, local = itemsize(model.param_dtype), sum(w.local_size(sizes) for w in weights(model))
    touched = (3 * local + 2 * _optimizer_elements(config, sizes)) * stored  # gradients are read once
    optimizer = touched / (chip.memory_bandwidth * MEMORY_SHARE)
    sorting = _sorting_bytes(config, sizes) / (chip.memory_bandwidth * MEMORY_SHARE)
    step = hidden_forward + hidden_backward + sorting + optimizer + sum(exposed.values())
    useful = train_flops(model, train.seq_len) * train.batch_size / target.num_devices
    return TrainingTime(
        compute=forward + backward + again,
        recompute=again,
        memory=memory,
        sorting=sorting,
        optimizer=optimizer,
        communication=communication,
        exposed=exposed,
        step=step,
        mfu=useful / step / chip.peak_flops(model.dtype),
        tokens_per_second_per_chip=train.batch_size * train.seq_len / step / target.num_chips,
    )


def _compute_seconds(config: RunConfig, target: Target) -> tuple[float, float, float]:
    """(forward, backward, recomputation) of one step on one device."""
    model, train, chip = config.model, config.train, target.chip
    rows = train.batch_size / target.num_devices
    peak = chip.peak_flops(model.dtype)
    flops = layer_flops(model, train.seq_len)
    products, grouped = (2.0 * part * train.seq_len * rows / (peak * chip.matmul_share) for part in flops[:2])
    attention = flops[2] * rows / (peak * chip.attention_share)
    head = 2.0 * model.embed_dim * model.vocab_size * train.seq_len * rows / (peak * chip.matmul_share)
    again = 2.0 * _recomputed(model) * train.seq_len * rows / (peak * chip.matmul_share)
    again += (0.0 if model.remat == "none" else grouped) + (attention if _attends_again(model) else 0.0)
    # The loss makes its gradients in the forward pass, three products in all. Flash attention's backward pass has five
    # where the forward has two (arXiv:2205.14135).
    return products + grouped + attention + 3 * head, 2 * (products + grouped) + 2.5 * attention, again


def _saved(model: ModelConfig) -> set[str]:
    """Names of activations that are kept, here or on the host (config.ACTIVATIONS)."""
    return {*model.remat_save, *model.remat_offload} if model.remat == "names" else set()


def _attends_again(model: ModelConfig) -> bool:
    return model.remat != "none" and "attention" not in _saved(model)


def _recomputed(model: ModelConfig) -> float:
    """Parameters that a token meets in the dense products of all layers that the backward pass does again. The last one
    of a layer is among them only where a norm follows it: nothing else needs its result."""
    if model.remat not in ("full", "names"):
        return 0.0
    again, saved = 0.0, _saved(model)
    for _, feed_forward in model.layer_kinds:
        parts = _product_sizes(model)
        if feed_forward == "moe":
            parts = {name: size for name, size in parts.items() if name not in ("gate", "up", "mlp_out")}
            parts["router"] = model.embed_dim * model.num_experts
        elif not model.sandwich_norm:
            parts.pop("mlp_out")
        again += sum(size for name, size in parts.items() if name not in saved)
    return again


def _product_sizes(model: ModelConfig) -> dict[str, float]:
    """Parameters of a dense layer's products, by the name of what they make."""
    heads, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    sizes = {"q": heads, "k": kv, "v": kv, "attention_out": heads, "up": model.mlp_dim, "mlp_out": model.mlp_dim}
    if model.gated_mlp:
        sizes["gate"] = model.mlp_dim
    return {name: float(model.embed_dim * size) for name, size in sizes.items()}


def layer_flops(model: ModelConfig, seq_len: int) -> tuple[float, float, float]:
    """Of the layers: parameters a token meets in dense products, in grouped ones; FLOPs of a sequence's attention."""
    grouped = sum(w.size for w in _part(model, "experts")) * model.num_experts_per_token / max(model.num_experts, 1)
    dense = float(sum(w.size for w in _part(model, "attention", "mlp", "router")))
    pairs = sum(
        attention_pairs(seq_len, model.sliding_window if kind == "local" else None) for kind, _ in model.layer_kinds
    )
    return dense, grouped, 4.0 * model.num_heads * model.head_dim * pairs


def _passes(model: ModelConfig) -> int:
    """How often a layer's forward operations are done: once more where they are recomputed."""
    return 1 if model.remat == "none" else 2


def _traffic_bytes(config: RunConfig, sizes: Sizes) -> float:
    """HBM bytes of the layers over a step: every operation reads its inputs and writes its result once, the backward
    pass twice that; gathered weights are written once and read once a pass."""
    model, tensor, compute = config.model, sizes["tensor"], itemsize(config.model.dtype)
    tokens = _local_tokens(config, sizes) * config.train.accumulate
    total = 0.0
    for _, feed_forward in model.layer_kinds:
        d, n, k = model.embed_dim, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        stream, heads = 11 * d, (5 * n + 6 * k) / tensor
        wide = 6 * model.mlp_dim / tensor if feed_forward == "mlp" else 0.0
        total += tokens * (stream + heads + wide) * compute * (2 + _passes(model))
        layer = _layer_elements(model, feed_forward, sizes, ("fsdp",))
        total += 2 * layer * compute * (2 + _passes(model)) * config.train.accumulate
    return total


def _sorting_bytes(config: RunConfig, sizes: Sizes) -> float:
    """HBM bytes of what stands between the grouped products, which are kernels that nothing is fused into: rows sorted
    by expert and back, and the activation between them."""
    model = config.model
    tokens = _local_tokens(config, sizes) * config.train.accumulate
    num_moe = sum(kind == "moe" for _, kind in model.layer_kinds)
    row = 4 * model.embed_dim + 6 * model.expert_mlp_dim / sizes["tensor"]
    return num_moe * tokens * _rows(model, sizes) * row * itemsize(model.dtype) * (2 + _passes(model))


def _weight_seconds(
    config: RunConfig, sizes: Sizes, links: Mapping[str, AxisLinks]
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by axis that move weights and their gradients, in the forward pass and in the backward pass of a step.

    fsdp: each weight is gathered forward and backward, its gradient summed and scattered. data, context, and expert for
    what is not an expert's: the gradient's shard is summed.
    """
    model, parts = config.model, config.train.accumulate
    compute = itemsize(model.dtype)
    forward, backward = dict.fromkeys(sizes, 0.0), dict.fromkeys(sizes, 0.0)
    for weight in weights(model):
        if weight.part in ("norms", "router"):
            continue
        whole = weight.local_size(sizes, ("fsdp",)) / weight.layers * compute
        local = weight.local_size(sizes) / weight.layers * compute
        count = weight.layers * parts
        gather = count * links["fsdp"].seconds("all-gather", whole)
        forward["fsdp"] += gather
        backward["fsdp"] += count * links["fsdp"].seconds("reduce-scatter", whole)
        backward["fsdp"] += gather if weight.part not in ("head", "embedding") else 0.0
        for axis in ("data", "context") if weight.part == "experts" else ("data", "context", "expert"):
            backward[axis] += count * links[axis].seconds("all-reduce", local)
    return forward, backward


def _activation_seconds(config: RunConfig, sizes: Sizes, links: Mapping[str, AxisLinks]) -> dict[str, float]:
    """Seconds by axis that move activations over a step.

    tensor: two gathers and two scattering sums of the stream a layer and pass. context: keys and values gathered, their
    gradients scattered. expert: tokens gathered and sums scattered.
    """
    model, compute = config.model, itemsize(config.model.dtype)
    tokens, parts = _local_tokens(config, sizes), config.train.accumulate
    stream = tokens * model.embed_dim * compute
    passes = 1 + _passes(model)  # the backward pass moves what the forward did, in the other direction
    tensor = 2 * (links["tensor"].seconds("all-gather", stream) + links["tensor"].seconds("reduce-scatter", stream))
    kv = 2 * tokens * sizes["context"] * model.num_kv_heads / sizes["tensor"] * model.head_dim * compute
    num_moe = sum(kind == "moe" for _, kind in model.layer_kinds)
    gathered = stream * sizes["expert"]
    expert = links["expert"].seconds("all-gather", gathered) + links["expert"].seconds("reduce-scatter", gathered)
    return {
        "tensor": parts * model.num_layers * passes * tensor,
        "context": parts * model.num_layers * passes * links["context"].seconds("all-gather", kv),
        "expert": parts * num_moe * passes * expert,
    }
