"""Block sizes of the kernels: what was tuned for a chip and shape, or else what the kernel's model of the chip prefers.

Tuned sizes ship as tuned/<chip>.json, {kernel: {key: {field: size}}}; `python -m pallas_kernels.tune` writes them.
"""

import contextlib
import functools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pallas_kernels.chip import current_chip

log = logging.getLogger(__name__)
FOLDER = Path(__file__).parent / "tuned"
Blocks = TypeVar("Blocks", bound=tuple)  # a NamedTuple of integers; that name is no type
Sizes = Mapping[str, int]


class Asked(NamedTuple):
    """One choice that was made."""

    kernel: str
    key: str
    candidates: list[dict[str, int]]
    chosen: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        return self._asdict()


_said: set[tuple[str, str, str]] = set()
_forced: dict[str, Sizes] = {}
_records: list[list[Asked]] = []


def pick(kernel: str, key: Mapping[str, Any], candidates: Sequence[Blocks]) -> Blocks:
    """The tuned one of `candidates`, or the first of them.

    kernel: "attention.forward", say. key: what the choice depends on (head_dim, dtype, ...). candidates: sizes that
    fit the chip, NamedTuples of integers, best first by a model of the chip.
    Raises ValueError for sizes forced with `forced` that are no candidate.
    """
    chosen = _choose(kernel, key_text(key), candidates)
    for record in _records:
        record.append(Asked(kernel, key_text(key), [_sizes(one) for one in candidates], _sizes(chosen)))
    return chosen


def _choose(kernel: str, text: str, candidates: Sequence[Blocks]) -> Blocks:
    kind = current_chip().kind
    wanted = _forced.get(kernel)
    sizes = wanted if wanted is not None else tuned(kind).get(kernel, {}).get(text)
    for candidate in candidates:
        if sizes == _sizes(candidate):
            return candidate
    if wanted is not None:
        raise ValueError(f"{kernel} has no blocks {dict(wanted)} among its candidates for {text} on {kind}")
    if (kind, kernel, text) not in _said:
        _said.add((kind, kernel, text))
        log.info("%s has no tuned blocks for %s on %s; it takes %s", kernel, text, kind, candidates[0])
    return candidates[0]


def _sizes(candidate: Any) -> dict[str, int]:
    return candidate._asdict()


@contextlib.contextmanager
def forced(kernel: str | Mapping[str, Sizes], sizes: Sizes | None = None) -> Iterator[None]:
    """While it is open `pick` takes these sizes: forced("attention.forward", {"q": 512}), or a mapping of kernels.

    Programs that jax has already traced keep theirs; `jax.clear_caches()` has them traced again.
    """
    given = {kernel: sizes or {}} if isinstance(kernel, str) else dict(kernel)
    before = dict(_forced)
    _forced.update(given)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def forced_now() -> str:
    """What `forced` holds, in a form that can be compared."""
    return repr(sorted((kernel, sorted(sizes.items())) for kernel, sizes in _forced.items()))


@contextlib.contextmanager
def recorded() -> Iterator[list[Asked]]:
    """Collects the choices that are made while it is open."""
    record: list[Asked] = []
    _records.append(record)
    try:
        yield record
    finally:
        _records[:] = [other for other in _records if other is not record]


def key_text(key: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in sorted(key.items()))


def path(kind: str) -> Path:
    """The file of a kind of chip: "TPU v6 lite" -> tuned/tpu_v6_lite.json."""
    return FOLDER / f"{kind.lower().replace(' ', '_')}.json"


@functools.cache
def tuned(kind: str) -> dict[str, dict[str, dict[str, int]]]:
    file = path(kind)
    return json.loads(file.read_text()) if file.exists() else {}


def write(kind: str, kernel: str, key: str, sizes: Sizes) -> Path:
    """Adds one tuned choice to the file of a kind of chip."""
    table = json.loads(path(kind).read_text()) if path(kind).exists() else {}
    table.setdefault(kernel, {})[key] = dict(sizes)
    ordered = {name: dict(sorted(keys.items())) for name, keys in sorted(table.items())}
    FOLDER.mkdir(exist_ok=True)
    path(kind).write_text(json.dumps(ordered, indent=1) + "\n")
    tuned.cache_clear()
    return path(kind)
