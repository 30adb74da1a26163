"""Block sizes of the kernels: what was tuned for a chip and shape, or else what the kernel's model of the chip prefers.

Tuned sizes ship as tuned/<chip>.json, {kernel: {key: {field: size}}}; `python -m pallas_kernels.tune` writes them.
"""

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pallas_kernels.dispatch import current_chip

log = logging.getLogger(__name__)
FOLDER = Path(__file__).parent / "tuned"
Blocks = TypeVar("Blocks", bound=NamedTuple)
_said: set[tuple[str, str, str]] = set()


def pick(kernel: str, key: Mapping[str, Any], candidates: Sequence[Blocks]) -> Blocks:
    """The tuned one of `candidates`, or the first of them.

    kernel: "attention.forward", say. key: what the choice depends on (head_dim, dtype, ...). candidates: sizes that
    fit the chip, NamedTuples of integers, best first by a model of the chip.
    """
    kind, text = current_chip().kind, key_text(key)
    sizes = tuned(kind).get(kernel, {}).get(text)
    for candidate in candidates:
        if sizes == candidate._asdict():
            return candidate
    if (kind, kernel, text) not in _said:
        _said.add((kind, kernel, text))
        log.info("%s has no tuned blocks for %s on %s; it takes %s", kernel, text, kind, candidates[0])
    return candidates[0]


def key_text(key: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in sorted(key.items()))


def path(kind: str) -> Path:
    """The file of a kind of chip: "TPU v6 lite" -> tuned/tpu_v6_lite.json."""
    return FOLDER / f"{kind.lower().replace(' ', '_')}.json"


@functools.cache
def tuned(kind: str) -> dict[str, dict[str, dict[str, int]]]:
    file = path(kind)
    return json.loads(file.read_text()) if file.exists() else {}
