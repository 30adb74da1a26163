"""Modules that are imported when they are first needed: a chip's kernels load that chip's compiler, and few runs trace any."""

import functools
import importlib
from collections.abc import Callable
from typing import Any


class Later:
    """Stands for a module: an attribute of it is one of the module's functions, which imports the module when called."""

    def __init__(self, module: str):
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return functools.partial(_call, self._module, name)


def _call(module: str, name: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(importlib.import_module(module), name)(*args, **kwargs)
