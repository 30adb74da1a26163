"""What the kernels for Hopper GPUs share: which chips those are, and Mosaic GPU, which is imported when it is needed.

It takes a second, and with jax 0.10 it needs absl-py, which jax does not bring.
"""

import functools
import importlib
from typing import Any

from pallas_kernels.chip import Chip

NAMES = ("H100", "H200", "H800", "H20", "GH200")


def refuse(chip: Chip) -> str | None:
    """Why no kernel for Hopper runs for a chip here, or None. A CPU interprets them."""
    if chip.platform == "gpu" and not any(name in chip.kind for name in NAMES):
        return f"{chip.kind} is not a Hopper GPU and has no wgmma"
    return _missing()


@functools.cache
def _missing() -> str | None:
    try:
        mosaic_gpu()
    except ImportError as error:
        return f"Mosaic GPU cannot be imported ({error})"
    return None


def mosaic_gpu() -> Any:
    return importlib.import_module("jax.experimental.pallas.mosaic_gpu")


def find_runtime() -> None:
    """Lets an executable with kernels be loaded in a process that has traced none.

    XLA looks for the functions that kernels call in a library whose place Mosaic GPU says when it is imported.
    """
    _missing()
