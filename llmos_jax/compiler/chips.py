"""What one chip can do: peaks, memory, links and price, by table. The CPU's row is measured, since no table knows it.

Sources, by letter in the table:
  G  Google's pages on each TPU (docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}): peaks, HBM, "bidirectional ICI
     bandwidth per chip" (a link's one-way rate is that over 2 x links), data centre network per chip or pod
  S  "How to Scale Your Model" (jax-ml.github.io/scaling-book), chapters on TPUs and GPUs: v4's links, PCIe, rings,
     NVLink and InfiniBand rates
  J  jax's own table (jax._src.pallas.mosaic.tpu_info): which dtypes have a peak of their own
  L  libtpu 0.0.42: the HBM it offers a program, from its refusal of one that takes 1 TiB ("exceeds available HBM
     (31.25G)")
  N  NVIDIA's data sheets: dense peaks at boost clock, without sparsity
  M  published measurements: MaxText's and torchtitan's MFU tables with the recomputation added back, tokamax's and
     cuDNN's attention benchmarks
  P  Google Cloud's on-demand price list, dollars a chip-hour in the cheapest US region, 2025. GPU prices differ too
     much between providers for a default
"""

import contextlib
import functools
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

GIB = 2**30


@dataclass(frozen=True)
class GpuCore:
    """What XLA's GPU compiler asks of a described GPU beyond peaks and memory."""

    capability: tuple[int, int]
    multiprocessors: int
    l2_bytes: int
    shared_bytes: int  # a multiprocessor; a block may have 1 KiB less


@dataclass(frozen=True)
class Chip:
    """One kind of chip. Rates are FLOP/s and bytes/s; "device" is a jax device, of which a chip may hold two."""

    name: str
    kind: str  # what `device.device_kind` starts with
    platform: str  # tpu | gpu | cpu
    # of a device:
    bf16: float = 0.0  # dense peak FLOP/s of a product of 16-bit inputs
    f32: float = 0.0  # of float32 inputs at jax's default precision: one bfloat16 pass on TPUs, TF32 on GPUs
    int8: float = 0.0  # 0: not native, converted first
    fp8: float = 0.0
    memory_bytes: float = 0.0
    usable_bytes: float = 0.0  # what a program may take of it
    memory_bandwidth: float = 0.0
    clock_hz: float = 0.0
    matmul_share: float = 0.7  # of the peak that large products reach
    attention_share: float = 0.5  # of the peak that flash attention reaches, forward and backward together
    # of a chip:
    devices_per_chip: int = 1
    link_bandwidth: float = 0.0  # TPU: one ICI link, one way. GPU: all of a chip's NVLinks together, one way
    dcn_bandwidth: float = 0.0  # to other slices, or to other hosts of GPUs
    host_bandwidth: float = 0.0  # to the host's memory, one way
    hop_seconds: float = 1e-6  # latency of a link (S), or of a switch
    price: float | None = None  # US dollars a chip-hour
    # how chips are joined:
    torus: tuple[int, ...] = ()  # the largest slice, a number a dimension; () for chips behind a switch
    wrap: int = 0  # 16: an axis of 16 is a ring; 4: all axes are, in slices of whole 4x4x4 cubes
    domain: int = 0  # GPUs that NVLink joins
    gpu: GpuCore | None = None

    def peak_flops(self, dtype: str) -> float:
        """Of products of `dtype` on one device; a dtype the chip does not multiply counts as bfloat16. 0: unknown."""
        native = {"float32": self.f32, "int8": self.int8}.get(dtype, self.fp8 if dtype.startswith("float8") else 0.0)
        return native or self.bf16


def _tpu(name: str, kind: str, bf16: float, **more: Any) -> Chip:
    return Chip(name, kind, "tpu", bf16=bf16, f32=bf16, **more)


