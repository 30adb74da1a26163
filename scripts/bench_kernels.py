"""Times every operation on the accelerator or the CPU of this machine beside what others offer there, in one run.

    python scripts/bench_kernels.py [--torch-python PYTHON]           # a GPU or TPU
    JAX_PLATFORMS=cpu python scripts/bench_kernels.py --torch-python PYTHON

On a GPU: beside cuDNN (jax.nn.dot_product_attention), XLA's own products (cuBLAS) and torch's attention. Times are of
the device, from the profiler; the roofline is measured in the same run (a copy, a bfloat16 product). On a CPU:
attention beside torch's, and quantised products at decoding shapes beside torch's int8; both sides stay loaded in
processes of their own and take turns, and the ratio is the median over turns. PYTHON has torch; it is no dependency.
"""

import argparse
import functools
import gzip
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

CPU_ATTENTION = {"batch": 1, "heads": 8, "kv_heads": 8, "queries": 512, "keys": 512, "head_dim": 64}
CPU_PRODUCT = {"inner": 2048, "columns": 8192}
ACCELERATOR: dict[str, dict[str, int]] = {  # sizes that fill a large chip, weights several times its cache
    "attention": {"heads": 64, "kv_heads": 8, "queries": 16384, "keys": 16384},
    "ragged_dot": {"rows": 16384, "inner": 4096, "columns": 14336, "groups": 8},
    "quantized_matmul": {"inner": 8192, "columns": 28672},
}
DECODE_ROWS = (1, 4, 16)
REPEATS = 20


class Line(NamedTuple):
    """A timed call. share: of the measured roofline; 0 where there is none."""

    name: str
    side: str
    seconds: float
    tflops: float
    gbps: float
    share: float
    ratio: float | None  # of the other side's time to ours


class Call(NamedTuple):
    """What is timed: the same name on several sides is compared."""

    name: str
    side: str
    run: Callable[..., Any]
    args: tuple
    flops: float
    bytes: float


# Timing


def device_seconds(run: Callable[..., Any], args: tuple, repeats: int = REPEATS) -> float:
    """Median seconds that a call keeps the device busy: the profiler's events of each call, added up."""
    import jax

    jax.block_until_ready(run(*args))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                jax.block_until_ready(run(*args))
        busy = sum(_device_events(Path(folder)))
    return busy / repeats if busy else wall_seconds(run, args, repeats)


def _device_events(folder: Path) -> Iterator[float]:
    """Seconds of each kernel and copy in a trace; events of one stream do not overlap."""
    for file in folder.rglob("*.trace.json.gz"):
        with gzip.open(file) as packed:
            events = json.load(packed)["traceEvents"]
        named = [event for event in events if event.get("ph") == "M"]
        devices = {
            event["pid"]
            for event in named
            if event["name"] == "process_name"
            and "/device:" in event["args"]["name"]
            and "CPU" not in event["args"]["name"]
        }
        streams = {
            (event["pid"], event["tid"])
            for event in named
            if event["name"] == "thread_name"
            and event["pid"] in devices
            and ("Stream" in event["args"]["name"] or event["args"]["name"] == "XLA Ops")
        }
        yield from (
            event["dur"] * 1e-6
            for event in events
            if event.get("ph") == "X" and (event["pid"], event["tid"]) in streams
        )


def wall_seconds(run: Callable[..., Any], args: tuple, repeats: int = REPEATS) -> float:
    """Median seconds of a call from outside, of calls that queue one behind another."""
    import jax

    jax.block_until_ready(run(*args))
    times = []
    for _ in range(3):
        started = time.perf_counter()
        jax.block_until_ready([run(*args) for _ in range(repeats)][-1])
        times.append((time.perf_counter() - started) / repeats)
    return statistics.median(times)


# An accelerator


def roofline() -> tuple[float, float]:
    """Products in FLOP/s and copies in bytes/s (read and written) that this chip reaches with XLA alone."""
    import jax
    import jax.numpy as jnp

    a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)  # of ones it would run an eighth faster
    flops = 2 * 8192**3 / device_seconds(jax.jit(lambda a: a @ a), (a,))
    x = jnp.ones(2**28, jnp.float32)
    return flops, 2 * x.nbytes / device_seconds(jax.jit(lambda x: x + 1), (x,))


