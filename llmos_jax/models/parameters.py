"""The parameters of a model without its modules: worked out once, then read from the disk.

    $LLMOS_HOME/executables/IDENTITY.parameters

A start whose programs are compiled already needs no more of a model than this; so it goes without Flax and without tracing
the modules, which together take longer than all the rest of our code. A file is a line with the sha256 of the next one and
a line of JSON; one that is damaged is as good as none.
"""

import contextlib
import functools
import hashlib
import json
import os
from pathlib import Path

import jax
from jax.sharding import Mesh

from llmos_jax.compiler import cache
from llmos_jax.compiler.identity import source_digest, versions
from llmos_jax.config import ModelConfig
from llmos_jax.files import draft_of, read_sealed, seal
from llmos_jax.sharding import Logical, sharding

Params = dict[str, jax.Array]
Known = tuple[str, tuple[int, ...], str, Logical]  # dotted path, shape, dtype, names of the dimensions

MAGIC = b"llmos-parameters-1"  # changes with the format
SUFFIX = ".parameters"


def known_params(config: ModelConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """`decoder.abstract_params`, without the decoder where they were known before."""
    return {
        path: jax.ShapeDtypeStruct(shape, jax.numpy.dtype(dtype), sharding=sharding(mesh, logical))
        for path, shape, dtype, logical in _known(config)
    }


@functools.lru_cache(maxsize=32)
def _known(config: ModelConfig) -> tuple[Known, ...]:
    folder = cache.folder()
    file = None if folder is None else folder / f"{_identity(config)}{SUFFIX}"
    if file is not None and (kept := _read(file)) is not None:
        return kept
    from llmos_jax.models.decoder import abstract_params, logical_dims

    names = logical_dims(config)
    known = tuple((path, leaf.shape, str(leaf.dtype), names[path]) for path, leaf in abstract_params(config).items())
    if file is not None:
        _write(file, known)
    return known


def _identity(config: ModelConfig) -> str:
    parts = (source_digest(__name__), versions(), repr(config))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read(file: Path) -> tuple[Known, ...] | None:
    line = read_sealed(file, MAGIC)
    if line is None:
        return None
    with contextlib.suppress(OSError):
        os.utime(file)  # the last use
    return tuple((path, tuple(shape), dtype, tuple(names)) for path, shape, dtype, names in json.loads(line)["known"])


def _write(file: Path, known: tuple[Known, ...]) -> None:
    line = json.dumps({"program": "parameters", "known": known}).encode()
    with contextlib.suppress(OSError), draft_of(file) as draft:
        draft.write_bytes(seal(MAGIC, line) + line)
        draft.chmod(0o600)