def _gpu(name: str, bf16: float, f32: float, memory: float, **more: Any) -> Chip:
    # jax takes three quarters of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
    usable = 0.75 * memory
    return Chip(
        name, f"NVIDIA {name.upper()}", "gpu", bf16=bf16, f32=f32, memory_bytes=memory, usable_bytes=usable, **more
    )  # fmt: skip


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in [
        _tpu(  # G S L P
            "v4", "TPU v4", 275e12, int8=275e12, memory_bytes=32 * GIB, usable_bytes=30.75 * GIB,
            memory_bandwidth=1228e9, clock_hz=1.05e9, matmul_share=0.80, attention_share=0.65,
            link_bandwidth=45e9, dcn_bandwidth=6.25e9, host_bandwidth=16e9, price=3.22, torus=(16, 16, 16), wrap=4,
        ),
        _tpu(  # G J L P; the pod's 6.4 Tbit/s of network over 256 chips
            "v5e", "TPU v5 lite", 197e12, int8=394e12, memory_bytes=16 * GIB, usable_bytes=15.75 * GIB,
            memory_bandwidth=819e9, clock_hz=1.5e9, matmul_share=0.80, attention_share=0.60,
            link_bandwidth=50e9, dcn_bandwidth=3.125e9, host_bandwidth=15e9, price=1.20, torus=(16, 16), wrap=16,
        ),
        _tpu(  # G J L M P
            "v5p", "TPU v5", 459e12, int8=918e12, memory_bytes=96 * GIB, usable_bytes=95.74 * GIB,
            memory_bandwidth=2765e9, clock_hz=1.75e9, matmul_share=0.80, attention_share=0.65,
            link_bandwidth=100e9, dcn_bandwidth=6.25e9, host_bandwidth=15e9, price=4.20, torus=(16, 20, 28), wrap=4,
        ),
        _tpu(  # G J L M P; four 200 Gbit/s cards for eight chips
            "v6e", "TPU v6 lite", 918e12, int8=1836e12, fp8=918e12, memory_bytes=32 * GIB, usable_bytes=31.25 * GIB,
            memory_bandwidth=1638e9, clock_hz=1.75e9, matmul_share=0.70, attention_share=0.30,
            link_bandwidth=100e9, dcn_bandwidth=12.5e9, host_bandwidth=32e9, price=2.70, torus=(16, 16), wrap=16,
        ),
        _tpu(  # G J L M P; a device is half a chip. The clock follows from the peak: 2 units of 256 x 256, as v6e's
            "tpu7x", "TPU7x", 1153.5e12, fp8=2307e12, memory_bytes=96 * GIB, usable_bytes=94.75 * GIB,
            memory_bandwidth=3690e9, clock_hz=2.2e9, matmul_share=0.75, attention_share=0.27, devices_per_chip=2,
            link_bandwidth=100e9, dcn_bandwidth=12.5e9, host_bandwidth=32e9, price=12.0, torus=(16, 16, 36), wrap=4,
        ),
        _gpu(  # N S, with 80 GB
            "a100", 312e12, 156e12, 85.0e9, int8=624e12, memory_bandwidth=2039e9, clock_hz=1.41e9,
            matmul_share=0.80, attention_share=0.60, link_bandwidth=300e9, dcn_bandwidth=25e9, host_bandwidth=32e9,
            domain=8, gpu=GpuCore((8, 0), 108, 40 * 2**20, 167_936),
        ),
        _gpu(  # N S M
            "h100", 989e12, 494.5e12, 85.0e9, int8=1979e12, fp8=1979e12, memory_bandwidth=3350e9, clock_hz=1.98e9,
            matmul_share=0.70, attention_share=0.50, link_bandwidth=450e9, dcn_bandwidth=50e9, host_bandwidth=64e9,
            domain=8, gpu=GpuCore((9, 0), 132, 50 * 2**20, 233_472),
        ),
        _gpu(  # N S M
            "h200", 989e12, 494.5e12, 150.0e9, int8=1979e12, fp8=1979e12, memory_bandwidth=4800e9, clock_hz=1.98e9,
            matmul_share=0.70, attention_share=0.60, link_bandwidth=450e9, dcn_bandwidth=50e9, host_bandwidth=64e9,
            domain=8, gpu=GpuCore((9, 0), 132, 60 * 2**20, 233_472),
        ),
        _gpu(  # N S
            "b200", 2250e12, 1125e12, 192.0e9, int8=4500e12, fp8=4500e12, memory_bandwidth=8000e9, clock_hz=1.965e9,
            matmul_share=0.70, attention_share=0.60, link_bandwidth=900e9, dcn_bandwidth=50e9, host_bandwidth=64e9,
            domain=8, gpu=GpuCore((10, 0), 148, 126 * 2**20, 233_472),
        ),
        Chip("cpu", "cpu", "cpu", matmul_share=1.0, attention_share=0.3),
    ]
}  # fmt: skip
MEMORY_SHARE = 0.85  # of HBM bandwidth that long reads and writes reach (arXiv:2604.15464 measures 86 % in decode)
# The die-to-die link of a chip with two devices, in ICI links: "six times faster than a 1D ICI link" (G, tpu7x).
DIE_LINKS = 6.0