def accelerator_calls(only: list[str], implementation: str | None) -> Iterator[Call]:
    """Ours and the peers', by operation; what this chip or environment lacks is said and left out."""
    import jax

    from pallas_kernels import cases

    for op, dtype, direction, rows in _accelerator_cases(only):
        case = cases.CASES[op]
        given = ACCELERATOR.get(op, {}) | ({"rows": rows} if rows else {})
        shape = {**case.shape, **given}
        name = f"{op}.{direction} {dtype}" + (f" {rows} rows" if rows else "")
        options = {"transposed": True} if op == "quantized_matmul" else {}
        try:
            function, specs = cases.build(op, dtype, direction, implementation, **given, **options)
            args = cases.arrays(op, specs)
            run = _in_place(function, args) if op == "paged_attention" else jax.jit(function).lower(*args).compile()
        except (ImportError, ValueError, TypeError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            print(f"  {name}: {str(error).splitlines()[0][:160]}", file=sys.stderr)
            continue
        times = case.backward if direction == "backward" else 1
        work = case.flops(shape) * times / (2 if op == "attention" else 1)  # half is masked
        moved = case.bytes(shape, dtype) * times
        yield Call(name, "ours", run, args, work, moved)
        if op == "ragged_dot" and direction == "backward":
            continue  # jax.lax's gradients take minutes
        for side, peer in _peers(op, direction, dtype, shape):
            yield Call(name, side, *peer(args), work, moved)


def _in_place(function: Callable, args: tuple) -> Callable[..., Any]:
    """Paged attention as it is served: the pages of a call are the next one's, and nothing is copied."""
    import jax

    run = jax.jit(function, donate_argnums=3).lower(*args).compile()
    pages = [jax.tree.map(lambda x: x.copy(), args[3])]

    def call(q, k, v, _, *rest):
        out, pages[0] = run(q, k, v, pages[0], *rest)
        return out

    return call


def _accelerator_cases(only: list[str]) -> Iterator[tuple[str, str, str, int]]:
    """(operation, dtype, direction, rows where they are varied)."""
    from pallas_kernels import cases

    for op, case in cases.CASES.items():
        for direction in case.directions:
            for dtype in case.dtypes:
                name = f"{op}.{direction} {dtype}"
                if dtype == "float32" or (only and not any(part in name for part in only)):
                    continue
                decodes = op == "quantized_matmul" and direction == "forward"
                yield from ((op, dtype, direction, rows) for rows in (DECODE_ROWS if decodes else (0,)))


def _peers(op: str, direction: str, dtype: str, shape: Mapping[str, int]) -> Iterator[tuple[str, Callable]]:
    import jax
    import jax.numpy as jnp

    gradient = direction == "backward"
    on_gpu = jax.devices()[0].platform == "gpu"

    def jitted(forward: Callable, argnums: tuple[int, ...], args: tuple) -> tuple[Callable, tuple]:
        loss = lambda *args: jnp.sum(forward(*args).astype(jnp.float32))  # noqa: E731
        return jax.jit(jax.grad(loss, argnums) if gradient else forward), args

    if op == "attention" and on_gpu:
        cudnn = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        yield "cuDNN", lambda args: jitted(cudnn, (0, 1, 2), args)
    if op == "ragged_dot":
        yield "jax.lax", lambda args: jitted(jax.lax.ragged_dot, (0, 1), args)
    if op == "quantized_matmul":
        w = jnp.ones((shape["inner"], shape["columns"]), jnp.bfloat16)
        yield "bfloat16 product", lambda args: jitted(jnp.matmul, (0,), (args[0], w))
    if op == "linear_cross_entropy":
        yield "logits in memory", lambda args: jitted(_plain_loss, (0, 1), args)


def _plain_loss(x, w, labels, weights):
    import jax
    import jax.numpy as jnp

    logits = jnp.dot(x, w, preferred_element_type=jnp.float32)
    chosen = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    return jnp.sum((jax.nn.logsumexp(logits, axis=1) - chosen) * weights)


def torch_on_gpu() -> None:
    """Prints {name: seconds} of torch's attention on this machine's GPU, from CUDA events."""
    import torch

    sizes = ACCELERATOR["attention"]
    torch.manual_seed(0)
    heads = sizes["heads"], sizes["kv_heads"], sizes["kv_heads"]
    q, k, v = (torch.randn(1, n, sizes["queries"], 128, dtype=torch.bfloat16, device="cuda") for n in heads)

    def attend():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def seconds(run: Callable[[], Any]) -> float:
        run()
        times = []
        for _ in range(REPEATS // 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return statistics.median(times)

    found = {"attention.forward bfloat16": seconds(attend)}
    for x in (q, k, v):
        x.requires_grad_()
    out = attend()
    ones = torch.ones_like(out)
    forward_again = found["attention.forward bfloat16"]  # ours counts it too
    backward = seconds(lambda: torch.autograd.grad(out, (q, k, v), ones, retain_graph=True))
    print(json.dumps(found | {"attention.backward bfloat16": forward_again + backward}))


def bench_accelerator(only: list[str], implementation: str | None, torch_python: str) -> list[Line]:
    flops, bandwidth = roofline()
    print(f"measured: {flops / 1e12:.0f} TFLOP/s in bfloat16 products, {bandwidth / 1e9:.0f} GB/s in a copy")
    lines: list[Line] = []
    ours: dict[str, tuple[Call, float]] = {}

    def add(call: Call, side: str, seconds: float) -> None:
        bound = max(call.flops / flops, call.bytes / bandwidth)
        ratio = None if side == "ours" or call.name not in ours else seconds / ours[call.name][1]
        figures = call.flops / seconds / 1e12, call.bytes / seconds / 1e9, bound / seconds, ratio
        lines.append(Line(call.name, side, seconds, *figures))
        show(lines[-1])

    for call in accelerator_calls(only, implementation):
        try:
            seconds = device_seconds(call.run, call.args)
        except Exception as error:  # a peer's kernel may fail in any way; the rest is still wanted
            print(f"  {call.name} {call.side}: {str(error).splitlines()[0][:160]}", file=sys.stderr)
            continue
        if call.side == "ours":
            ours[call.name] = call._replace(run=lambda: None, args=()), seconds  # its arrays are let go
        add(call, call.side, seconds)
    if torch_python and any(name.startswith("attention") for name in ours):
        command = [torch_python, __file__, "--worker", "torch-gpu"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"  torch: {done.stderr.strip().splitlines()[-1][:160]}", file=sys.stderr)
            return lines
        for name, seconds in json.loads(done.stdout).items():
            if name in ours:
                add(ours[name][0], "torch", seconds)
    return lines


# A CPU: two processes take turns


def cpu_names() -> list[str]:
    products = [f"product.{form} {rows} rows" for form in ("int8", "bfloat16") for rows in DECODE_ROWS]
    return ["attention.forward float32", "attention.backward float32", *products]


def cpu_ours(name: str) -> tuple[Callable[[], Any], float, float]:
    """(a call, its flops, its bytes of weights)."""
    import jax

    from pallas_kernels import cases

    what, form = name.split(" ", 1)
    if what.startswith("attention"):
        function, specs = cases.build("attention", "float32", what.partition(".")[2], **CPU_ATTENTION)
        flops = cases.CASES["attention"].flops(CPU_ATTENTION) / 2 * (3.5 if "backward" in what else 1)
        moved = 0.0
    else:
        rows = int(form.split()[0])
        kind = {"product.int8": "w8a8", "product.bfloat16": "w8a16"}[what]
        # Weights [N, K], as torch has them and as our server keeps them.
        function, specs = cases.build("quantized_matmul", kind, rows=rows, transposed=True, **CPU_PRODUCT)
        flops, moved = 2.0 * rows * CPU_PRODUCT["inner"] * CPU_PRODUCT["columns"], float(_weights())
    args = cases.arrays("attention" if what.startswith("attention") else "quantized_matmul", specs)
    run = jax.jit(function)
    return lambda: jax.block_until_ready(run(*args)), flops, moved


def _weights() -> int:
    return CPU_PRODUCT["inner"] * CPU_PRODUCT["columns"]


def cpu_torch(name: str) -> tuple[Callable[[], Any], float, float]:
    """The same by torch: its fused attention, its int8 linear layer (dynamic), its int8 weights for bfloat16."""
    import torch

    what, form = name.split(" ", 1)
    if what.startswith("attention"):
        s = CPU_ATTENTION
        shape = (s["batch"], s["heads"], s["queries"], s["head_dim"])
        q, k, v = (torch.randn(shape, requires_grad="backward" in what) for _ in range(3))

        def attend():
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return torch.autograd.grad(out.sum(), (q, k, v)) if "backward" in what else out

        return attend, 0.0, 0.0
    rows = int(form.split()[0])
    if what == "product.int8":
        layer = torch.nn.Linear(CPU_PRODUCT["inner"], CPU_PRODUCT["columns"], bias=False)
        quantised = torch.ao.quantization.quantize_dynamic(layer, {torch.nn.Linear}, torch.qint8)
        x = torch.randn(rows, CPU_PRODUCT["inner"])
        return lambda: quantised(x), 0.0, 0.0
    w = torch.randint(-127, 127, (CPU_PRODUCT["columns"], CPU_PRODUCT["inner"]), dtype=torch.int8)
    scales = torch.rand(CPU_PRODUCT["columns"], dtype=torch.bfloat16)
    x = torch.randn(rows, CPU_PRODUCT["inner"], dtype=torch.bfloat16)
    return lambda: torch.ops.aten._weight_int8pack_mm(x, w, scales), 0.0, 0.0


def work(side: str) -> None:
    """Answers each line {"name", "calls"} with the seconds of a call."""
    warnings.simplefilter("ignore")  # torch announces the moves of its quantisation at length
    make = functools.cache(cpu_ours if side == "ours" else cpu_torch)
    for request in sys.stdin:
        asked = json.loads(request)
        try:
            run, flops, moved = make(asked["name"])
            run()
            started = time.perf_counter()
            for _ in range(asked["calls"]):
                run()
            seconds = (time.perf_counter() - started) / asked["calls"]
            answer = {"seconds": seconds, "flops": flops, "bytes": moved}
        except Exception as error:  # one case that a side lacks must not end the run
            answer = {"error": str(error).splitlines()[0][:160] if str(error) else type(error).__name__}
        print(json.dumps(answer), flush=True)


class Worker:
    def __init__(self, side: str, python: str):
        command = [python, __file__, "--worker", side]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, name: str, calls: int) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"name": name, "calls": calls}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"stopped with status {self.process.wait()}"}


