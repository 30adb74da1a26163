"""Compiles every operation for every chip that the library has kernels for, on a machine that has none of them.

    python scripts/compile_matrix.py --make-environments .venv-compile --quick
    python scripts/compile_matrix.py --tpu-python PYTHON --cuda-python PYTHON --only attention --write docs/kernels.md

A line for each operation, dtype, direction and chip: the implementation that runs there; XLA's temporary memory; the
kernels' own VMEM, spilled vector registers and static bundles on a TPU, registers and spilled bytes on a GPU; or why it
is refused. The status is 1 if anything fails that is not refused by name.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pallas_kernels import cases
from pallas_kernels.schedule import CompileError, Outcome, compile_apart
from pallas_kernels.targets import GPUS, TPUS

ROOT = Path(__file__).resolve().parents[1]
MARKERS = ("<!-- compile matrix: begin -->", "<!-- compile matrix: end -->")
QUICK_TARGETS = ("v6e", "tpu7x", "h200")
SMALL = {  # sizes that compile fast and still have every loop of the kernel
    "attention": {"queries": 2048, "keys": 2048},
    "ragged_dot": {"rows": 2048, "groups": 8},
    "linear_cross_entropy": {"tokens": 1024},
    "paged_attention": {"sequences": 16, "tokens": 16, "context": 1024},
}


class Cell(NamedTuple):
    """One combination and what became of it."""

    op: str
    dtype: str
    direction: str
    target: str
    status: str  # "compiled", "refused", "failed" or "missing"
    detail: str  # why, where it is not compiled
    temp: int = 0  # bytes
    vmem: int = 0  # bytes of the kernel that takes most, on a TPU
    spills: int = 0  # vector registers on a TPU, bytes on a GPU
    size: int = 0  # static bundles of all kernels on a TPU, most registers of a thread on a GPU
    seconds: float = 0.0


def combinations(only: list[str], targets: list[str], quick: bool) -> Iterator[tuple[str, str, str, str]]:
    for op, case in cases.CASES.items():
        for dtype in case.dtypes[:1] if quick else case.dtypes:
            for direction in case.directions:
                name = f"{op}.{direction}.{dtype}"
                if only and not any(part in name for part in only):
                    continue
                yield from ((op, dtype, direction, target) for target in targets)


def compile_cell(op: str, dtype: str, direction: str, target: str, python: str, timeout: float) -> Cell:
    home = "tpu" if target in TPUS else "gpu"
    options: dict[str, Any] = {"op": op, "dtype": dtype, "direction": direction, **SMALL.get(op, {})}
    options["implementation"] = home  # by name: what it does not take, it has to refuse
    if op == "quantized_matmul" and home == "gpu":
        options["transposed"] = True
    if op == "quantized_matmul" and direction == "backward":
        options["rows"] = 256
    started = time.perf_counter()
    builder, env = "pallas_kernels.cases:build", {"MOSAIC_GPU_DUMP_PTXAS": "1"}
    try:
        outcome = compile_apart(target, builder, options, python=python, timeout=timeout, dump=home == "tpu", env=env)
    except CompileError as error:
        status, detail = reason(str(error), op, home)
        return Cell(op, dtype, direction, target, status, detail, seconds=time.perf_counter() - started)
    figures = _tpu_figures(outcome) if home == "tpu" else _gpu_figures(outcome)
    seconds = time.perf_counter() - started
    return Cell(op, dtype, direction, target, "compiled", "", outcome.memory["temp"], *figures, seconds)


def reason(message: str, op: str, name: str) -> tuple[str, str]:
    """("refused", why) for a call that the implementation names as not taken; ("failed", message) for the rest."""
    if refused := re.search(rf"{op} cannot run here as asked \({name}: (.*)\)", message):
        return "refused", refused[1]
    if "is not known; use one of" in message:
        return "missing", f"there is no implementation {name!r}"
    return "failed", " ".join(message.split())[:300]


def _tpu_figures(outcome: Outcome) -> tuple[int, int, int]:
    kernels = outcome.kernels
    vmem = max((kernel.vmem for kernel in kernels), default=0)
    return vmem, sum(kernel.spills for kernel in kernels), sum(kernel.bundles for kernel in kernels)


def _gpu_figures(outcome: Outcome) -> tuple[int, int, int]:
    """From what ptxas reports of each kernel."""
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", outcome.log)]
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill stores", outcome.log)]
    return 0, sum(spills), max(registers, default=0)


def text(cell: Cell) -> str:
    """What a line of the table says of a cell."""
    if cell.status != "compiled":
        return f"{cell.status}: {cell.detail}"
    parts = [f"temp {_mib(cell.temp)}"]
    if cell.target in TPUS:
        parts += [f"VMEM {_mib(cell.vmem)}", f"{cell.size:,} bundles", f"{cell.spills:,} spills"]
    elif cell.size:
        parts += [f"{cell.size} registers", f"{cell.spills:,} B spilled"]
    return ", ".join(parts)


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def table(cells: list[Cell]) -> str:
    lines = ["| operation | direction | dtype | chip | compiled by XLA and Mosaic |", "| --- | --- | --- | --- | --- |"]
    lines += [f"| {c.op} | {c.direction} | {c.dtype} | {c.target} | {text(c).replace('|', '/')} |" for c in cells]
    return "\n".join(lines)


def write(file: Path, content: str, markers: tuple[str, str] = MARKERS) -> None:
    """Replaces what stands between two markers. Raises ValueError where the file lacks them."""
    before, begin, rest = file.read_text().partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not begin or not end:
        raise ValueError(f"{file} has no lines {markers[0]!r} and {markers[1]!r}")
    file.write_text(f"{before}{begin}\n\n{content}\n\n{end}{after}")


def make_environments(folder: Path) -> tuple[str, str]:
    """Interpreters with the TPU's and with the GPU's compiler, of the jax in constraints.txt; made once."""
    version = re.search(r"^jax==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    if version is None:
        raise ValueError("constraints.txt names no version of jax")
    jax = f"=={version[1]}"
    wheels = [f"jax-cuda13-plugin{jax}", f"jax-cuda13-pjrt{jax}", "nvidia-cuda-nvcc"]  # no CUDA stack is needed
    tpu = _environment(folder / "tpu", [[f"jax[tpu]{jax}", "jaxtyping"]])
    # absl-py: jax's Mosaic GPU imports it, and jax does not depend on it
    cuda = _environment(folder / "cuda", [[f"jax{jax}", "jaxtyping", "absl-py"], ["--no-deps", *wheels]])
    return tpu, cuda


def _environment(folder: Path, installs: list[list[str]]) -> str:
    python, stamp = folder / "bin" / "python", folder / ".installed"
    if stamp.exists() and stamp.read_text() == repr(installs):
        return str(python)
    print(f"installing into {folder}", file=sys.stderr, flush=True)
    venv.create(folder, with_pip=True, clear=True)
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # what is there is not in it
    for packages in installs:
        quiet = ["--quiet", "--disable-pip-version-check"]
        command = [python, "-m", "pip", "install", *quiet, "-c", ROOT / "constraints.txt", *packages]
        subprocess.run(command, check=True, env=alone)
    stamp.write_text(repr(installs))
    return str(python)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="parts of OPERATION.DIRECTION.DTYPE, with commas")
    parser.add_argument("--target", default="", help=f"chips, with commas: {','.join([*TPUS, *GPUS])}")
    parser.add_argument("--quick", action="store_true", help="one dtype of each, on three chips")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one compile")
    parser.add_argument("--make-environments", metavar="DIR", type=Path, help="make both environments there")
    parser.add_argument("--tpu-python", default=sys.executable, help="interpreter with jax[tpu]")
    parser.add_argument("--cuda-python", default=sys.executable, help="interpreter with jax's CUDA wheels")
    parser.add_argument("--write", metavar="FILE", type=Path, help="put the table between the markers of this file")
    parser.add_argument("--json", metavar="FILE", type=Path)
    args = parser.parse_args()
    tpu, cuda = args.tpu_python, args.cuda_python
    if args.make_environments:
        tpu, cuda = make_environments(args.make_environments)
    targets = args.target.split(",") if args.target else [*QUICK_TARGETS] if args.quick else [*TPUS, *GPUS]
    if unknown := [target for target in targets if target not in TPUS and target not in GPUS]:
        parser.error(f"--target {','.join(unknown)} is not known; use {','.join([*TPUS, *GPUS])}")
    cells: list[Cell] = []
    for op, dtype, direction, target in combinations([p for p in args.only.split(",") if p], targets, args.quick):
        if why := cases.missing(op):
            cell = Cell(op, dtype, direction, target, "missing", why)
        else:
            cell = compile_cell(op, dtype, direction, target, tpu if target in TPUS else cuda, args.timeout)
        print(f"{cell.seconds:5.1f} s  {op}.{direction} {dtype} {target}: {text(cell)}", flush=True)
        cells.append(cell)
    if args.write:
        write(args.write, table(cells))
    if args.json:
        args.json.write_text(json.dumps([cell._asdict() for cell in cells], indent=1))
    count = {
        status: sum(cell.status == status for cell in cells) for status in ("compiled", "refused", "missing", "failed")
    }
    print(", ".join(f"{number} {status}" for status, number in count.items()))
    return int(count["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
