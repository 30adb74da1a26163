"""Which implementation of an operation runs for a chip, and why not the others."""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pallas_kernels import blocks
from pallas_kernels.chip import Chip, current_chip, interpreted
from pallas_kernels.partition import Layout, auto_axes, run_on_parts

Arguments = dict[str, Any]


class _Explain(NamedTuple):
    """Stands for the wanted implementation where it is to be named, not run."""

    wanted: Any


Wanted = str | Sequence[str] | None | _Explain


class Implementation(NamedTuple):
    """One way to compute an operation.

    run: takes the operation's arguments by name.
    platform: where it is at home; None is everywhere. On a CPU it runs interpreted, if it is asked for by name.
    refuse: (chip, arguments) -> why it does not take this call, one sentence; None if it does.
    unproven: why it runs only if it is asked for by name; empty once its results were checked.
    """

    name: str
    run: Callable[..., Any]
    platform: str | None = None
    refuse: Callable[[Chip, Arguments], str | None] = lambda chip, arguments: None
    unproven: str = ""


class Choice(NamedTuple):
    """The implementation that runs, and for each one passed over the reason."""

    name: str
    passed_over: dict[str, str]


class _Explained(Exception):
    """Carries a Choice out of an operation instead of running it."""

    def __init__(self, choice: Choice):
        self.choice = choice


def call(
    op: str,
    implementations: Sequence[Implementation],
    wanted: Wanted,
    arguments: Arguments,
    layout: Layout | None = None,
) -> Any:
    """Runs `op` by the implementation `wanted` (a name, or names in order of preference), or by the best one.

    `implementations` stand in order of preference. layout: how the arguments may be split over a mesh. Raises
    ValueError where none that is wanted takes the call.
    """
    explaining, names = isinstance(wanted, _Explain), wanted.wanted if isinstance(wanted, _Explain) else wanted
    chosen, choice = _choose(op, implementations, names, arguments)
    if explaining:
        raise _Explained(choice)
    run = functools.partial(_traced_once, chosen.run) if _as_one(chosen, arguments) else chosen.run
    return run(**arguments) if layout is None else run_on_parts(run, arguments, layout)


def _as_one(chosen: Implementation, arguments: Arguments) -> bool:
    """Whether a call becomes a program of its own.

    Called on arrays it does: compiled once for all calls like it, where each of its steps would be compiled and run by
    itself. While a program is traced it does for Mosaic GPU, whose lowering of a kernel takes a second: once for all layers.
    """
    if chosen.platform is not None and interpreted():
        return False
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments))
    return chosen.platform == "gpu" or not traced


def _traced_once(run: Callable[..., Any], **arguments: Any) -> Any:
    """`run`, traced and lowered once for all calls of the same shapes and options."""
    arrays = {name: value for name, value in arguments.items() if _has_arrays(value)}
    options = {name: value for name, value in arguments.items() if name not in arrays}
    if not arrays:
        return run(**options)
    return _jitted(run, tuple(options.items()), blocks.forced_now())(arrays)


def _has_arrays(value: Any) -> bool:
    return any(isinstance(leaf, jax.Array | np.ndarray) for leaf in jax.tree.leaves(value))


@functools.lru_cache(maxsize=1024)
def _jitted(run: Callable[..., Any], options: tuple, forced: str) -> Callable[..., Any]:
    """forced: block sizes, which a trace keeps."""
    del forced
    return jax.jit(lambda arrays: run(**arrays, **dict(options)))


def explain(op: str | Callable[..., Any], *args, implementation: Wanted = None, **kwargs) -> Choice:
    """Which implementation op(*args, **kwargs) would run and why each other was passed over; runs nothing.

    Arrays may be `jax.ShapeDtypeStruct`s. `op` is a public function of this package, or its name.
    """
    run = getattr(importlib.import_module(__package__), op) if isinstance(op, str) else op
    try:
        run(*args, implementation=_Explain(implementation), **kwargs)
    except _Explained as found:
        return found.choice
    raise ValueError(f"{op} is no operation of this package")


def _choose(op, implementations, wanted, arguments) -> tuple[Implementation, Choice]:
    chip = current_chip()
    passed_over: dict[str, str] = {}
    known = {candidate.name: candidate for candidate in implementations}
    names = list(known) if wanted is None else [wanted] if isinstance(wanted, str) else list(wanted)
    for name in names:
        if name not in known:
            raise ValueError(f"implementation={name!r} of {op} is not known; use one of {', '.join(known)}")
    for name in names:
        reason = _reason(known[name], chip, arguments, forced=wanted is not None)
        if reason is None:
            rest = dict.fromkeys(known, f"{name} comes before it" if wanted is None else "not asked for")
            del rest[name]
            return known[name], Choice(name, rest | passed_over)
        passed_over[name] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
    raise ValueError(f"{op} cannot run here as asked ({reasons})")


def _reason(candidate: Implementation, chip: Chip, arguments: Arguments, forced: bool) -> str | None:
    home = candidate.platform
    if home is not None and chip.platform != home and not (forced and chip.platform == "cpu"):
        return f"is written for a {home}, not for {chip.kind}"
    if candidate.unproven and not forced:
        return candidate.unproven
    if home is not None and (axes := auto_axes()):
        return f"does not see how arguments are split over auto axes ({', '.join(axes)}): call it inside shard_map"
    return candidate.refuse(chip, arguments)
