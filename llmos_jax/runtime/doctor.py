"""`llmos doctor`: what this machine has, whether it works, and what is missing."""

import importlib.metadata
import os
import platform
import shutil
from typing import Any

from llmos_jax.compiler.chips import host_memory, peak_flops
from llmos_jax.config import home

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain", "tokenizers", "safetensors"),
    *("gguf", "huggingface_hub"),
)
OPTIONAL = {"wandb": "Weights & Biases", "datasets": "hf: data sources"}


def examine() -> dict[str, Any]:
    """Findings as a JSON-able dict. `ok` is False where something that every command needs does not work."""
    findings: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "optional": {name: _version(name) for name in OPTIONAL},
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "host_memory_bytes": int(host_memory()),
        "home": str(home()),
        "problems": [],
    }
    findings["problems"] += [f"{name} is not installed" for name, v in findings["packages"].items() if v is None]
    _examine_home(findings)
    if findings["packages"]["jax"] is not None:
        _examine_devices(findings)
    findings["ok"] = not findings["problems"]
    return findings


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _examine_home(findings: dict[str, Any]) -> None:
    folder = home()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".doctor"
        probe.write_text("")
        probe.unlink()
        findings["disk_free_bytes"] = shutil.disk_usage(folder).free
    except OSError as error:
        findings["problems"].append(f"{folder} cannot be written ({error.strerror}); set LLMOS_HOME to another folder")


def _examine_devices(findings: dict[str, Any]) -> None:
    import jax

    from pallas_kernels.native import native

    try:
        devices = jax.devices()
    except RuntimeError as error:
        findings["problems"].append(f"jax finds no device: {str(error).splitlines()[0]}")
        return
    kind, backend = devices[0].device_kind, jax.default_backend()
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    findings["devices"] = {"platform": backend, "kind": kind, "count": len(devices), "memory_bytes": memory}
    dtypes = ("float32", "bfloat16") if backend == "cpu" else ("bfloat16",)
    if backend == "cpu":
        found = native()
        findings["cpu_kernels"] = (
            "none: " + found.missing if found.missing else "AMX tiles" if found.tiles else "vectors"
        )
    findings["peak_flops"] = {dtype: peak_flops(kind, backend, dtype) for dtype in dtypes}


def print_findings(findings: dict[str, Any]) -> None:
    packages = findings["packages"]
    print(f"python {findings['python']}, " + ", ".join(f"{name} {packages[name]}" for name in ("jax", "flax", "optax")))
    devices = findings.get("devices")
    if devices:
        memory = f", {devices['memory_bytes'] / 2**30:.0f} GiB each" if devices["memory_bytes"] else ""
        print(f"{devices['count']} x {devices['kind']} ({devices['platform']}){memory}")
        how = "measured" if devices["platform"] == "cpu" else "peak"
        rates = ", ".join(
            f"{dtype} {flops / 1e12:.2f} TFLOP/s" for dtype, flops in findings["peak_flops"].items() if flops
        )
        if rates:
            print(f"matrix products ({how}): {rates}")
    if "cpu_kernels" in findings:
        print(f"kernels in C++ for this processor: {findings['cpu_kernels']}")
    print(f"host: {findings['cpu_cores']} cores, {findings['host_memory_bytes'] / 2**30:.0f} GiB")
    if "disk_free_bytes" in findings:
        print(f"store: {findings['home']}, {findings['disk_free_bytes'] / 2**30:.0f} GiB free")
    absent = [f"{name} ({OPTIONAL[name]})" for name, version in findings["optional"].items() if version is None]
    if absent:
        print(f"not installed, needed only for what is in brackets: {', '.join(absent)}")
    for problem in findings["problems"]:
        print(f"problem: {problem}")
    if not findings["problems"]:
        print("all well")