def bench_cpu(only: list[str], torch_python: str, turns: int) -> list[Line]:
    workers = {"ours": Worker("ours", sys.executable)}
    if torch_python:
        workers["torch"] = Worker("torch", torch_python)
    lines: list[Line] = []
    for name in cpu_names():
        if only and not any(part in name for part in only):
            continue
        answers: dict[str, list[dict[str, Any]]] = {side: [] for side in workers}
        calls = {side: _calls(worker.run(name, 1)) for side, worker in workers.items()}
        for _ in range(turns):
            for side, worker in workers.items():
                answers[side].append(worker.run(name, calls[side]))
        lines += _cpu_lines(name, answers)
    return lines


def _calls(answer: dict[str, Any]) -> int:
    """As many calls as take a quarter of a second."""
    return max(1, int(0.25 / max(answer.get("seconds", 1.0), 1e-4)))


def _cpu_lines(name: str, answers: dict[str, list[dict[str, Any]]]) -> list[Line]:
    lines = []
    good = {side: given for side, given in answers.items() if all("seconds" in one for one in given)}
    for side, given in answers.items():
        if side not in good:
            print(f"  {name} {side}: {next(one['error'] for one in given if 'error' in one)}", file=sys.stderr)
            continue
        seconds = statistics.median(one["seconds"] for one in given)
        first = good.get("ours", given)[0]
        ratio = None
        if side != "ours" and "ours" in good:
            ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in zip(good["ours"], given, strict=True))
        lines.append(
            Line(name, side, seconds, first["flops"] / seconds / 1e12, first["bytes"] / seconds / 1e9, 0, ratio)
        )
        show(lines[-1])
    return lines


