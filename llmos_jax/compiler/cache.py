"""Executables on disk: what was compiled once is loaded in every process after it.

    $LLMOS_HOME/executables/IDENTITY.executable
    $LLMOS_HOME/executables/IDENTITY.weights         (models/weights/converted.py)
    $LLMOS_HOME/executables/IDENTITY.parameters      (models/parameters.py)

An entry is a line with the sha256 of all that follows, a line of JSON that says what it is, and the pickled executable.
Entries appear by a rename, so a reader sees a whole one or none; one that is damaged, cut short or not ours is removed
and compiled again. Unpickling runs what the file says, so files are only read from a folder that nobody else can write.
Compiling is always the way out: nothing here stops a run.
"""

import contextlib
import datetime
import fcntl
import itertools
import json
import math
import os
import pickle
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache as jax_cache
from jax.sharding import Mesh

from llmos_jax.compiler.identity import versions
from llmos_jax.config import UserError, home
from llmos_jax.files import draft_of, seal
from pallas_kernels import hopper

MAGIC = b"llmos-executable-1"  # changes with the format
SUFFIX = ".executable"
SUFFIXES = (SUFFIX, ".weights", ".parameters")  # of all that is counted and removed here
DEFAULT_LIMIT = 10 * 2**30  # bytes, all entries together
LONGEST_WAIT = 600.0  # seconds for another process that compiles the same program, or for the others of a run


@dataclass(frozen=True)
class Memory:
    """Bytes on a device, as XLA's memory analysis names them; `alias` is the part of `output` that reuses arguments.

    peak: at the worst moment, arguments included. A TPU's compiler states it (its `temp` counts more than is in HBM at
    once: programs whose temporaries are larger than the chip's memory compile and fit). Elsewhere the temporaries are
    one allocation, held beside the arguments from the first moment to the last.
    """

    argument: int
    output: int
    alias: int
    temp: int
    code: int
    host: int  # in the host's memory: arguments and temporaries that are offloaded
    peak: int

    @classmethod
    def of(cls, compiled: jax.stages.Compiled, platform: str) -> "Memory":
        found: Any = compiled.memory_analysis()
        argument, output, alias, temp = (
            getattr(found, f"{name}_size_in_bytes") for name in ("argument", "output", "alias", "temp")
        )
        peak = found.peak_memory_in_bytes if platform == "tpu" else argument + output - alias + temp
        host = found.host_argument_size_in_bytes + found.host_temp_size_in_bytes
        return cls(argument, output, alias, temp, found.generated_code_size_in_bytes, host, peak)


@dataclass(frozen=True)
class Stored:
    """What an entry knows beside the executable. compile_seconds: of the process that compiled it."""

    memory: Memory
    compile_seconds: float
    hlo_compressed: bytes

    @property
    def hlo(self) -> str:
        return zlib.decompress(self.hlo_compressed).decode()


class Entry(NamedTuple):
    """One line of `llmos cache`. Times are seconds since 1970; `header` is empty where the file is not an entry."""

    file: Path
    size: int  # bytes
    last_use: float
    header: dict[str, Any]


class _Damaged(Exception):
    """An entry that cannot be trusted; the message says why."""


def can_load(mesh: Mesh) -> bool:
    """Whether executables for `mesh` can be loaded: into devices that are here, not into described ones."""
    device = mesh.devices.flat[0]
    try:
        return device in jax.devices(device.platform)
    except RuntimeError:  # jax has no such platform here
        return False


def load_or_build(
    identity: str, name: str, mesh: Mesh, build: Callable[[], jax.stages.Compiled]
) -> tuple[jax.stages.Compiled | None, Stored | None]:
    """The executable, and what its entry says; None for the latter where it had to be built.

    For described devices, which nothing can be loaded into, an entry holds only what the compiler said of the program,
    and the executable is None where it comes from the cache.

    Of several processes on this machine that need the same program at once, one compiles and the others wait. The
    processes of one run either all load it or all compile, since GPUs divide their tuning among them.
    """
    place = folder()
    if place is None and jax.process_count() == 1:
        # What jax kept of a program for described devices it cannot read again, and says so each time.
        with contextlib.nullcontext() if can_load(mesh) else _jax_cache_aside():
            return build(), None
    file = (place or Path()) / f"{identity}{SUFFIX}"
    several = can_load(mesh) and len({device.process_index for device in mesh.devices.flat}) > 1
    found = _load(file, identity, mesh) if place else None
    if several and not _everybody(found is not None):
        found = None
    if found or place is None:
        return found or (build(), None)
    with _turn(file) as waited:
        if waited and not several and (found := _load(file, identity, mesh)):
            return found
        started = time.perf_counter()
        with _jax_cache_aside():
            compiled = build()
        _store(file, identity, name, mesh, compiled, time.perf_counter() - started)
    return compiled, None


