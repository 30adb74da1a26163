"""Importing what a command needs."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around imports of many modules: what they make stays, and is not looked through for garbage, now or later.

    Without this, Python looks through all of it again and again as it grows, which takes a quarter of a start.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
