"""Times our training step beside transformers + torch: same shape, batch, precision, tokens and optimizer, one run.

    python scripts/bench_train.py --shape llama-60m --dtype float32 --torch-python PYTHON

Both sides stay loaded in a process of their own and take turns, a block of steps each, so that a drifting machine
slows both alike; the ratio is taken block by block and its median is printed. PYTHON is an interpreter with torch and
transformers (they are not dependencies of this project); without it only our side is timed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

SHAPES = {
    # embed_dim, num_layers, num_heads, num_kv_heads, head_dim, mlp_dim, vocab_size, tied
    "tiny": (64, 2, 4, 2, 16, 128, 512, False),
    "llama-60m": (512, 8, 8, 8, 64, 1536, 32000, False),
    "smollm2-135m": (576, 30, 9, 3, 64, 1536, 49152, True),
    "llama-1b": (2048, 16, 32, 8, 64, 8192, 128256, True),
}


def model_config(args):
    from llmos_jax.config import ModelConfig

    d, layers, heads, kv_heads, head_dim, mlp, vocab, tied = SHAPES[args.shape]
    return ModelConfig(
        num_layers=layers,
        embed_dim=d,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_dim=mlp,
        vocab_size=vocab,
        tie_embeddings=tied,
        dtype=args.dtype,
        remat=args.remat,
        scan_layers=not args.unroll,
    )


def ours(args):
    """Generator: yields once ready, then a loss after each step."""
    import jax
    import numpy as np

    from llmos_jax.compiler.chips import peak_flops
    from llmos_jax.compiler.roofline import train_flops
    from llmos_jax.config import OptimizerConfig, RunConfig, TrainConfig
    from llmos_jax.sharding import make_mesh, put_batch
    from llmos_jax.train.step import init_program, train_program

    train = TrainConfig(steps=10**6, batch_size=args.batch, seq_len=args.seq_len)
    config = RunConfig(model=model_config(args), train=train, optimizer=OptimizerConfig(learning_rate=1e-4))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    state = init_program(config, mesh).compile()()
    step = train_program(config, mesh).compile()
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (args.batch, args.seq_len + 1), np.int32)
    shape = (args.batch, args.seq_len)
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.tile(np.arange(args.seq_len, dtype=np.int32), (args.batch, 1)),
        "loss_mask": np.ones(shape, np.float32),
    }
    device = jax.devices()[0]
    yield {
        "versions": f"jax {jax.__version__}",
        "device": device.device_kind,
        "flops": train_flops(config.model, args.seq_len) * args.batch,
        "peak": peak_flops(device.device_kind, device.platform, args.dtype),
        "bytes": step.peak_bytes,
    }
    while True:
        state, metrics = step(state, put_batch(batch, mesh, args.batch))
        yield float(metrics["loss"])


def taken() -> int:
    """The most bytes of the device's memory that were in use; 0 where nothing counts them."""
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def theirs(args):
    """The same work as a user of transformers would write it."""
    import torch
    import transformers

    d, layers, heads, kv_heads, head_dim, mlp, vocab, tied = SHAPES[args.shape]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=d,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=mlp,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config).to(device).train()
    if args.remat == "full":
        model.gradient_checkpointing_enable()
    if args.torch_compile:
        model = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(vocab, (args.batch, args.seq_len + 1), device=device)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].contiguous()
    yield {"versions": f"torch {torch.__version__}, transformers {transformers.__version__}", "device": device}
    while True:
        # float32 parameters and bfloat16 products, as ours
        with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            logits = model(inputs).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item()


def work(args) -> None:
    steps = (ours if args.worker == "ours" else theirs)(args)
    started = time.perf_counter()
    info = next(steps)
    loss = next(steps)
    info["first_step_seconds"] = time.perf_counter() - started
    info["taken"] = taken() if args.worker == "ours" else 0
    print(json.dumps(info), flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        for _ in range(int(line)):
            loss = next(steps)
        print(json.dumps({"seconds": time.perf_counter() - started, "loss": loss}), flush=True)


class Worker:
    def __init__(self, side: str, python: str):
        command = [python, __file__, *sys.argv[1:], "--worker", side]
        environment = dict(os.environ)
        if side == "ours":
            from llmos_jax.runtime import allocator  # the other side's interpreter has no llmos

            environment |= allocator.environment()  # as `llmos train` does
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.info = self.answer()

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a worker stopped with status {self.process.wait()}; see its message above")
        return json.loads(line)

    def run(self, steps: int) -> float:
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self.answer()["seconds"] / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="llama-60m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--remat", choices=("none", "full"), default="none")
    parser.add_argument("--unroll", action="store_true", help="unroll our layers instead of scanning them")
    parser.add_argument("--steps", type=int, default=3, help="a block")
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--torch-python", default="", help="interpreter with torch and transformers")
    parser.add_argument("--torch-compile", action="store_true", help="the torch side under torch.compile")
    parser.add_argument("--worker", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    sides = {"ours": Worker("ours", sys.executable)}
    if args.torch_python:
        sides["theirs"] = Worker("theirs", args.torch_python)
    seconds = {side: [] for side in sides}
    for _ in range(args.blocks):
        for side, worker in sides.items():
            seconds[side].append(worker.run(args.steps))
    report(args, sides, seconds)
    return None


def report(args, sides: dict[str, Worker], seconds: dict[str, list[float]]) -> None:
    tokens = args.batch * args.seq_len
    print(
        f"{args.shape}, {args.dtype}, batch {args.batch} x {args.seq_len}, {args.blocks} blocks of {args.steps} steps"
    )
    for side, worker in sides.items():
        step = statistics.median(seconds[side])
        line = f"{side:7} {tokens / step:9.0f} tokens/s   {step:7.3f} s a step   ({worker.info['versions']})"
        if worker.info.get("peak"):
            line += f"   MFU {worker.info['flops'] / step / worker.info['peak']:.1%}"
        if worker.info.get("taken"):
            line += (
                f"   memory {worker.info['bytes'] / 2**30:.2f} GiB planned, {worker.info['taken'] / 2**30:.2f} taken"
            )
        print(line)
    if "theirs" in sides:
        ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
        print(f"ratio   {statistics.median(ratios):.2f}x   (blocks {min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