def show(line: Line) -> None:
    text = (
        f"{line.name:42} {line.side:18} {line.seconds * 1e3:10.3f} ms {line.tflops:9.3f} TFLOP/s {line.gbps:8.1f} GB/s"
    )
    if line.share:
        text += f"  {line.share:6.1%} of the roofline"
    if line.ratio is not None:
        text += f"  ours is {line.ratio:.2f}x as fast"
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="parts of names, with commas")
    parser.add_argument("--torch-python", default="", help="interpreter with torch, for its side")
    parser.add_argument("--implementation", default=None, help="ours by this name on an accelerator, not the best")
    parser.add_argument("--turns", type=int, default=7, help="of each side, on the CPU")
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--worker", choices=("ours", "torch", "torch-gpu"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker == "torch-gpu":
        return torch_on_gpu()
    if args.worker:
        return work(args.worker)
    import jax

    only = [part for part in args.only.split(",") if part]
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}")
    if device.platform == "cpu":
        lines = bench_cpu(only, args.torch_python, args.turns)
    else:
        lines = bench_accelerator(only, args.implementation, args.torch_python)
    if args.json:
        rows = [line._asdict() for line in lines]
        args.json.write_text(
            json.dumps({"device": device.device_kind, "jax": jax.__version__, "lines": rows}, indent=1)
        )
    return None


if __name__ == "__main__":
    main()
