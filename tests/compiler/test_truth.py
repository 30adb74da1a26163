"""The peak that a plan states is what the run takes: resident memory of a process around its first training step.

A CPU has no counter of device memory, but its devices' memory is the process's. So a fresh process compiles the step,
makes no array before it has read how much is resident, and then asks the kernel for the high-water mark of the step
(VmHWM, which writing 5 to clear_refs starts anew).

Measured, it takes 2 to 4 % more than stated. That is scratch of the matrix products, which XLA's plan does not hold: they
copy both operands into blocks, for a vocabulary of n some 2.7 kB * n on each device that is at it (16,000 would make it
11 % of these eight devices' memory), and more with more threads (32 of them: 80 MB on one device). No other part is
hidden: collectives take nothing beside the plan, and all of its temporaries are touched.
"""

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of a process")


@linux
@pytest.mark.parametrize("num_devices", [1, 8])
def test_a_step_takes_the_bytes_that_its_plan_states(num_devices: int):
    """Of all simulated devices together; on 8 of them parameters and batch are split (fsdp)."""
    environment = os.environ | {
        # Not the flags of the tests, whose programs are compiled without optimisation.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
        "JAX_PLATFORMS": "cpu",
        "PJRT_NPROC": str(max(2, num_devices)),  # threads; each has scratch of its own
        "LLMOS_CACHE_BYTES": "0",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-m", "tests.compiler.test_truth"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["devices"] == num_devices
    stated = found["peak"] * num_devices
    assert 1e9 < stated < 3e9
    # The state and the batch alone, before the step: so the base is right, and nothing else is alive.
    assert found["held"] == pytest.approx(found["argument"] * num_devices, rel=0.05)
    assert found["taken"] == pytest.approx(stated, rel=0.05)
    assert found["argument"] + found["temp"] == pytest.approx(found["peak"], rel=1e-3)


@pytest.mark.gpu
def test_on_a_gpu_a_step_takes_what_its_plan_states():
    """By the allocator's own count, in a process that runs nothing else.

    Its memory is taken in one piece: grown piece by piece, what it hands out may be up to 128 MiB more than was asked for.
    """
    environment = os.environ | {
        "LLMOS_CACHE_BYTES": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "tests.compiler.test_truth"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["peak"] > 5e8 and found["taken"] == pytest.approx(found["peak"], rel=0.05), found


def resident(line: str = "VmRSS") -> int:
    """Bytes. "VmHWM": the most since `forget`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{line}:")[1].split()[0]) * 1024


def settled() -> int:
    """Bytes resident after the allocator has given back what it keeps of what was freed, which a call does late."""
    time.sleep(0.5)
    ctypes.CDLL(None).malloc_trim(0)
    return resident()


def forget() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure() -> dict[str, int]:
    """In this process: what the compiler states of one device, and what all of them take."""
    import jax

    from llmos_jax.config import MeshConfig
    from llmos_jax.sharding import make_mesh, put_batch
    from llmos_jax.train.step import init_program, train_program

    size = {"num_layers": 6, "embed_dim": 512, "num_heads": 8, "num_kv_heads": 8, "head_dim": 64, "mlp_dim": 1_536}
    model = tiny.model(**size, vocab_size=4_000, max_seq_len=256)
    config = tiny.run(model, batch_size=8, seq_len=256)
    mesh = make_mesh(MeshConfig())
    init, step = init_program(config, mesh).compile(), train_program(config, mesh).compile()
    stated = {"peak": step.peak_bytes, "argument": step.memory.argument, "temp": step.memory.temp}
    device = jax.devices()[0]
    if device.platform == "gpu":  # the peak is the step's: there is less of everything before it
        base = device.memory_stats()["bytes_in_use"]
        jax.block_until_ready(step(init(), put_batch(tiny.batch(config), mesh, config.train.batch_size)))
        return {"devices": 1, "taken": device.memory_stats()["peak_bytes_in_use"] - base} | stated
    base = settled()
    state, batch = init(), put_batch(tiny.batch(config), mesh, config.train.batch_size)
    jax.block_until_ready((state, batch))
    held = settled() - base
    forget()
    jax.block_until_ready(step(state, batch))
    taken = resident("VmHWM") - base
    return {"devices": jax.device_count(), "held": held, "taken": taken} | stated


if __name__ == "__main__":
    print(json.dumps(measure()))
