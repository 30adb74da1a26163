"""What a program is, known without tracing it: everything that decides what the compiler would make of it.

Two programs with one identity compile to the same executable. What cannot be told apart cheaply is told apart too
often, never too seldom: any change of our source text, or of a jax setting, makes another identity.
"""

import functools
import hashlib
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from pallas_kernels.native import native

if TYPE_CHECKING:
    from llmos_jax.compiler.program import Program

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "jaxtyping", "numpy")  # their source is traced, or compiles
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "PJRT_NPROC")
# jax settings that say where things are stored or what is printed; all others count.
INDIFFERENT = ("cache", "log", "debug", "dump", "traceback", "timeout", "address", "profil", "platforms", "preemption")
TOP = Path(__file__).parents[2]
SOURCE_ROOTS = ("llmos_jax", "pallas_kernels")


def identity(program: "Program") -> str:
    """sha256 of `ingredients`, in hexadecimal."""
    return hashlib.sha256(json.dumps(ingredients(program), sort_keys=True).encode()).hexdigest()


def ingredients(program: "Program") -> dict[str, Any]:
    """What the identity is made of, by name, as text and lists of text.

    Raises ValueError where a static value or a pytree prints the address of an object: such text differs between
    processes, and says nothing about the value.
    """
    leaves, structure = jax.tree.flatten(program.args)
    places, places_structure = jax.tree.flatten(program.out_shardings)
    return {
        "name": program.name,
        "function": _named(program.function),
        "source": source_digest(program.function.__module__),
        "static": [_static(value) for value in program.static],
        "mesh": _mesh(program.mesh),
        "structure": _stable(str(structure)),
        "args": [f"{leaf.dtype}{list(leaf.shape)} {_place(leaf.sharding, program.mesh)}" for leaf in leaves],
        "donate": list(program.donate),
        "out_structure": _stable(str(places_structure)),
        "out_shardings": [_place(place, program.mesh) for place in places],
        "options": [_stable(repr(option)) for option in program.options or ()],
        **surroundings(program.mesh),
    }


def surroundings(mesh: Mesh) -> dict[str, Any]:
    """What decides about a compilation and is not the program's: versions, settings, the host."""
    device = mesh.devices.flat[0]
    on_cpu = device.platform == "cpu"
    # As an attribute a setting is what holds in this thread, a surrounding context manager's included.
    settings = {name: repr(getattr(jax.config, name, value)) for name, value in jax.config.values.items()}
    return {
        "versions": versions(),
        "compiler": device.client.platform_version,
        "settings": {k: v for k, v in settings.items() if not any(part in k for part in INDIFFERENT)},
        "environment": {name: os.environ.get(name, "") for name in VARIABLES},
        "host": [cpu_features(), *native()] if on_cpu else "",
        "process": [jax.process_index(), jax.process_count()],
    }


@functools.cache
def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = ""
    return found


@functools.cache
def cpu_features() -> str:
    """The processor, its instruction sets and how many cores this process may use: CPU programs are made for these."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = [platform.processor()]
    kept = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))] or lines
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()} {cores} " + hashlib.sha256("\n".join(kept).encode()).hexdigest()


@functools.cache
def source_digest(module: str) -> str:
    """sha256 of the text of our two packages, tuned block sizes included, and of `module` where it is none of ours."""
    digest = hashlib.sha256()
    for file in _source_files(module):
        name = file.relative_to(TOP) if file.is_relative_to(TOP) else file
        digest.update(f"{name}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _source_files(module: str) -> list[Path]:
    files = [file for root in SOURCE_ROOTS for file in sorted((TOP / root).rglob("*.py"))]
    files += sorted((TOP / "pallas_kernels" / "tuned").glob("*.json"))
    origin = getattr(sys.modules.get(module), "__file__", None)
    return [*files, Path(origin)] if origin and Path(origin) not in files else files


def _static(value: Any) -> str:
    if isinstance(value, Mesh):
        return _mesh(value)
    if isinstance(value, tuple) and type(value) is tuple:
        return f"({', '.join(_static(item) for item in value)})"
    if callable(value):
        return f"{_named(value)} {source_digest(value.__module__)}"
    return _stable(repr(value))


def _named(function: Any) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _mesh(mesh: Mesh | AbstractMesh) -> str:
    if isinstance(mesh, AbstractMesh):
        return f"{dict(mesh.shape)} {mesh.axis_types}"
    devices = [(device.device_kind, device.id, device.process_index) for device in mesh.devices.flat]
    return f"{dict(mesh.shape)} {mesh.axis_types} {devices}"


def _place(sharding: Any, mesh: Mesh) -> str:
    """A sharding in words; that of the program's own mesh is told once, by `mesh`."""
    if isinstance(sharding, NamedSharding):
        where = "" if sharding.mesh == mesh else f" of {_mesh(sharding.mesh)}"
        return f"{sharding.spec} {sharding.memory_kind}{where}"
    return _stable(repr(sharding))


def _stable(text: str) -> str:
    if " at 0x" in text:
        raise ValueError(f"a program's identity cannot hold {text[:200]}: it names an object by its address")
    return text
