"""Program and Executable: the door through which anything reaches a device.

A program is a pure function with abstract, sharded arguments. It is compiled before an array exists, so what it will
take is known before it runs.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh


@dataclass(frozen=True)
class Program:
    """A pure function and what it is called with.

    args: pytrees of `jax.ShapeDtypeStruct` with shardings. out_shardings: as `jax.jit`'s; None lets the compiler
    choose. donate: positions of the arguments whose buffers the results may take over.
    """

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    mesh: Mesh
    donate: tuple[int, ...] = ()
    out_shardings: Any = None

    def compile(self) -> "Executable":
        started = time.perf_counter()
        options = {} if self.out_shardings is None else {"out_shardings": self.out_shardings}
        with jax.set_mesh(self.mesh):
            compiled = jax.jit(self.function, donate_argnums=self.donate, **options).lower(*self.args).compile()
        return Executable(self.name, compiled, self.mesh, time.perf_counter() - started)


@dataclass(frozen=True)
class Executable:
    """A compiled program. Calling it never traces or compiles: arguments of another shape are an error."""

    name: str
    compiled: Any = field(repr=False)
    mesh: Mesh
    compile_seconds: float

    def __call__(self, *args: Any) -> Any:
        return self.compiled(*args)

    @functools.cached_property
    def peak_bytes(self) -> int:
        """Bytes a device holds at the worst moment: arguments, results that do not reuse them, and temporaries."""
        memory = self.compiled.memory_analysis()
        return (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        )
