"""Program and Executable: the door through which anything reaches a device.

A program is a pure function with abstract, sharded arguments. It is compiled before an array exists, so what it will
take is known before it runs; and what it is can be told without tracing it, so what was compiled once is found again.
"""

import functools
import re
import sys
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from llmos_jax.compiler import cache
from llmos_jax.compiler.identity import identity
from llmos_jax.compiler.options import Options, compiler_options


class OutOfMemory(Exception):
    """The compiler refused a program; `temporaries` are the bytes of a device that it says they need."""

    def __init__(self, temporaries: float):
        super().__init__(f"the program's temporaries take {temporaries / 2**30:.1f} GiB a device, more than there is")
        self.temporaries = temporaries


@dataclass(frozen=True)
class Program:
    """A pure function and what it is called with: `function(*static, *args)`.

    function: of a module, found there by its name; no lambda and no function inside another one, whose meaning would
      depend on what it closes over. static: hashable values that are fixed in the compiled program and that print
      completely (frozen dataclasses, numbers, strings, a Mesh), and functions as above. args: pytrees of
      `jax.ShapeDtypeStruct` with shardings. donate: positions in `args` whose buffers the results may take over.
    out_shardings: as `jax.jit`'s; None lets the compiler choose. options: of the XLA compiler, as (name, value); None
      takes those of the chip (options.py).
    Raises ValueError where `function` or `static` are not such.
    """

    name: str
    function: Callable[..., Any]
    static: tuple[Hashable, ...]
    args: tuple[Any, ...]
    mesh: Mesh
    donate: tuple[int, ...] = ()
    out_shardings: Any = None
    options: Options | None = None

    def __post_init__(self) -> None:
        if self.options is None:
            object.__setattr__(self, "options", compiler_options(self.mesh))
        for function in (self.function, *filter(callable, self.static)):
            where, called = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
            if getattr(sys.modules.get(where), called, None) is not function:
                raise ValueError(
                    f"{where}.{called} is not a function of a module; the functions of a Program stand at the top of "
                    "their modules and take what they need as arguments"
                )
        for value in self.static:
            try:
                hash(value)
            except TypeError as error:
                raise ValueError(f"a static value of the program {self.name} is not hashable: {value!r}") from error

    def lower(self) -> jax.stages.Lowered:
        """The traced program, before the compiler."""
        first = len(self.static)
        options = {} if self.out_shardings is None else {"out_shardings": self.out_shardings}
        jitted = jax.jit(
            self.function,
            static_argnums=tuple(range(first)),
            donate_argnums=tuple(first + position for position in self.donate),
            **options,
        )
        with jax.set_mesh(self.mesh):
            return jitted.lower(*self.static, *self.args)

    def compile(self) -> "Executable":
        """The executable: from the cache on disk where it was compiled before, else from the compiler.

        One for described devices tells its memory and its text, and cannot be called. Raises OutOfMemory where the
        compiler finds no place for the temporaries.
        """
        started = time.perf_counter()
        compiled, stored = cache.load_or_build(self._identity, self.name, self.mesh, self._build)
        return Executable(self.name, compiled, self.mesh, time.perf_counter() - started, stored)

    @functools.cached_property
    def _identity(self) -> str:
        return identity(self)

    def was_compiled(self) -> bool:
        """Whether `compile` will find it in the cache, as far as can be told without looking into the entry."""
        return cache.holds(self._identity)

    def _build(self) -> jax.stages.Compiled:
        lowered = self.lower()
        with jax.set_mesh(self.mesh):
            try:
                return lowered.compile(dict(self.options or ()) or None)
            except jax.errors.JaxRuntimeError as error:
                if found := re.search(r"(?:temporaries \(|Used )([\d.]+)([KMG])", str(error)):
                    raise OutOfMemory(float(found[1]) * 2.0 ** {"K": 10, "M": 20, "G": 30}[found[2]]) from error
                raise


@dataclass(frozen=True)
class Executable:
    """A compiled program. Calling it never traces or compiles: arguments of another shape are an error.

    compile_seconds: what `Program.compile` took, whether it compiled or loaded. stored: what the cache knew about it,
    None where it was compiled just now.
    """

    name: str
    compiled: Any = field(repr=False)
    mesh: Mesh
    compile_seconds: float
    stored: cache.Stored | None = field(default=None, repr=False)

    def __call__(self, *args: Any) -> Any:
        return self.compiled(*args)

    @property
    def from_cache(self) -> bool:
        return self.stored is not None

    @functools.cached_property
    def memory(self) -> cache.Memory:
        """Bytes a device holds and what for, by the compiler's account when it was compiled."""
        return self.stored.memory if self.stored else cache.Memory.of(self.compiled, self.mesh.devices.flat[0].platform)

    @property
    def peak_bytes(self) -> int:
        """Bytes a device holds at the worst moment, arguments included; the program's code is not among them."""
        return self.memory.peak

    @functools.cached_property
    def hlo(self) -> str:
        """The optimized HLO text, as it was when the program was compiled."""
        return self.stored.hlo if self.stored else self.compiled.as_text()
