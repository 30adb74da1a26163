"""Chooses the block sizes of an operation's kernels for a chip and a shape, and stores them with the package.

    python -m pallas_kernels.tune --target v6e --op attention --shape queries=8192,keys=8192,head_dim=128
    python -m pallas_kernels.tune --op attention --direction backward        # measured, on the chip of this machine

Each kernel's own candidates are tried, best first by its model of the chip. Those that the compiler refuses (more VMEM
or shared memory than there is) fall out. The rest are ranked by time on a chip that is here, or else, for a TPU that is
only described, by the static schedule of the kernel. What is best so far is stored at once, so an interrupt loses
nothing. GPUs that are only described give no ranking: nothing is stored for them.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from pallas_kernels import blocks, cases
from pallas_kernels.schedule import CompileError, KernelSchedule, Outcome, compile_apart
from pallas_kernels.targets import GPUS, TPUS

LIMIT = 12  # candidates of a kernel
WORTH = 0.03  # a static gain below this share is noise: the model's choice stays
Sizes = Mapping[str, int]
# Sizes of a TPU kernel whose product is what one run of its hot loop does.
HOT = {
    "attention.forward": ("q", "kv"),
    "attention.backward": ("q", "kv"),
    "ragged_dot.forward": ("chunk", "columns"),
    "ragged_dot.transposed": ("chunk", "columns"),
    "ragged_dot.weights": ("chunk", "features", "columns"),
}


class Trial(NamedTuple):
    """One candidate of one kernel. cost: seconds, or static cycles; inf where it does not compile."""

    kernel: str
    key: str
    sizes: dict[str, int]
    cost: float
    note: str = ""


class Best(NamedTuple):
    """The choice for one kernel and key. model: the cost of what its model of the chip prefers."""

    kernel: str
    key: str
    sizes: dict[str, int]
    cost: float
    model: float


Evaluate = Callable[[Mapping[str, Sizes], str], tuple[float, str]]


def tune(
    asked: list[dict[str, Any]],
    evaluate: Evaluate,
    *,
    limit: int = LIMIT,
    worth: float = WORTH,
    seen: Callable[[Trial], None] = lambda trial: None,
    keep: Callable[[Best], None] = lambda best: None,
) -> list[Best]:
    """The best block sizes for each kernel of `asked` (see `blocks.recorded`), one kernel after the other.

    evaluate: (block sizes by kernel, the kernel in question) -> (cost, a note); raises CompileError for sizes that do
    not fit. keep is called with each choice that is better than the first candidate by the share `worth`, when found.
    """
    settled: dict[str, Sizes] = {}
    found = []
    for kernel, key, candidates in _distinct(asked):
        best: Best | None = None
        for sizes in candidates[:limit]:
            trial = _try(kernel, key, sizes, settled, evaluate)
            seen(trial)
            if best is None:
                best = Best(kernel, key, sizes, trial.cost, trial.cost)
            elif trial.cost < best.cost and not trial.cost > (1 - worth) * best.model:
                best = best._replace(sizes=sizes, cost=trial.cost)
                keep(best)
        if best is not None and math.isfinite(best.cost):
            settled[kernel] = best.sizes
            found.append(best)
    return found


def _try(kernel: str, key: str, sizes: dict[str, int], settled: Mapping[str, Sizes], evaluate: Evaluate) -> Trial:
    try:
        cost, note = evaluate({**settled, kernel: sizes}, kernel)
    except CompileError as error:
        return Trial(kernel, key, sizes, math.inf, str(error).splitlines()[0][:120])
    return Trial(kernel, key, sizes, cost, note)


def _distinct(asked: list[dict[str, Any]]) -> Iterator[tuple[str, str, list[dict[str, int]]]]:
    """Each kernel once (the first key it was asked with), if there is a choice at all."""
    done = set()
    for one in asked:
        if one["kernel"] not in done and len(one["candidates"]) > 1:
            done.add(one["kernel"])
            yield one["kernel"], one["key"], one["candidates"]


def static_cost(kernel: KernelSchedule, name: str = "", sizes: Sizes | None = None) -> float:
    """Cycles of the hot loop for a fixed amount of work: of what its sizes say it does, see HOT.

    Where they do not say it, bundles per slot of the MXU count; that is nominal, since one product may be scheduled in
    more slots than another. Kernels whose loops all have constant bounds count in full. These are not comparable, but
    a kernel is of one kind whatever its blocks.
    """
    if all(loop.trips is not None for loop in kernel.loops):
        return float(kernel.cycles())
    hot = kernel.hot
    if name in HOT and sizes is not None:
        return hot.bundles / math.prod(sizes[field] for field in HOT[name])
    return hot.bundles / max(1, hot.total("MXU"))


def named(kernels: list[KernelSchedule], kernel: str) -> list[KernelSchedule]:
    """Those compiled for "attention.forward": by what their custom calls are named, or else all of them."""
    for name in (kernel.replace(".", "_"), kernel.rpartition(".")[2]):
        if found := [one for one in kernels if name in one.name]:
            return found
    return kernels


def by_schedule(target: str, options: Mapping[str, Any], python: str, timeout: float) -> tuple[Outcome, Evaluate]:
    """What the call asks for on a described TPU, and a cost for other sizes: that of the kernel they are for."""

    def compiled(forced: Mapping[str, Sizes]) -> Outcome:
        builder = "pallas_kernels.cases:build"
        return compile_apart(target, builder, options, forced=forced, python=python, timeout=timeout, dump=True)

    def evaluate(forced: Mapping[str, Sizes], kernel: str) -> tuple[float, str]:
        kernels = named(compiled(forced).kernels, kernel)
        spills = sum(one.spills for one in kernels)
        return sum(static_cost(one, kernel, forced.get(kernel)) for one in kernels), f"{spills} spills"

    return compiled({}), evaluate


def by_time(options: Mapping[str, Any], repeats: int = 20) -> tuple[list[dict[str, Any]], Evaluate]:
    """The same on the chip of this machine, where the cost is the seconds of a call."""
    function, specs = cases.build(**options)
    args = cases.arrays(options["op"], specs)

    def evaluate(forced: Mapping[str, Sizes], kernel: str) -> tuple[float, str]:
        jax.clear_caches()  # a traced program keeps its block sizes
        try:
            with blocks.forced(forced):
                run = jax.jit(function).lower(*args).compile()
            jax.block_until_ready(run(*args))
        except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
            raise CompileError(str(error)) from error
        times = []
        for _ in range(3):  # queued one behind another: the host's part of a call is hidden
            started = time.perf_counter()
            jax.block_until_ready([run(*args) for _ in range(repeats)][-1])
            times.append((time.perf_counter() - started) / repeats)
        return statistics.median(times), ""

    with blocks.recorded() as asked:
        jax.eval_shape(function, *specs)
    return [one.as_json() for one in asked], evaluate


def shape(text: str) -> dict[str, Any]:
    """ "queries=8192,causal=0" -> {"queries": 8192, "causal": 0}. Raises ValueError for anything else."""
    pairs = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or not value.lstrip("-").isdigit():
            raise ValueError(f"{part!r} is not of the form name=number")
        pairs[name] = int(value)
    return pairs


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", default="", help=f"a described chip: {', '.join(TPUS)}; else that of this machine")
    parser.add_argument("--op", required=True, choices=cases.CASES)
    parser.add_argument("--dtype", default="", help="the first of the operation if not given")
    parser.add_argument("--direction", choices=("forward", "backward"), default="forward")
    parser.add_argument("--shape", type=shape, default={}, help="sizes that differ from the case's: name=number,...")
    parser.add_argument("--limit", type=int, default=LIMIT, help="candidates of a kernel")
    parser.add_argument("--timeout", type=float, default=120, help="seconds for one compile")
    parser.add_argument("--python", default=sys.executable, help="interpreter with the target's compiler")
    parser.add_argument("--dry-run", action="store_true", help="store nothing")
    args = parser.parse_args(arguments)
    if args.target in GPUS:
        parser.error(f"--target {args.target}: a described GPU gives no ranking; run this on a machine that has one")
    if args.target and args.target not in TPUS:
        parser.error(f"--target {args.target} is not known; use one of {', '.join(TPUS)}")
    options = {"op": args.op, "direction": args.direction, "dtype": args.dtype or cases.CASES[args.op].dtypes[0]}
    options |= args.shape
    if args.target:
        options["implementation"] = "tpu"
        outcome, evaluate = by_schedule(args.target, options, args.python, args.timeout)
        asked, kind, unit = outcome.asked, outcome.kind, "static"
    else:
        asked, evaluate = by_time(options)
        kind, unit = jax.devices()[0].device_kind, "seconds"
    if not asked:
        print(f"no kernel of {args.op} chooses block sizes on {kind}", file=sys.stderr)
        return 1

    def keep(best: Best) -> None:
        if not args.dry_run:
            print(f"    stored in {blocks.write(kind, best.kernel, best.key, best.sizes).name}", flush=True)

    def seen(trial: Trial) -> None:
        sizes = " ".join(f"{name}={size}" for name, size in trial.sizes.items())
        print(f"  {trial.kernel:28} {sizes:40} {trial.cost:12.5g} {unit}  {trial.note}", flush=True)

    try:
        found = tune(asked, evaluate, limit=args.limit, worth=WORTH if args.target else 0.0, seen=seen, keep=keep)
    except KeyboardInterrupt:
        print("stopped; what was stored stays", file=sys.stderr)
        return 130
    for best in found:
        print(f"{best.kernel} [{best.key}] on {kind}: {best.sizes}, {best.cost / best.model:.2f} of the model's choice")
    return 0


if __name__ == "__main__":
    sys.exit(main())
