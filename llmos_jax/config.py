"""The configuration of a run: frozen dataclasses, and every check with its message.

A configuration file (`configs/*.py`) defines `get_config() -> RunConfig`. Loading, `--set` overrides and
`--explain` live in `overrides.py`. Nothing here imports anything but the standard library, so a configuration
can be read, changed and refused before jax is loaded.
"""

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path


class UserError(Exception):
    """Something the user can mend. The command line prints it as one sentence and exits with code 2."""


DTYPES = ("float32", "bfloat16", "float16")
ACTIVATIONS = ("input", "q", "k", "v", "attention", "attention_out", "gate", "up", "mlp_out")  # in a layer, by name
MESH_AXES = ("data", "fsdp", "tensor", "context", "expert")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding (arXiv:2104.09864) and its long-context scalings.

    scaling: "none"; "linear" (positions divided by `factor`); "llama3" (Llama 3.1, by wavelength);
    "yarn" (arXiv:2309.00071, by parts, with an attention temperature).
    """

    theta: float = 10_000.0
    local_theta: float | None = None  # base of "local" layers where it differs (Gemma 3); these are never scaled
    scaling: str = "none"
    factor: float = 1.0
    original_max_seq_len: int = 0  # context the model was first trained with (llama3, yarn)
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: 0.1 ln(factor) + 1


@dataclass(frozen=True)
class Segment:
    """A run of layers that repeats: `kinds` one after the other, `repeats` times. It is scanned over `repeats`."""

    kinds: tuple[tuple[str, str], ...]  # (attention "global" | "local", feed-forward "mlp" | "moe")
    repeats: int


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer; every family is a value of this, none is a class of its own.

    Shape letters: D embed_dim, N num_heads, K num_kv_heads, H head_dim, F mlp_dim, V vocab_size, E num_experts,
    L num_layers.
    """

    family: str = "llama"  # chooses the name map that reads and writes its weights (models/weights)
    vocab_size: int = 32_000
    num_layers: int = 8
    embed_dim: int = 512
    num_heads: int = 8
    num_kv_heads: int = 8
    head_dim: int = 64
    mlp_dim: int = 1_536
    max_seq_len: int = 2_048

    activation: str = "silu"  # silu | gelu_tanh | gelu
    gated_mlp: bool = True  # act(x gate) * (x up); False: act(x up), as GPT-2
    mlp_bias: bool = False
    norm: str = "rmsnorm"  # rmsnorm | layernorm
    norm_eps: float = 1e-5
    norm_offset: bool = False  # scale by (1 + weight), as Gemma
    sandwich_norm: bool = False  # norms after attention and after the mlp too, as Gemma 2 and 3
    qkv_bias: bool = False
    attention_out_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each query and key head, as Qwen3 and Gemma 3

    position: str = "rope"  # rope | learned
    rope: RopeConfig = RopeConfig()
    layer_pattern: tuple[str, ...] = ("global",)  # repeats over the layers; "local" layers see sliding_window
    sliding_window: int | None = None  # a query sees itself and the sliding_window - 1 tokens before it
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None  # cap * tanh(scores / cap), Gemma 2
    logit_softcap: float | None = None
    embed_scale: float | None = None  # the embedding is multiplied by this (Gemma: sqrt(embed_dim))
    tie_embeddings: bool = False

    num_experts: int = 0  # 0: a dense mlp in every layer
    num_experts_per_token: int = 2
    num_dense_layers: int = 0  # the first layers keep a dense mlp
    moe_mlp_dim: int = 0  # F of one expert; 0: mlp_dim
    norm_topk: bool = True  # the chosen experts' probabilities are made to sum to one
    router_aux_weight: float = 0.0  # weight of the load-balance loss (arXiv:2101.03961, eq. 4)

    quantize: str = "none"  # none | int8 | int4: how served weights are stored and multiplied (models/quantized.py)
    dtype: str = "float32"  # of computation
    param_dtype: str = "float32"  # of the stored parameters
    remat: str = "none"  # none | full | dots | dots_no_batch | names: what the backward pass recomputes
    remat_save: tuple[str, ...] = ()  # names: activations kept on the device (ACTIVATIONS)
    remat_offload: tuple[str, ...] = ()  # names: activations kept in the host's memory
    scan_layers: bool = True  # one compiled layer, looped; False unrolls (slower to compile, sometimes faster)

    @property
    def expert_mlp_dim(self) -> int:
        return self.moe_mlp_dim or self.mlp_dim

    @property
    def layer_kinds(self) -> tuple[tuple[str, str], ...]:
        """(attention kind, feed-forward kind) of each layer, in order."""
        pattern = self.layer_pattern
        moe_from = self.num_dense_layers if self.num_experts else self.num_layers
        return tuple((pattern[i % len(pattern)], "moe" if i >= moe_from else "mlp") for i in range(self.num_layers))

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The layers as the fewest repeating runs: dense prefix, then whole patterns, then what is left over."""
        kinds, period = self.layer_kinds, len(self.layer_pattern)
        boundary = self.num_dense_layers if 0 < self.num_dense_layers < self.num_layers and self.num_experts else 0
        segments = []
        for part in (kinds[:boundary], kinds[boundary:]):
            repeats, left = divmod(len(part), period)
            if repeats:
                segments.append(Segment(part[:period], repeats))
            if left:
                segments.append(Segment(part[repeats * period :], 1))
        return tuple(segments)

    def layer_slot(self, layer: int) -> tuple[int, int, int]:
        """Where layer `layer` is stored: (segment, place in the segment's pattern, index into the stacked arrays)."""
        for s, segment in enumerate(self.segments):
            size = len(segment.kinds) * segment.repeats
            if layer < size:
                return s, layer % len(segment.kinds), layer // len(segment.kinds)
            layer -= size
        raise IndexError(layer)


@dataclass(frozen=True)
class SourceConfig:
    """One source of documents. `path`: a file, a folder, a glob, or `hf:org/name` (a Hugging Face dataset)."""

    path: str = ""
    weight: float = 1.0  # share of this source in the mixture, relative to the others
    format: str = "auto"  # auto (by suffix) | text (one document a file) | lines | jsonl | parquet
    text_field: str = "text"  # jsonl, parquet, hf
    split: str = "train"  # hf


@dataclass(frozen=True)
class CleanConfig:
    """What is done to a document before it is tokenized. Every filter reports how many documents it dropped."""

    normalize_nfc: bool = True
    strip_html: bool = False
    strip_control: bool = True  # control characters other than newline and tab
    min_chars: int = 1
    max_chars: int = 0  # 0: no limit
    max_repetition: float = 1.0  # largest share of characters in repeated lines; 1.0: off
    exact_dedup: bool = True
    near_dedup: bool = False  # MinHash of 5-word shingles
    near_dedup_threshold: float = 0.8  # Jaccard similarity


@dataclass(frozen=True)
class DataConfig:
    sources: tuple[SourceConfig, ...] = ()
    eval_sources: tuple[SourceConfig, ...] = ()  # held-out text; or set eval_fraction
    eval_fraction: float = 0.0  # share of the documents held out, chosen by a hash of their text
    clean: CleanConfig = CleanConfig()
    tokenizer: str = ""  # a model folder, a pulled model's name, a tokenizer file; empty: that of init_from;
    #                      "train": BPE is trained on the corpus
    tokenizer_vocab_size: int = 0  # for tokenizer="train"; 0: model.vocab_size
    cache_dir: str = ""  # of token stores and trained tokenizers; empty: $LLMOS_HOME/data
    num_threads: int = 2  # that read and pack rows
    prefetch: int = 8  # batches held ready on the host
    cache_bytes: int = 256 * 2**20  # TensorStore's cache pool


@dataclass(frozen=True)
class OptimizerConfig:
    name: str = "adamw"  # adamw | adafactor | lion | muon (adamw for what is not a matrix) | sgd
    learning_rate: float = 1e-3  # peak
    schedule: str = "cosine"  # cosine | wsd | linear | constant
    warmup_steps: int = 0
    decay_steps: int = 0  # wsd: length of the last decay; 0: a tenth of the run
    final_ratio: float = 0.1  # last learning rate over the peak
    b1: float = 0.9  # momentum for sgd and muon
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # matrices only: norms, biases and the embedding table are left out
    clip_norm: float = 1.0  # global norm; 0: off


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 100
    batch_size: int = 8  # sequences a step, over all devices
    seq_len: int = 512
    accumulate: int = 1  # the batch is taken in this many micro-batches
    objective: str = "causal_lm"
    z_loss: float = 0.0  # weight of mean(logsumexp(logits) ** 2) (arXiv:2204.02311)
    eval_every: int = 0  # steps; 0: only at the end
    eval_batches: int = 16


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes. One of them may be -1: it takes the devices that are left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1
    expert: int = 1


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 100  # steps
    keep: int = 2  # newest ones kept
    keep_every: int = 0  # steps; these are kept for ever; 0: none
    keep_best: int = 1  # by held-out loss, where the run evaluates


@dataclass(frozen=True)
class FaultConfig:
    spike_factor: float = 4.0  # a loss above this many times its running mean is a spike; 0: off
    max_bad_steps: int = 3  # skipped steps in a row before the run rewinds
    max_rewinds: int = 3  # then it gives up
    hang_seconds: float = 600.0  # a step longer than this is reported
    grace_seconds: float = 60.0  # a stop signal's save must be done by then


@dataclass(frozen=True)
class LogConfig:
    every: int = 10  # steps
    tensorboard: bool = True
    wandb_project: str = ""  # empty: off


@dataclass(frozen=True)
class ServeConfig:
    """One model being served. Its programs have these shapes, so nothing a request asks for can need more memory."""

    max_model_len: int = 0  # tokens of a prompt with its answer; 0: the model's context
    max_sequences: int = 16  # answers being generated at once
    max_step_tokens: int = 512  # new tokens of a step, those of prompts among them
    chunk: int = 0  # most tokens of one prompt in a step; 0: max_step_tokens
    page_size: int = 32  # tokens
    num_pages: int = 0  # 0: as many as memory_share leaves room for, and the sequences can use
    memory_share: float = 0.9  # of a device's memory, for weights, pages and temporaries
    host_pages: int = 0  # pages that fit into host memory, to which sequences are swapped
    kv_dtype: str = "auto"  # auto (dtype of computation) | float32 | bfloat16 | int8 | float8_e4m3fn
    num_drafts: int = 0  # tokens guessed ahead by looking up n-grams of the prompt, or by the draft model; 0: off
    draft_model: str = ""  # a small model of the same vocabulary
    max_adapters: int = 0  # LoRA adapters loaded at once
    adapter_rank: int = 16  # of the largest of them


@dataclass(frozen=True)
class RunConfig:
    name: str = "run"
    seed: int = 0
    init_from: str = ""  # a pulled model, a model folder or a workdir; its shape replaces `model`'s
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultConfig = FaultConfig()
    serve: ServeConfig = ServeConfig()
    log: LogConfig = field(default_factory=LogConfig)


# Fields of `model` that a run keeps when it starts from a pulled model: how to compute, not what the model is.
RUNTIME_MODEL_FIELDS = (
    *("dtype", "param_dtype", "remat", "remat_save", "remat_offload", "scan_layers", "router_aux_weight"),
)


def with_model(config: RunConfig, model: ModelConfig) -> RunConfig:
    """`config` with the architecture of a loaded `model`, keeping the run's own choice of how to compute it."""
    runtime = {name: getattr(config.model, name) for name in RUNTIME_MODEL_FIELDS}
    return dataclasses.replace(config, model=dataclasses.replace(model, **runtime))


def home() -> Path:
    """Where pulled models, token stores and compiled programs are kept: $LLMOS_HOME, or ~/.cache/llmos."""
    return Path(os.environ.get("LLMOS_HOME") or "~/.cache/llmos").expanduser()


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    require(value in allowed, f"{name}={value!r} is not known; use one of {', '.join(allowed)}")


def _divisors(number: int, most: int = 4096) -> str:
    return ", ".join(str(i) for i in range(1, min(number, most) + 1) if number % i == 0)


def check_model(model: ModelConfig) -> None:
    """Raises UserError for the first rule that `model` breaks."""
    _one_of("model.activation", model.activation, ("silu", "gelu_tanh", "gelu"))
    _one_of("model.norm", model.norm, ("rmsnorm", "layernorm"))
    _one_of("model.position", model.position, ("rope", "learned"))
    _one_of("model.remat", model.remat, ("none", "full", "dots", "dots_no_batch", "names"))
    for field_name in ("remat_save", "remat_offload"):
        for activation in getattr(model, field_name):
            _one_of(f"model.{field_name}", activation, ACTIVATIONS)
        require(
            model.remat == "names" or not getattr(model, field_name),
            f"model.{field_name} is set but model.remat={model.remat}; set model.remat=names",
        )
    _one_of("model.dtype", model.dtype, DTYPES)
    _one_of("model.param_dtype", model.param_dtype, DTYPES)
    _one_of("model.rope.scaling", model.rope.scaling, ("none", "linear", "llama3", "yarn"))
    for name in [
        "vocab_size",
        "num_layers",
        "embed_dim",
        "num_heads",
        "num_kv_heads",
        "head_dim",
        "mlp_dim",
        "max_seq_len",
    ]:
        require(getattr(model, name) >= 1, f"model.{name}={getattr(model, name)} must be at least 1")
    require(
        model.num_heads % model.num_kv_heads == 0,
        f"model.num_heads={model.num_heads} is not a multiple of model.num_kv_heads={model.num_kv_heads}; "
        f"use num_kv_heads of {_divisors(model.num_heads)}",
    )
    require(
        model.position == "learned" or model.head_dim % 2 == 0,
        f"model.head_dim={model.head_dim} is odd, and rotary positions turn pairs; use an even head_dim",
    )
    require(bool(model.layer_pattern), 'model.layer_pattern is empty; use ("global",)')
    for kind in model.layer_pattern:
        _one_of("model.layer_pattern", kind, ("global", "local"))
    require(
        "local" not in model.layer_pattern or (model.sliding_window or 0) > 0,
        "model.layer_pattern has local layers but model.sliding_window is not set; set it to the window's tokens",
    )
    if model.rope.scaling in ("llama3", "yarn"):
        require(
            model.rope.original_max_seq_len > 0,
            f"model.rope.scaling={model.rope.scaling} needs model.rope.original_max_seq_len",
        )
    if model.num_experts:
        require(
            1 <= model.num_experts_per_token <= model.num_experts,
            f"model.num_experts_per_token={model.num_experts_per_token} must be between 1 and "
            f"model.num_experts={model.num_experts}",
        )
        require(
            model.gated_mlp and not model.mlp_bias,
            "model.num_experts needs model.gated_mlp=True and model.mlp_bias=False",
        )


def mesh_shape(mesh: MeshConfig, num_devices: int) -> dict[str, int]:
    """The size of each mesh axis on `num_devices` devices, the -1 filled in; UserError where they do not fit."""
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    for axis, size in sizes.items():
        require(size == -1 or size >= 1, f"mesh.{axis}={size} must be at least 1, or -1 for what is left")
    free = [axis for axis, size in sizes.items() if size == -1]
    require(len(free) <= 1, f"only one mesh axis may be -1, not {' and '.join(free)}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        require(
            num_devices % fixed == 0,
            f"the mesh axes multiply to {fixed}, which does not divide the {num_devices} devices; "
            f"use axes that multiply to {_divisors(num_devices)}",
        )
        sizes[free[0]] = num_devices // fixed
    require(
        math.prod(sizes.values()) == num_devices,
        f"the mesh axes multiply to {math.prod(sizes.values())} but there are {num_devices} devices; "
        "set one axis to -1 to take what is left",
    )
    return sizes


def _check_sharding(config: RunConfig, sizes: dict[str, int]) -> None:
    model, train = config.model, config.train
    tensor, context, expert, fsdp = sizes["tensor"], sizes["context"], sizes["expert"], sizes["fsdp"]
    sharded_by_tensor = [("num_kv_heads", model.num_kv_heads), ("vocab_size", model.vocab_size)]
    if model.num_experts < 1 or model.num_dense_layers:
        sharded_by_tensor.append(("mlp_dim", model.mlp_dim))
    if model.num_experts:
        sharded_by_tensor.append(("moe_mlp_dim", model.expert_mlp_dim))
    for name, value in sharded_by_tensor:
        require(
            value % tensor == 0,
            f"mesh.tensor={tensor} does not divide model.{name}={value}; use one of {_divisors(value, 64)}",
        )
    require(
        model.embed_dim % fsdp == 0,
        f"mesh.fsdp={fsdp} does not divide model.embed_dim={model.embed_dim}; put the rest on mesh.data",
    )
    require(
        train.seq_len % context == 0,
        f"mesh.context={context} does not divide train.seq_len={train.seq_len}; use one of {_divisors(train.seq_len, 64)}",
    )
    require(
        expert == 1 or bool(model.num_experts and model.num_experts % expert == 0),
        f"mesh.expert={expert} does not divide model.num_experts={model.num_experts}; "
        + (f"use one of {_divisors(model.num_experts)}" if model.num_experts else "a dense model has mesh.expert=1"),
    )
    shards = sizes["data"] * fsdp * expert
    micro = train.batch_size // train.accumulate
    require(
        micro % shards == 0,
        f"train.batch_size={train.batch_size} in {train.accumulate} micro-batches gives {micro} sequences, which do not "
        f"divide over mesh data x fsdp x expert = {shards}; use a batch_size that is a multiple of "
        f"{shards * train.accumulate}",
    )


_NOT_NEGATIVE = {
    "model": ("num_experts", "num_dense_layers", "moe_mlp_dim", "router_aux_weight"),
    "optimizer": ("warmup_steps", "decay_steps", "weight_decay", "clip_norm", "final_ratio"),
    "train": ("z_loss", "eval_every"),
    "checkpoint": ("keep_every", "keep_best"),
    "faults": ("spike_factor", "max_bad_steps", "max_rewinds", "hang_seconds", "grace_seconds"),
    "data": ("num_threads", "prefetch", "cache_bytes"),
}


def check(config: RunConfig, num_devices: int | None = None) -> None:
    """Raises UserError for the first rule `config` breaks; with `num_devices`, the mesh's rules too."""
    check_model(config.model)
    train, optimizer, data = config.train, config.optimizer, config.data
    _one_of("optimizer.name", optimizer.name, ("adamw", "adafactor", "lion", "muon", "sgd"))
    _one_of("optimizer.schedule", optimizer.schedule, ("cosine", "wsd", "linear", "constant"))
    _one_of("train.objective", train.objective, ("causal_lm",))
    for name in ("steps", "batch_size", "seq_len", "accumulate"):
        require(getattr(train, name) >= 1, f"train.{name}={getattr(train, name)} must be at least 1")
    require(
        train.batch_size % train.accumulate == 0,
        f"train.accumulate={train.accumulate} does not divide train.batch_size={train.batch_size}; "
        f"use one of {_divisors(train.batch_size)}",
    )
    require(
        config.init_from != "" or train.seq_len <= config.model.max_seq_len,
        f"train.seq_len={train.seq_len} is longer than model.max_seq_len={config.model.max_seq_len}; lower one or raise the other",
    )
    require(
        optimizer.warmup_steps <= train.steps,
        f"optimizer.warmup_steps={optimizer.warmup_steps} is more than train.steps={train.steps}; lower it",
    )
    require(
        0 < optimizer.learning_rate < math.inf,
        f"optimizer.learning_rate={optimizer.learning_rate} must be above 0",
    )
    for group, names in _NOT_NEGATIVE.items():
        for name in names:
            value = getattr(getattr(config, group), name)
            require(value >= 0, f"{group}.{name}={value} must not be negative")
    require(0 <= data.eval_fraction < 1, f"data.eval_fraction={data.eval_fraction} must be in [0, 1)")
    require(
        not (data.eval_fraction and data.eval_sources),
        "data.eval_fraction and data.eval_sources both name held-out text; set one of them",
    )
    for i, source in enumerate((*data.sources, *data.eval_sources)):
        require(bool(source.path), f"source {i} has no path; set data.sources.{i}.path")
        require(
            source.weight > 0, f"source {source.path!r} has weight {source.weight}; use one above 0, or leave it out"
        )
        _one_of(f"format of {source.path!r}", source.format, ("auto", "text", "lines", "jsonl", "parquet"))
    require(config.checkpoint.every >= 1, f"checkpoint.every={config.checkpoint.every} must be at least 1")
    require(config.checkpoint.keep >= 1, f"checkpoint.keep={config.checkpoint.keep} must be at least 1")
    require(config.log.every >= 1, f"log.every={config.log.every} must be at least 1")
    if num_devices is not None:
        _check_sharding(config, mesh_shape(config.mesh, num_devices))
