"""Options of the XLA compiler that our programs are compiled with, by chip and by version of the compiler."""

from importlib import metadata
from typing import Any

from jax.sharding import Mesh

Options = tuple[tuple[str, Any], ...]

# Sums of gradients are laid out so that each device scatters its part, in place of adding all of it up everywhere.
_SCATTER = {
    "xla_tpu_use_minor_sharding_for_major_trivial_input": True,
    "xla_tpu_relayout_group_size_threshold_for_reduce_scatter": 1,
    "xla_tpu_assign_all_reduce_scatter_layout": True,
    "xla_tpu_enable_data_parallel_all_reduce_opt": True,
    "xla_tpu_data_parallel_opt_different_sized_ops": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}
# Gathers run beside products: inside the same fusions,
_IN_FUSIONS = {
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_enable_async_all_gather": True,
}
# or on the sparse cores, where the compiler says that the former is not to be used (libtpu 0.0.48, but for v5e).
_ON_SPARSE_CORES = {
    "xla_sc_disable_megacore_partitioning": True,
    "xla_tpu_use_tc_device_shape_on_sc": True,
    "xla_tpu_use_single_sparse_core_for_all_gather_offload": True,
    **{
        f"xla_tpu_enable_sparse_core_collective_offload_{kind}": True
        for kind in ("all_gather", "2d_all_gather", "3d_all_gather", "reduce_scatter", "all_reduce")
    },
}
_SPARSE_CORES_SINCE = (0, 0, 45)
# The compiler leaves most of a v6e's 128 MiB of VMEM unused; products in larger blocks take an eighth less of a Llama step.
_V6E = {"xla_tpu_scoped_vmem_limit_kib": 98_304}


def compiler_options(mesh: Mesh) -> Options:
    """For programs on `mesh`; none for a single device, or where there is nothing to set."""
    device = mesh.devices.flat[0]
    if device.platform != "tpu" or mesh.size == 1:
        return ()
    has_sparse_cores = device.device_kind not in ("TPU v5 lite", "TPU v4")
    newer = _libtpu() >= _SPARSE_CORES_SINCE
    overlap = _ON_SPARSE_CORES if newer and has_sparse_cores else _IN_FUSIONS
    more = _V6E if device.device_kind == "TPU v6 lite" else {}
    return tuple(sorted((_SCATTER | overlap | more).items()))


def _libtpu() -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in metadata.version("libtpu").split(".")[:3])
    except (metadata.PackageNotFoundError, ValueError):
        return ()
