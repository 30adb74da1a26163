"""The server that `check_reliability.py` breaks: a small random model, and `llmos serve` in a process of its own."""

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from llmos_jax.serve.http.accounts import create_key
from scripts.reliability_load import MODEL, ask

ROOT = Path(__file__).resolve().parents[1]
POISON = (5, 3, 5, 3)
TENANTS = ("alice", "bob")


def make_model(folder: Path) -> None:
    """A Hugging Face folder with a random model: 2 layers of 64, 512 tokens, a context of 2048."""
    import jax
    import numpy as np

    from llmos_jax.config import ModelConfig
    from llmos_jax.data.tokenizer import train_bpe
    from llmos_jax.models.decoder import init_params
    from llmos_jax.models.weights.huggingface import export

    sizes = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "mlp_dim": 128, "max_seq_len": 2048}
    model = ModelConfig(vocab_size=512, num_layers=2, embed_dim=64, **sizes)
    tokenizer = train_bpe([Path(__file__).read_text()], 512, special_tokens=("<|end|>",))
    role, content = "{{ message['role'] }}", "{{ message['content'] }}"
    tokenizer.chat_template = "{% for message in messages %}" + f"{role}: {content}\n" + "{% endfor %}"
    tokenizer.save(folder / "tokenizer")
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(0))
    # Weights as large as a trained model's, so that answers depend on the whole prompt.
    params = {path: value * 5 if value.ndim > 1 else value for path, value in params.items()}
    # Bytes that are no characters would all look alike in an answer: they are never the likeliest.
    texts = [tokenizer.decode([token]) for token in range(512)]
    plain = np.array([text.isascii() and text.isprintable() for text in texts])
    params["head.kernel"] = params["head.kernel"] * plain
    export(folder / "model", model, params, tokenizer_folder=folder / "tokenizer")


class Server:
    """`llmos serve` in a process of its own; what it prints is in `log`."""

    def __init__(self, folder: Path, reference: str, options: list[str]):
        self.folder, self.log, self.db = folder, folder / "server.log", folder / "serve.sqlite"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.keys = {name: self._key(name, "infer") for name in TENANTS}
        self.admin = self._key("root", "admin")
        self._command = ["serve", reference, "--name", MODEL, "--port", str(self.port), "--db", str(self.db)]
        self._command += ["--require-keys", *options]
        self._command += ["--poison", *map(str, POISON)]

    def llmos(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "llmos_jax.cli", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    def _key(self, name: str, scope: str) -> str:
        return create_key(name, path=self.db, scopes=[scope])["key"]

    async def start(self) -> float:
        """Seconds until it was ready. Raises RuntimeError where it ends instead."""
        started = time.monotonic()
        with self.log.open("wb") as out:
            command = [sys.executable, "-m", "llmos_jax.cli", *self._command]
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        while not await self.is_ready():
            if self.process.poll() is not None or time.monotonic() - started > 600:
                raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-4000:]}")
            await asyncio.sleep(0.1)
        return time.monotonic() - started

    async def is_ready(self) -> bool:
        with contextlib.suppress(OSError):
            return (await ask(self.port, "/ready", method="GET")).status == 200
        return False

    async def stats(self) -> dict[str, Any]:
        return (await ask(self.port, "/admin/stats", key=self.admin, method="GET")).json()["models"].get(MODEL, {})

    @property
    def worker_pid(self) -> int:
        """Of the engine's process; 0 where there is none at the moment."""
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{self.process.pid}/task").iterdir():
                for child in (task / "children").read_text().split():
                    if b"llmos_jax.serve.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                        return int(child)
        return 0


def resident(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if pid else 0
    return 0
