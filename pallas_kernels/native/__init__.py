"""Kernels for the host's own processor, in C++: what XLA's CPU compiler has no form for.

They are calls that XLA makes (its foreign function interface), on XLA's threads. The machine's C++ compiler builds them
once, for its own processor, into a cache; where there is none, or none of these processors' instructions, operations
take plain XLA. PALLAS_KERNELS_NATIVE=0 does without them, PALLAS_KERNELS_CACHE says where they are kept
(`~/.cache/pallas_kernels`).
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-pthread", "-w")
TARGETS = {
    "pallas_kernels.matmul": "NativeMatmul",
    "pallas_kernels.vector_matmul": "NativeVectorMatmul",
    "pallas_kernels.few_rows_matmul": "NativeFewRowsMatmul",
    "pallas_kernels.quantized_matmul": "NativeQuantizedMatmul",
    "pallas_kernels.vector_quantized_matmul": "NativeVectorQuantizedMatmul",
    "pallas_kernels.attention": "NativeAttention",
    "pallas_kernels.attention_backward": "NativeAttentionBackward",
    "pallas_kernels.paged_attention": "NativePagedAttention",
}

log = logging.getLogger(__name__)
_lock = threading.Lock()


class Native(NamedTuple):
    """missing: why there is nothing to call, one clause; empty if there is.

    tiles: whether it multiplies by AMX. digest: of its source, its compiler and the processor.
    """

    missing: str
    tiles: bool = False
    digest: str = ""


def native() -> Native:
    """What there is on this machine, built and made known to jax at the first call."""
    with _lock:  # programs are built in several threads
        return _native()


@functools.cache
def _native() -> Native:
    if os.environ.get("PALLAS_KERNELS_NATIVE", "1") == "0":
        return Native("is switched off by PALLAS_KERNELS_NATIVE=0")
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return Native("is written for x86-64 processors with Linux")
    compiler = next((found for name in ("g++", "c++") if (found := shutil.which(name))), None)
    if compiler is None:
        return Native("needs a C++ compiler (g++), and there is none")
    try:
        digest = _digest(compiler)
        library = ctypes.CDLL(str(_built(compiler, digest)))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("the kernels for this processor cannot be built, XLA's take their place: %s", _why(error))
        return Native("could not be built by the C++ compiler (the log says why)")
    for target, symbol in TARGETS.items():
        if hasattr(library, symbol):
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    return Native("", bool(library.native_has_tiles()), digest)


def _built(compiler: str, digest: str) -> Path:
    """The library, from the cache if this source was built by this compiler for this processor before."""
    folder = Path(os.environ.get("PALLAS_KERNELS_CACHE") or Path.home() / ".cache" / "pallas_kernels")
    file = folder / f"native-{digest}.so"
    if not file.exists():
        log.info("building the kernels for this processor (once, up to a minute)")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # renamed when whole: others may be building it too
            _build(compiler, made := Path(scratch) / file.name)
            made.replace(file)
    return file


def _build(compiler: str, made: Path) -> None:
    """Every source by itself, on all cores, and then the library of them."""

    def run(*arguments: str) -> None:
        subprocess.run([compiler, *FLAGS, *arguments], check=True, capture_output=True, text=True, timeout=300)

    def translate(source: Path) -> str:
        translated = made.with_name(f"{source.stem}.o")
        run(f"-I{jax.ffi.include_dir()}", "-c", str(source), "-o", str(translated))
        return str(translated)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        run("-shared", *threads.map(translate, sorted(SOURCES.glob("*.cc"))), "-o", str(made))


def _digest(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=60).stdout
    digest = hashlib.sha256(version + " ".join(FLAGS).encode() + jax.lib.__version__.encode() + _processor())
    for file in sorted([*SOURCES.glob("*.cc"), *SOURCES.glob("*.h")]):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> bytes:
    """Its model and instruction sets."""
    lines = Path("/proc/cpuinfo").read_bytes().split(b"\n\n")[0].splitlines()
    return b"\n".join(line for line in lines if line.startswith((b"model", b"flags")))


def _why(error: Exception) -> str:
    text = getattr(error, "stderr", None) or str(error)
    text = text.decode(errors="replace") if isinstance(text, bytes) else text  # bytes where it took too long
    return next((line for line in text.splitlines() if "error" in line), text.strip()[-300:])