def holds(identity: str) -> bool:
    """Whether there is an entry, good or not."""
    return size_limit() > 0 and (home() / "executables" / f"{identity}{SUFFIX}").exists()


def entries() -> list[Entry]:
    """What is in the cache, the last used first. Seals are not checked here: that takes reading all of it."""
    found = []
    for file in _all_files():
        with contextlib.suppress(OSError):
            status = file.stat()
            found.append(Entry(file, status.st_size, status.st_mtime, _header(file)))
    return sorted(found, key=lambda entry: entry.last_use, reverse=True)


def prune(limit: int | None = None, unused_for: float | None = None) -> list[Entry]:
    """Removes entries, the longest unused first, until they take at most `limit` bytes (default: the size limit);
    all that were not used for `unused_for` seconds; files that are no entries. Returns what was removed."""
    room = size_limit() if limit is None else limit
    oldest = -math.inf if unused_for is None else time.time() - unused_for
    removed, size = [], 0
    for entry in entries():
        size += entry.size
        if size > room or entry.last_use < oldest or not entry.header:
            entry.file.unlink(missing_ok=True)
            removed.append(entry)
            size -= entry.size
    _sweep()
    return removed


def size_limit() -> int:
    """$LLMOS_CACHE_BYTES, or 10 GiB; 0 turns the cache off. Raises UserError where it is no number."""
    given = os.environ.get("LLMOS_CACHE_BYTES", "")
    if given and not given.isdigit():
        raise UserError(f"LLMOS_CACHE_BYTES={given} is not a number of bytes; write 10737418240 for 10 GiB, 0 for none")
    return int(given) if given else DEFAULT_LIMIT


# One entry.


def _load(file: Path, identity: str, mesh: Mesh) -> tuple[jax.stages.Compiled | None, Stored] | None:
    """The entry in `file`, or None where there is none that can be used; a bad one is removed and said."""
    try:
        header, payload = _read(file, identity)
        serialized, in_tree, out_tree, hlo = pickle.loads(payload)
        devices, compiled = list(mesh.devices.flat), None
        if serialized is not None:
            if devices[0].platform == "gpu":
                hopper.find_runtime()
            compiled = serialize_executable.deserialize_and_load(
                serialized, in_tree, out_tree, backend=devices[0].client, execution_devices=devices
            )
        stored = Stored(Memory(**header["memory"]), header["compile_seconds"], hlo)
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever a bad file makes unpickling or the runtime raise
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        say(f"the cached executable {file.name[:16]} cannot be used ({why}); it is removed and compiled again")
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        return None
    with contextlib.suppress(OSError):
        os.utime(file)  # the last use
    return compiled, stored


def _read(file: Path, identity: str) -> tuple[dict[str, Any], memoryview]:
    """The header and the payload of an entry whose seal and identity are right."""
    line, newline, rest = (content := file.read_bytes()).partition(b"\n")
    if line.partition(b" ")[0] != MAGIC:
        raise _Damaged("it is not an executable of ours")
    if line + newline != seal(MAGIC, rest):
        raise _Damaged("its checksum does not fit")
    end = content.index(b"\n", len(line) + 1)
    header = json.loads(content[len(line) + 1 : end])
    if header["identity"] != identity:
        raise _Damaged("it belongs to another program")
    return header, memoryview(content)[end + 1 :]


def _store(file: Path, identity: str, name: str, mesh: Mesh, compiled: jax.stages.Compiled, seconds: float) -> None:
    """Writes an entry; where that cannot be done, that is said once and the run goes on."""
    try:
        serialized = serialize_executable.serialize(compiled) if can_load(mesh) else (None, None, None)
        payload = pickle.dumps((*serialized, zlib.compress((compiled.as_text() or "").encode(), 1)))
        device = mesh.devices.flat[0]
        header = {
            "identity": identity,
            "program": name,
            "target": f"{device.platform}:{mesh.size}",
            "device_kind": device.device_kind,
            "versions": versions(),
            "compile_seconds": round(seconds, 3),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "memory": asdict(Memory.of(compiled, device.platform)),
        }
        rest = json.dumps(header).encode() + b"\n" + payload
        content = seal(MAGIC, rest) + rest
        if len(content) <= size_limit():
            with draft_of(file) as draft:
                draft.write_bytes(content)
                draft.chmod(0o600)
        prune()
    except Exception as error:  # a backend that cannot serialize, a full disk
        say(f"the {name} program is not cached: {str(error).splitlines()[0] if str(error) else type(error).__name__}")