def chip_of(device: Any) -> Chip:
    """The row of a jax device; one without peaks where its kind is not in the table."""
    if device.platform == "cpu":
        return CHIPS["cpu"]
    kind = device.device_kind
    known = [chip for chip in CHIPS.values() if kind.startswith(chip.kind)]
    if known:
        return max(known, key=lambda chip: len(chip.kind))
    return Chip(kind, kind, "tpu" if device.platform == "tpu" else "gpu")


def host_memory() -> float:
    """Bytes that this machine's programs may use: what there is, or what a container is allowed."""
    memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        memory = min(memory, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory


def usable_bytes(device: Any) -> float:
    """Bytes that programs may take on a device that is here; 0 where nobody knows."""
    if device.platform == "cpu":
        import jax

        return host_memory() / jax.local_device_count("cpu")
    return float((device.memory_stats() or {}).get("bytes_limit", 0)) or chip_of(device).usable_bytes


@functools.cache
def measured_cpu(num_devices: int) -> Chip:
    """This host's CPU as one of `num_devices` simulated devices, which share its cores, its memory and its bandwidth.

    Starts jax. The rates are those of a large product and a large copy, taken once.
    """
    memory = host_memory() / num_devices
    copy = measured_bandwidth() / num_devices
    return replace(
        CHIPS["cpu"],
        bf16=measured_peak("bfloat16") / num_devices,
        f32=measured_peak("float32") / num_devices,
        memory_bytes=memory,
        usable_bytes=memory,
        memory_bandwidth=copy,
        link_bandwidth=copy / 2,  # a byte that moves is read and written
        dcn_bandwidth=copy / 2,
        host_bandwidth=copy / 2,
        domain=num_devices,
    )


@functools.cache
def peak_flops(device_kind: str, platform: str, dtype: str) -> float:
    """Peak FLOP/s of one device for products of `dtype`; 0 where it is not known, measured once for a CPU."""
    if platform == "cpu":
        return measured_peak(dtype)
    known = [chip for chip in CHIPS.values() if device_kind.startswith(chip.kind)]
    return max(known, key=lambda chip: len(chip.kind)).peak_flops(dtype) if known else 0.0


@functools.cache
def measured_peak(dtype: str, size: int = 1536) -> float:
    """FLOP/s of a [size, size] product of `dtype` on this host's CPU."""
    import jax
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from llmos_jax.compiler.program import Program

    mesh = Mesh(np.array(jax.local_devices(backend="cpu")[:1]), ("data",))
    x = jax.device_put(np.ones((size, size), jax.numpy.dtype(dtype)), NamedSharding(mesh, PartitionSpec()))
    abstract = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    square = Program("square", _square, (), (abstract,), mesh).compile()
    return 2.0 * size**3 / _fastest(lambda: square(x).block_until_ready())


def _square(x):
    return x @ x


@functools.cache
def measured_bandwidth(size: int = 2**28) -> float:
    """Bytes/s that this host's CPU reads and writes while it copies `size` bytes."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    return 2.0 * size / _fastest(np.copyto, target, source)


def _fastest(function: Any, *args: Any) -> float:
    function(*args)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        function(*args)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def gpu_description(chip: Chip) -> str:
    """The text proto by which XLA's CUDA compiler knows a GPU that is not there."""
    assert chip.gpu is not None, f"{chip.name} is not in the table of GPUs"
    major, minor = chip.gpu.capability
    feature = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  fpus_per_core: {64 if major == 8 else 128}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: {chip.gpu.multiprocessors} clock_rate_ghz: {chip.clock_hz / 1e9:.3f} l2_cache_size: {chip.gpu.l2_bytes}
  shared_memory_per_block: 49152 shared_memory_per_core: {chip.gpu.shared_bytes}
  shared_memory_per_block_optin: {chip.gpu.shared_bytes - 1024}
  memory_bandwidth: {chip.memory_bandwidth:.0f} device_memory_size: {chip.memory_bytes:.0f}
  cuda_compute_capability {{ major: {major} minor: {minor} {feature} }}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 patch: 0 }} device_description_str: "{chip.kind}"
"""
