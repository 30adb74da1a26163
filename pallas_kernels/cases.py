"""One representative call of each operation, for the scripts that compile, time and tune kernels.

An operation is an entry of CASES: shapes by name, and a function that makes the call out of them. `build` has the form
that `schedule.compile_apart` wants.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Shape = Mapping[str, int]
Made = tuple[Callable, tuple]
Spec = jax.ShapeDtypeStruct


class Case(NamedTuple):
    """make(options, **shape) gives (function, abstract arguments); options has "dtype", "implementation", ...

    directions: "forward", and "backward" where gradients are defined (the whole of value and gradient is compiled).
    flops, bytes: that the forward pass needs at least. backward: products of what is compiled for the gradients, over
      the forward's (it holds a forward pass only where the gradients need something of it).
    unit: what a figure is given per: a pair of query and key, a multiplication, a token, a byte of weights.
    """

    make: Callable[..., Made]
    shape: Shape
    dtypes: tuple[str, ...]
    directions: tuple[str, ...]
    unit: str
    units: Callable[[Shape], int]
    flops: Callable[[Shape], int]
    bytes: Callable[[Shape, str], int]
    backward: float = 3.0  # as of a loss: its logits, and two products of gradients


def build(op: str, dtype: str = "bfloat16", direction: str = "forward", implementation: Any = None, **given) -> Made:
    """(function, abstract arguments) of a case; `given` are sizes that differ from the case's own, or options.

    Raises: KeyError for an unknown operation.
    """
    case = CASES[op]
    shape = {**case.shape, **{name: size for name, size in given.items() if name in case.shape}}
    options = {name: value for name, value in given.items() if name not in case.shape}
    return case.make({"dtype": dtype, "direction": direction, "implementation": implementation, **options}, **shape)


def missing(op: str) -> str | None:
    """Why the operation cannot be built here; None if it can."""
    try:
        importlib.import_module(f"pallas_kernels.{op}")
    except ImportError as error:
        return str(error)
    return None


def arrays(op: str, specs: Any, seed: int = 0) -> Any:
    """Arrays for the abstract arguments of `build`: normal values, codes of any value, and integers that make sense.

    Groups are of equal size; sequences have all of the context that their pages hold, and pages of their own.
    """
    leaves, tree = jax.tree.flatten(specs)
    keys = jax.random.split(jax.random.key(seed), max(1, len(leaves)))

    def make(key, spec):
        if spec.dtype in (jnp.int8, jnp.uint8):
            return jax.random.bits(key, spec.shape, jnp.uint8).astype(spec.dtype)
        if jnp.issubdtype(spec.dtype, jnp.integer):
            return jnp.zeros(spec.shape, spec.dtype)
        return jax.random.normal(key, spec.shape, jnp.float32).astype(spec.dtype)

    made = jax.tree.unflatten(tree, [make(*pair) for pair in zip(keys, leaves, strict=True)])
    if op == "ragged_dot":
        x, w, sizes = made
        return x, w, jnp.full_like(sizes, x.shape[0] // sizes.size)
    if op == "paged_attention":
        q, k, v, pages, tables, lengths, starts, count = made
        lengths = jnp.full_like(lengths, tables.shape[1] * pages.data.shape[3])
        tables = jnp.arange(tables.size, dtype=tables.dtype).reshape(tables.shape)
        return q, k, v, pages, tables, lengths, jnp.arange(starts.size, dtype=starts.dtype), count + lengths.size
    return made


def _op(name: str) -> Any:
    """The public function of an operation, from its own folder (the package may not export it yet)."""
    return getattr(importlib.import_module(f"pallas_kernels.{name}.api"), name)


def _with_gradient(forward: Callable, argnums: tuple[int, ...], options: Mapping[str, Any]) -> Callable:
    if options["direction"] == "forward":
        return forward

    def backward(*args):
        """The gradients for an output cotangent of ones, which no part of the forward pass can be folded into."""
        return jax.grad(lambda *args: jnp.sum(forward(*args).astype(jnp.float32)), argnums)(*args)

    return backward


def _attention(options, batch, heads, kv_heads, queries, keys, head_dim) -> Made:
    attention, dtype = _op("attention"), options["dtype"]
    causal = options.get("causal", True)

    def forward(q, k, v):
        return attention(q, k, v, causal=causal, implementation=options["implementation"])

    q = Spec((batch, queries, heads, head_dim), dtype)
    k = Spec((batch, keys, kv_heads, head_dim), dtype)
    return _with_gradient(forward, (0, 1, 2), options), (q, k, k)


def _rotary(options, tokens, heads, head_dim) -> Made:
    rotary = _op("rotary")

    def forward(x, cos, sin):
        return rotary(x, cos, sin, implementation=options["implementation"])

    table = Spec((1, tokens, 1, head_dim // 2), "float32")
    return _with_gradient(forward, (0,), options), (Spec((1, tokens, heads, head_dim), options["dtype"]), table, table)


def _ragged_dot(options, rows, inner, columns, groups) -> Made:
    ragged_dot, dtype = _op("ragged_dot"), options["dtype"]

    def forward(x, w, sizes):
        return ragged_dot(x, w, sizes, implementation=options["implementation"])

    args = Spec((rows, inner), dtype), Spec((groups, inner, columns), dtype), Spec((groups,), jnp.int32)
    return _with_gradient(forward, (0, 1), options), args


def _linear_cross_entropy(options, tokens, features, vocab) -> Made:
    loss, dtype = _op("linear_cross_entropy"), options["dtype"]
    asked = {} if options["implementation"] is None else {"implementation": options["implementation"]}

    def forward(x, w, labels, weights):
        return loss(x, w, labels, weights, **asked)[0]

    args = (
        Spec((tokens, features), dtype),
        Spec((features, vocab), dtype),
        Spec((tokens,), jnp.int32),
        Spec((tokens,), jnp.float32),
    )
    return _with_gradient(forward, (0, 1), options), args


def _quantized_matmul(options, rows, inner, columns) -> Made:
    product = _op("quantized_matmul")
    tensor = importlib.import_module("pallas_kernels.quantized_matmul.tensor")
    bits, group, activations = {
        "w8a16": (8, None, None),
        "w4a16": (4, 128, None),
        "w8a8": (8, None, "int8"),
        "fp8": ("fp8", None, "fp8"),
    }[options["dtype"]]
    along_rows = options.get("transposed", False)  # the form that GPUs and CPUs take
    shape, axis = ((columns, inner), -1) if along_rows else ((inner, columns), -2)
    w = jax.eval_shape(lambda w: tensor.quantize(w, bits, group, axis=axis), Spec(shape, jnp.bfloat16))

    def forward(x, w):
        return product(x, w, activations=activations, implementation=options["implementation"])

    return _with_gradient(forward, (0,), options), (Spec((rows, inner), jnp.bfloat16), w)


def _paged_attention(options, tokens, sequences, heads, kv_heads, head_dim, page_size, context) -> Made:
    api = importlib.import_module("pallas_kernels.paged_attention.api")
    per_sequence = -(-context // page_size)
    dtype = options["dtype"]
    quantised = dtype in ("int8", "float8_e4m3fn")
    scales = jnp.ones((kv_heads, 2, head_dim), jnp.float32) if quantised else None

    def pool():
        return api.new_pages(sequences * per_sequence, page_size, kv_heads, head_dim, jnp.dtype(dtype), scales)

    def forward(q, k, v, pages, tables, lengths, starts, count):
        asked = {"implementation": options["implementation"]}
        return api.paged_attention(q, k, v, pages, tables, lengths, starts, count, **asked)

    computed = jnp.bfloat16 if quantised else dtype
    new = Spec((tokens, kv_heads, head_dim), computed)
    return forward, (
        Spec((tokens, heads, head_dim), computed),
        new,
        new,
        jax.eval_shape(pool),
        Spec((sequences, per_sequence), jnp.int32),
        Spec((sequences,), jnp.int32),
        Spec((sequences + 1,), jnp.int32),
        Spec((), jnp.int32),
    )


def _size(dtype: str) -> int:
    return jnp.dtype(dtype).itemsize


_WEIGHT_BYTES = {"w8a16": 1.0, "w4a16": 0.5, "w8a8": 1.0, "fp8": 1.0}

CASES: dict[str, Case] = {
    "attention": Case(
        _attention,
        {"batch": 1, "heads": 8, "kv_heads": 2, "queries": 8192, "keys": 8192, "head_dim": 128},
        ("bfloat16", "float32"),
        ("forward", "backward"),
        "query-key pair",
        lambda s: s["batch"] * s["heads"] * s["queries"] * s["keys"],
        lambda s: 4 * s["batch"] * s["heads"] * s["queries"] * s["keys"] * s["head_dim"],
        lambda s, dtype: (
            2 * _size(dtype) * s["batch"] * s["head_dim"] * (s["heads"] * s["queries"] + s["kv_heads"] * s["keys"])
        ),
        3.5,
    ),
    "rotary": Case(
        _rotary,
        {"tokens": 8192, "heads": 32, "head_dim": 128},
        ("bfloat16", "float32"),
        ("forward", "backward"),
        "number",
        lambda s: s["tokens"] * s["heads"] * s["head_dim"],
        lambda s: 3 * s["tokens"] * s["heads"] * s["head_dim"],
        lambda s, dtype: 2 * _size(dtype) * s["tokens"] * s["heads"] * s["head_dim"],
        1.0,
    ),
    "ragged_dot": Case(
        _ragged_dot,
        {"rows": 16384, "inner": 2048, "columns": 1536, "groups": 64},
        ("bfloat16", "float32"),
        ("forward", "backward"),
        "product of two numbers",
        lambda s: s["rows"] * s["inner"] * s["columns"],
        lambda s: 2 * s["rows"] * s["inner"] * s["columns"],
        lambda s, dtype: (
            _size(dtype) * (s["rows"] * (s["inner"] + s["columns"]) + s["groups"] * s["inner"] * s["columns"])
        ),
    ),
    "linear_cross_entropy": Case(
        _linear_cross_entropy,
        {"tokens": 8192, "features": 2048, "vocab": 32000},
        ("bfloat16", "float32"),
        ("forward", "backward"),
        "product of two numbers",
        lambda s: s["tokens"] * s["features"] * s["vocab"],
        lambda s: 2 * s["tokens"] * s["features"] * s["vocab"],
        lambda s, dtype: _size(dtype) * s["features"] * (s["tokens"] + s["vocab"]),
    ),
    "quantized_matmul": Case(
        _quantized_matmul,
        {"rows": 16, "inner": 4096, "columns": 14336},
        ("w8a16", "w4a16", "w8a8", "fp8"),
        ("forward", "backward"),
        "weight",
        lambda s: s["inner"] * s["columns"],
        lambda s: 2 * s["rows"] * s["inner"] * s["columns"],
        lambda s, dtype: int(
            _WEIGHT_BYTES[dtype] * s["inner"] * s["columns"] + 2 * s["rows"] * (s["inner"] + s["columns"])
        ),
        1.0,
    ),
    "paged_attention": Case(
        _paged_attention,
        {
            "tokens": 64,
            "sequences": 64,
            "heads": 32,
            "kv_heads": 8,
            "head_dim": 128,
            "page_size": 64,
            "context": 4096,
        },
        ("bfloat16", "int8", "float8_e4m3fn"),
        ("forward",),
        "key token",
        lambda s: s["sequences"] * s["context"],
        lambda s: 4 * s["sequences"] * s["context"] * s["heads"] * s["head_dim"],
        lambda s, dtype: 2 * _size(dtype) * s["sequences"] * s["context"] * s["kv_heads"] * s["head_dim"],
    ),
}