def _header(file: Path) -> dict[str, Any]:
    """What an entry says about itself; empty where it is none."""
    with file.open("rb") as opened:
        sealed, line = opened.readline(200), opened.readline(2**20)
    try:
        header = json.loads(line) if sealed.startswith(b"llmos-") else {}
    except ValueError:
        return {}
    return header if isinstance(header, dict) else {}


_aside = threading.Lock()
_compiling = 0  # threads that have jax's cache set aside
_was_on = False  # jax's cache, before the first of them


@contextlib.contextmanager
def _jax_cache_aside() -> Iterator[None]:
    """Compiles for real. What jax takes from its own cache on disk cannot be stored again on a CPU: it serializes
    without complaint, loads, and then lacks functions when it runs (jax 0.10.2).

    Whether jax's cache is on holds for the whole process: of threads that compile at once the first turns it off, and
    the last turns it on again. Meanwhile other threads compile without it, which costs time only.
    """
    global _compiling, _was_on
    with _aside:
        if not _compiling:
            _was_on = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
            _turn_jax_cache(False)
        _compiling += 1
    try:
        yield
    finally:
        with _aside:
            _compiling -= 1
            if not _compiling:
                _turn_jax_cache(_was_on)


def _turn_jax_cache(on: bool) -> None:
    if jax.config.jax_enable_compilation_cache != on:  # type: ignore[attr-defined]
        jax.config.update("jax_enable_compilation_cache", on)
        jax_cache.reset_cache()  # it remembers whether it is on


# The folder, and the other processes.


def folder() -> Path | None:
    """Where entries are, made if need be; None where there can be no cache, which is said."""
    if not size_limit():
        return None
    place = home() / "executables"
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = place.stat()
    except OSError as error:
        say(f"compiled programs are not cached: {place} cannot be used ({error.strerror})")
        return None
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        say(f"compiled programs are not cached: others may write {place}; make it yours alone with chmod 700")
        return None
    return place


def _all_files() -> list[Path]:
    with contextlib.suppress(OSError):
        return [file for file in (home() / "executables").iterdir() if file.suffix in SUFFIXES]
    return []


def _sweep(after: float = 86_400.0) -> None:
    """Removes the drafts and locks that processes left which were killed a day ago."""
    for pattern in (".*.tmp", ".*.lock"):
        for file in (home() / "executables").glob(pattern):
            with contextlib.suppress(OSError):
                if time.time() - file.stat().st_mtime > after:
                    file.unlink()


@contextlib.contextmanager
def _turn(file: Path) -> Iterator[bool]:
    """This process's turn to compile the program of `file`; yields whether another one had its turn before.

    The kernel ends the lock of a process that dies; one that does not answer is waited for `LONGEST_WAIT`, and then
    both compile. Removing the file at the end can let two processes through at once, which costs time only.
    """
    path = file.with_name(f".{file.stem}.lock")
    with contextlib.ExitStack() as stack:
        held = waited = False
        with contextlib.suppress(OSError):
            handle = stack.enter_context(path.open("w"))
            held, waited = _lock(handle)
        try:
            yield waited
        finally:
            if held:
                path.unlink(missing_ok=True)


def _lock(handle) -> tuple[bool, bool]:
    """(whether it is locked now, whether somebody else held it). Raises OSError where there are no locks."""
    until, waited = time.monotonic() + LONGEST_WAIT, False
    while time.monotonic() < until:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True, waited
        except BlockingIOError:
            waited = True
            time.sleep(0.05)
    return False, waited


_questions = itertools.count()


def _everybody(found: bool) -> bool:
    """Whether all processes of the run have `found`; they ask in the same order, since they run the same programs."""
    from jax._src import distributed  # the coordinator's store of keys has no public name

    client: Any = distributed.global_state.client
    number = next(_questions)
    try:
        client.key_value_set(f"llmos/executables/{number}/{jax.process_index()}", str(int(found)))
        answers = [
            client.blocking_key_value_get(f"llmos/executables/{number}/{process}", int(LONGEST_WAIT * 1000))
            for process in range(jax.process_count())
        ]
    except Exception as error:
        say(f"the other processes did not say whether they have a compiled program ({error}); it is compiled")
        return False
    return all(answer == "1" for answer in answers)


_said: set[str] = set()


def say(message: str) -> None:
    """Tells it on standard error, once in a process."""
    if message not in _said:
        print(f"llmos: {message}", file=sys.stderr, flush=True)
    _said.add(message)
