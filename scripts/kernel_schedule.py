"""Static schedules of our TPU kernels beside those that ship with jax, from the compiler alone; no TPU is needed.

    python scripts/kernel_schedule.py --target v6e,tpu7x --op attention

For each kernel: bundles of its hot loop (a bundle is a cycle while nothing stalls), what that loop gets done, and so
the cycles per 1,000 units. Stalls on copies from memory are not in it. jax's kernels
are compiled at several block sizes; --all shows each, otherwise only the best. Needs `pip install "jax[tpu]"`.

Grouped products are counted over a whole call, with all that a step of their grids takes: for one group of all rows
(cycles/1k), and for 64 groups as random routing leaves them (routed/1k). Causal attention is counted over all blocks of
a head, each as what it takes: a body with a mask, or one without where the kernel has one.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from pallas_kernels import cases
from pallas_kernels.ragged_dot import trips
from pallas_kernels.schedule import CompileError, KernelSchedule, Outcome, compile_apart

# Nominal products of two numbers that one slot of the matrix units starts; only to compare kernels on the same chip.
SLOT_PRODUCTS = {"v5e": 2 * 128**2, "v5p": 2 * 128**2, "v6e": 2 * 256**2, "tpu7x": 2 * 256**2}
HEAD_DIM, GROUP = 128, 4
LONG = 16384  # tokens of the causal comparisons
MOE = {"rows": 16384, "inner": 2048, "columns": 1536, "groups": 64}
Blocks = Mapping[str, int]


class Side(NamedTuple):
    """One way to compute an operation.

    builder, options: for `compile_apart`; several options are several block sizes, of which the best counts.
    work: units that one run of the hot loop of a kernel does, from its name and block sizes; where it is None they
      are taken from the slots of the MXU, as if each was full, and nan says that they are not known.
    """

    name: str
    builder: str
    options: list[dict[str, Any]]
    work: Callable[[str, Blocks], float | None]


class Comparison(NamedTuple):
    unit: str
    products: float  # of two numbers, that a unit needs
    sides: list[Side]


class Row(NamedTuple):
    target: str
    op: str
    side: str
    kernel: str
    blocks: str
    hot_bundles: int
    per_1000: float
    routed: float
    mxu_slots: float
    spills: int
    fills: int
    vmem: int


# What jax ships, as a builder for `compile_apart` each. Imports stand inside: not every jax has every one of them.


def splash(direction: str, length: int = 8192, causal: bool = False, fused: bool = False, **blocks: int):
    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu import splash_attention as ops

    q, kv, compute = blocks["q"], blocks["kv"], blocks["compute"]
    forward = {"block_q": q, "block_kv": kv, "block_kv_compute": compute}
    backward = {"block_q_dkv": q, "block_kv_dkv": kv, "block_kv_dkv_compute": compute}
    dq = {} if fused else {"block_q_dq": q, "block_kv_dq": kv}
    sizes = ops.BlockSizes(**forward, **backward, **dq, use_fused_bwd_kernel=fused)
    of_head = ops.CausalMask if causal else ops.FullMask
    mask = ops.MultiHeadMask([of_head((length, length)) for _ in range(GROUP)])
    kernel = ops.make_splash_mqa_single_device(mask, block_sizes=sizes)

    def run(q, k, v):
        if direction == "forward":
            return kernel(q, k, v)
        return jax.grad(lambda q, k, v: jnp.sum(kernel(q, k, v).astype(jnp.float32)), (0, 1, 2))(q, k, v)

    key = jax.ShapeDtypeStruct((length, HEAD_DIM), jnp.bfloat16)
    return run, (jax.ShapeDtypeStruct((GROUP, length, HEAD_DIM), jnp.bfloat16), key, key)


def megablox(form: str, m: int, k: int, n: int):
    import functools
    import importlib

    import jax
    import jax.numpy as jnp

    gmm = importlib.import_module("jax.experimental.pallas.ops.tpu.megablox.gmm")
    transposed = {"transpose_rhs": True} if form == "transposed" else {}
    call = gmm.tgmm if form == "tgmm" else gmm.gmm
    run = functools.partial(call, tiling=(m, k, n), preferred_element_type=jnp.bfloat16, **transposed)
    x = jax.ShapeDtypeStruct((MOE["rows"], MOE["inner"]), jnp.bfloat16)
    y = jax.ShapeDtypeStruct((MOE["rows"], MOE["columns"]), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((MOE["groups"], MOE["inner"], MOE["columns"]), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((MOE["groups"],), jnp.int32)
    if form == "tgmm":
        return lambda x, y, sizes: run(x.T, y, sizes), (x, y, sizes)
    return run, (y if transposed else x, w, sizes)


def ragged_paged(pages: int, queries: int, page_size: int = 64, sequences: int = 64, context: int = 4096):
    import functools

    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    per_sequence = context // page_size
    run = functools.partial(
        ragged_paged_attention,
        sm_scale=HEAD_DIM**-0.5,
        num_kv_pages_per_block=pages,
        num_queries_per_block=queries,
        vmem_limit_bytes=64 * 2**20,
    )
    return run, (
        jax.ShapeDtypeStruct((sequences, 32, HEAD_DIM), jnp.bfloat16),
        jax.ShapeDtypeStruct((sequences * per_sequence, page_size, 16, HEAD_DIM), jnp.bfloat16),
        jax.ShapeDtypeStruct((sequences,), jnp.int32),
        jax.ShapeDtypeStruct((sequences, per_sequence), jnp.int32),
        jax.ShapeDtypeStruct((sequences + 1,), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )


def paged(pages: int, page_size: int = 64, sequences: int = 64, context: int = 4096):
    import functools

    import jax
    import jax.numpy as jnp
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    per_sequence = context // page_size
    pool = jax.ShapeDtypeStruct((8, sequences * per_sequence, page_size, HEAD_DIM), jnp.bfloat16)
    return functools.partial(paged_attention, pages_per_compute_block=pages), (
        jax.ShapeDtypeStruct((sequences, 32, HEAD_DIM), jnp.bfloat16),
        pool,
        pool,
        jax.ShapeDtypeStruct((sequences,), jnp.int32),
        jax.ShapeDtypeStruct((sequences, per_sequence), jnp.int32),
    )


def _ours(op: str, work: Callable[[str, Blocks], float | None], **options: Any) -> Side:
    given = {"op": op, "implementation": "tpu", **options}
    return Side("ours", "pallas_kernels.cases:build", [given], work)


def _jax(name: str, options: list[dict[str, Any]], work: Callable[[str, Blocks], float | None]) -> Side:
    return Side(f"jax {name}", f"{__file__}:{name}", options, work)


def _splash_blocks(direction: str, **options: Any) -> list[dict[str, Any]]:
    sizes = [(512, 1024, 512), (1024, 1024, 512), (1024, 1024, 1024)]  # larger ones spill and take minutes to compile
    if options:
        sizes[0] = (512, 512, 512)
        sizes.append((1024, 2048, 1024))
    ways = [False] if direction == "forward" else [True] if options else [False, True]  # fused saves two of 7 products
    return [
        {"direction": direction, "q": q, "kv": kv, "compute": compute, "fused": fused, **options}
        for q, kv, compute in sizes
        for fused in ways
    ]


def _of_pairs(kernel: str, blocks: Blocks) -> float | None:
    """Pairs of a splash kernel's step, whose parts of compute keys are unrolled; of our attention kernels' body."""
    return blocks["q"] * blocks["kv"] if "q" in blocks and "kv" in blocks else None


def _grouped(kernel: KernelSchedule, blocks: Blocks, form: str) -> tuple[float, float]:
    """Bundles of a grouped product for 1,000 products: one group of all rows, and groups as routing leaves them."""
    inner, columns = MOE["inner"], MOE["columns"]
    shape = (columns, inner) if form == "transposed" or "transposed" in kernel.name else (inner, columns)
    products = MOE["rows"] * inner * columns
    routings = [MOE["rows"]], trips.routed(MOE["rows"], MOE["groups"])
    whole, routed = (1000 * trips.cycles(kernel, blocks, sizes, shape) / products for sizes in routings)
    return whole, routed


def _causal(kernel: KernelSchedule, blocks: Blocks, length: int) -> float:
    """Bundles of a head's causal attention for 1,000 pairs that its mask leaves."""
    q, kv = blocks["q"], blocks["kv"]
    costs, around = trips.bodies(kernel)
    seen = [(i, j) for i in range(length // q) for j in range(length // kv) if (i + 1) * q > j * kv]
    full = sum(i * q >= (j + 1) * kv - 1 for i, j in seen)
    ours = "compute" not in blocks  # its grid has a step for each block of keys or queries, and loops over the others
    steps = (length // kv if "q_held" in blocks else length // q) if ours else len(seen)
    total = full * min(costs) + (len(seen) - full) * max(costs) + steps * sum(region.own for region in around)
    return 1000 * total / (length * (length + 1) / 2)


def _of_pages(kernel: str, blocks: Blocks) -> float | None:
    """Key tokens of a step, all key heads; ours takes them in parts that its blocks do not tell."""
    return math.nan if "keys" in blocks else blocks["pages"] * 64


def _megablox(form: str) -> Side:
    k, n = (MOE["columns"], MOE["inner"]) if form == "transposed" else (MOE["inner"], MOE["columns"])
    tiles = [{"form": form, "m": m, "k": k, "n": n // parts} for m in (128, 256, 512) for parts in (1, 2)]
    return _jax("megablox", tiles, lambda *_: None)


ROUTED = ("ragged_dot.forward", "ragged_dot.backward")
COMPARISONS: dict[str, Comparison] = {
    "attention.forward": Comparison(
        "pairs",
        2 * HEAD_DIM,
        [
            _ours("attention", _of_pairs, causal=False),
            _jax("splash", _splash_blocks("forward"), _of_pairs),
        ],
    ),
    "attention.backward": Comparison(
        "pairs",
        5 * HEAD_DIM,
        [
            _ours("attention", _of_pairs, causal=False, direction="backward"),
            _jax("splash", _splash_blocks("backward"), _of_pairs),
        ],
    ),
    **{
        f"attention.{direction}_causal_16k": Comparison(
            "pairs",
            products * HEAD_DIM,
            [
                _ours("attention", _of_pairs, direction=direction, queries=LONG, keys=LONG),
                _jax("splash", _splash_blocks(direction, length=LONG, causal=True), _of_pairs),
            ],
        )
        for direction, products in (("forward", 2), ("backward", 5))
    },
    "ragged_dot.forward": Comparison(
        "products",
        1,
        [_ours("ragged_dot", lambda *_: None), _megablox("gmm")],
    ),
    "ragged_dot.backward": Comparison(
        "products",
        1,
        [
            _ours("ragged_dot", lambda *_: None, direction="backward"),
            _megablox("transposed"),
            _megablox("tgmm"),
        ],
    ),
    "paged_attention.forward": Comparison(
        "key tokens",
        2 * 32 * HEAD_DIM,
        [
            _ours("paged_attention", _of_pages),
            _jax("ragged_paged", [{"pages": p, "queries": q} for p in (4, 16) for q in (8, 32)], _of_pages),
            _jax("paged", [{"pages": p} for p in (8, 32)], _of_pages),
        ],
    ),
    "linear_cross_entropy.forward": Comparison("products", 1, [_ours("linear_cross_entropy", lambda *_: None)]),
    "linear_cross_entropy.backward": Comparison(
        "products", 1, [_ours("linear_cross_entropy", lambda *_: None, direction="backward")]
    ),
    **{
        f"quantized_matmul.{form}": Comparison(
            "products", 1, [_ours("quantized_matmul", lambda *_: None, dtype=form, rows=256)]
        )
        for form in ("w8a16", "w4a16", "w8a8", "fp8")
    },
}


def rows(target: str, op: str, side: Side, options: Mapping[str, Any], outcome: Outcome) -> Iterator[Row]:
    """A row for each kernel; the blocks of ours are those that it asked for, in the order of the kernels."""
    for at, kernel in enumerate(outcome.kernels):
        if "backward" in op and ("fwd" in kernel.name or "forward" in kernel.name):
            continue  # for what the gradients need of it
        chosen = _blocks(kernel, at, options, outcome)
        unit = COMPARISONS[op].products * _part(op, kernel.name, options)
        work = side.work(kernel.name, chosen)
        units = kernel.hot.slots["MXU"] * SLOT_PRODUCTS[target] / unit if work is None else work
        hot = kernel.hot
        cycles = hot.own + sum(region.bundles for region in hot.inside if region.total("MXU"))
        per_1000, routed = 1000 * cycles / max(units, 1e-9), math.nan
        if op.endswith("16k"):
            per_1000 = _causal(kernel, chosen, LONG)
        if op in ROUTED:
            per_1000, routed = _grouped(kernel, chosen, options.get("form", ""))
        yield Row(
            target,
            op,
            side.name,
            kernel.name,
            " ".join(f"{name}={size}" for name, size in chosen.items()),
            hot.bundles,
            per_1000,
            routed,
            hot.share("MXU"),
            kernel.spills,
            kernel.fills,
            kernel.vmem,
        )


def _part(op: str, kernel: str, options: Mapping[str, Any]) -> float:
    """Products of a kernel over those of its operation: two kernels of a backward pass both compute the scores."""
    if not op.startswith("attention.backward") or options.get("fused"):
        return 1
    return 3 / 5 if "dq" in kernel else 4 / 5 if "dkv" in kernel else 1


def _blocks(kernel: KernelSchedule, at: int, options: Mapping[str, Any], outcome: Outcome) -> Blocks:
    """Block sizes of a kernel: its options for jax's; what ours asked for, found by name, or else by position."""
    if not outcome.asked:
        return {name: size for name, size in options.items() if isinstance(size, int) and not isinstance(size, bool)}
    named = [one for one in outcome.asked if one["kernel"].rpartition(".")[2] in kernel.name]
    return (named or [outcome.asked[min(at, len(outcome.asked) - 1)]])[0]["chosen"]


def compare(target: str, op: str, python: str, timeout: float, show_all: bool) -> Iterator[Row]:
    for side in COMPARISONS[op].sides:
        tried: list[list[Row]] = []
        for options in side.options:
            try:
                outcome = compile_apart(target, side.builder, options, python=python, timeout=timeout, dump=True)
            except CompileError as error:
                reason = str(error).splitlines()[0][:160]
                print(f"  {target} {op} {side.name} {options}: {reason}", file=sys.stderr, flush=True)
                continue
            tried.append(list(rows(target, op, side, options, outcome)))
        best = sorted(tried, key=lambda kernels: sum(row.per_1000 for row in kernels))
        best_routed = sorted(tried, key=lambda kernels: sum(row.routed for row in kernels))
        shown = best[:1] + [kernels for kernels in best_routed[:1] if kernels is not best[0] and op in ROUTED]
        for kernels in best if show_all else shown:
            yield from kernels


def table(lines: list[Row], markdown: bool = False) -> str:
    head = [
        "target",
        "op",
        "side",
        "kernel",
        "blocks",
        "hot",
        "cycles/1k",
        "routed/1k",
        "MXU",
        "spills",
        "fills",
        "VMEM KiB",
    ]
    text = [
        [
            row.target,
            row.op,
            row.side,
            row.kernel[:36],
            row.blocks,
            f"{row.hot_bundles:,}",
            *("-" if math.isnan(figure) else f"{figure:.3g}" for figure in (row.per_1000, row.routed)),
            f"{row.mxu_slots:.0%}",
            f"{row.spills:,}",
            f"{row.fills:,}",
            f"{row.vmem // 1024:,}",
        ]
        for row in lines
    ]
    if markdown:
        return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *text])
    widths = [max(map(len, column)) for column in zip(head, *text, strict=True)]
    return "\n".join(
        "  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in [head, *text]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="v5e,v5p,v6e,tpu7x")
    parser.add_argument("--op", default="", help=f"parts of names, with commas: {', '.join(COMPARISONS)}")
    parser.add_argument("--python", default=sys.executable, help="interpreter with jax[tpu]")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one compile")
    parser.add_argument("--all", action="store_true", help="every block size tried, best first")
    parser.add_argument("--markdown", action="store_true", help="print tables for a page of docs")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    wanted = [part for part in args.op.split(",") if part]
    found: list[Row] = []
    for op in COMPARISONS:
        if wanted and not any(part in op for part in wanted):
            continue
        if reason := cases.missing(op.partition(".")[0]):
            print(f"  {op}: {reason}", file=sys.stderr)
            continue
        for target in args.target.split(","):
            lines = list(compare(target, op, args.python, args.timeout, args.all))
            found += lines
            if lines:
                print(table(lines, args.markdown), flush=True)
    if args.json:
        known = [{name: None if value != value else value for name, value in row._asdict().items()} for row in found]
        with open(args.json, "w") as file:
            json.dump(known, file, indent=1)


if __name__ == "__main__":
    main()
