"""Weights that took converting, kept as programs take them: a start after the first maps them into memory.

    $LLMOS_HOME/executables/IDENTITY.weights

They lie beside the executables, are counted with them and removed with them (compiler/cache.py). A file is a line with
the sha256 of the next one, a line of JSON that says what it is, and the arrays, each with its checksum. One that is
damaged is removed and made again. Only what lies whole in this host's memory is kept, and only where it is small enough
to leave room for executables.
"""

import contextlib
import hashlib
import json
import mmap
import os
import time
import zlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llmos_jax.compiler import cache
from llmos_jax.config import ModelConfig
from llmos_jax.files import digest_of_modules, draft_of, seal
from llmos_jax.models.weights.assemble import is_on_host
from llmos_jax.models.weights.threads import threads

Abstract = dict[str, jax.ShapeDtypeStruct]
Params = dict[str, jax.Array]

MAGIC = b"llmos-weights-1"  # changes with the format
SUFFIX = ".weights"
BOUNDARY = 4096  # an array begins at a multiple of it: XLA takes over what is aligned, without a copy
SHARE = 4  # of the cache's size limit, one model may take this part


class _Damaged(Exception):
    """A file that cannot be trusted; the message says why."""


def converted(source: Path, model: ModelConfig, abstract: Abstract, convert: Callable[[], Params]) -> Params:
    """What `convert` makes of the file `source`, laid out as `abstract`: from where it was kept, else made and kept."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in abstract.values())
    folder = cache.folder() if size <= cache.size_limit() // SHARE else None
    if folder is None or not all(leaf.sharding and is_on_host(leaf.sharding) for leaf in abstract.values()):
        return convert()
    file = folder / f"{_identity(source, model, abstract)}{SUFFIX}"
    try:
        return _map(file, abstract)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, _Damaged) as error:
        cache.say(f"the kept weights {file.name[:16]} cannot be used ({error}); they are removed and made again")
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
    started = time.perf_counter()
    params = convert()
    try:
        _write(file, source, params, time.perf_counter() - started)
        cache.prune()
    except OSError as error:  # a full disk
        cache.say(f"the weights of {source.name} are not kept as they were converted: {error.strerror}")
    return params


def _identity(source: Path, model: ModelConfig, abstract: Abstract) -> str:
    """sha256 of all that decides the arrays: the file (not its name), the model and the code that converts."""
    status = source.stat()
    parts = (
        (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns),
        (digest_of_modules(Path(__file__).parent), metadata.version("gguf"), np.__version__),
        repr(model),
        [(path, leaf.shape, str(leaf.dtype)) for path, leaf in abstract.items()],
    )
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _map(file: Path, abstract: Abstract) -> Params:
    """Raises FileNotFoundError where there is none; OSError, ValueError, KeyError, TypeError and _Damaged for a bad one."""
    with file.open("rb") as opened:
        # Copied where it is written to: a program that reuses the memory of its arguments does not reach the file.
        data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    line_of_seal, line = data.readline(), data.readline()
    if line_of_seal != seal(MAGIC, line):
        raise _Damaged("the beginning is not as it was written")
    stored = {entry["path"]: entry for entry in json.loads(line)["arrays"]}

    def array(path: str) -> np.ndarray:
        leaf, entry = abstract[path], stored[path]
        values = np.frombuffer(data, leaf.dtype, leaf.size, entry["offset"]).reshape(leaf.shape)
        if zlib.crc32(values.view(np.uint8).data) != entry["crc32"]:
            raise _Damaged(f"the checksum of {path} does not fit")
        return values

    arrays = dict(zip(abstract, threads().map(array, abstract), strict=True))
    with contextlib.suppress(OSError):
        os.utime(file)  # the last use
    return {path: jax.device_put(values, abstract[path].sharding, may_alias=True) for path, values in arrays.items()}


def _write(file: Path, source: Path, params: Params, seconds: float) -> None:
    arrays = {path: np.asarray(value) for path, value in params.items()}
    entries: list[dict[str, Any]] = []
    end = BOUNDARY * 64  # of the two lines, by far
    for path, values in arrays.items():
        crc32 = zlib.crc32(np.ascontiguousarray(values).view(np.uint8).data)
        entries.append({"path": path, "offset": end, "crc32": crc32})
        end += -(-values.nbytes // BOUNDARY) * BOUNDARY
    header = {"program": "weights", "source": source.name, "target": "cpu:1", "compile_seconds": round(seconds, 3)}
    line = json.dumps(header | {"arrays": entries}).encode() + b"\n"
    with draft_of(file) as draft:
        with draft.open("wb") as opened:
            opened.write(seal(MAGIC, line) + line)
            for entry, values in zip(entries, arrays.values(), strict=True):
                opened.seek(entry["offset"])
                opened.write(np.ascontiguousarray(values).view(np.uint8).data)
        draft.chmod(0o600)
