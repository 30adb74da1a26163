"""Chips that are only described: programs are compiled for them on a machine that has none.

TPUs need libtpu (`pip install "jax[tpu]"`), GPUs the wheels jax-cuda13-plugin, jax-cuda13-pjrt and nvidia-cuda-nvcc.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
_GPU = """
gpu_device_info {{ threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
 shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: {bandwidth}
 l2_cache_size: {l2} clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448
 cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
 registers_per_core_limit: 65536 registers_per_block_limit: 65536 }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 patch: 0 }} device_description_str: "{name}"
"""
GPUS = {
    "h100": _GPU.format(
        bandwidth=3_350_000_000_000, l2=52_428_800, memory=80_000_000_000, name="NVIDIA H100 80GB HBM3"
    ),
    "h200": _GPU.format(bandwidth=4_800_000_000_000, l2=62_914_560, memory=150_000_000_000, name="NVIDIA H200"),
}


def mesh(target: str, axes: tuple[str, ...] = ("x",), shape: tuple[int, ...] = (1,)) -> Mesh:
    """A mesh of described chips: of one TPU board (up to 4 devices, 8 for tpu7x) or of one GPU.

    Raises ValueError for an unknown target, RuntimeError where the compiler for it is not installed.
    """
    if target not in TPUS and target not in GPUS:
        raise ValueError(f"target={target!r} is not known; use one of {', '.join([*TPUS, *GPUS])}")
    return Mesh(_devices(target)[: _size(shape)].reshape(shape), axes)


def compile_for(target: str, function: Callable, *args: Any) -> jax.stages.Compiled:
    """`function` compiled for one chip; args are arrays or `jax.ShapeDtypeStruct`s (any pytree)."""
    chips = mesh(target)
    alone = NamedSharding(chips, PartitionSpec())
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=alone), args)
    with jax.sharding.set_mesh(chips):
        return jax.jit(function).lower(*abstract).compile()


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for part in shape:
        size *= part
    return size


def _devices(target: str):
    import numpy as np

    if target in TPUS:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[target])
    else:
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=target, target_config=GPUS[target], topology="1x1x1"
        )
    return np.array(topology.devices)
