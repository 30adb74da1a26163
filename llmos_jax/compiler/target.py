"""Targets: the devices that programs are compiled for, whether they are here or only described.

`Target.parse` reads "v5p:8x8x8" (chip and slice), "4*v6e:16x16" (four slices joined by the data centre network),
"h100:8", "cpu:8" (simulated devices) or "local" (what jax sees). A described TPU needs libtpu, a described GPU the CUDA
plugin; no chip is needed, and described devices cannot hold arrays.
"""

import contextlib
import functools
import importlib.util
import math
import os
import re
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from llmos_jax.compiler.chips import CHIPS, Chip, chip_of, gpu_description, measured_cpu
from llmos_jax.compiler.interconnect import AxisLinks, axis_links, wraps
from llmos_jax.config import MESH_AXES, MeshConfig, UserError, mesh_shape, require
from llmos_jax.sharding import make_mesh

# Without these libtpu asks a metadata server that is not there, refuses to be loaded by a second process, and prints
# its surprise at finding no TPU to the user's terminal.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}

_PATTERN = re.compile(r"(?:(\d+)\*)?([a-z]\w*):(\d+(?:x\d+)*)")


@dataclass(frozen=True)
class Target:
    """Devices of one kind. dims: chips of a slice along each physical axis; one number for chips behind a switch.

    `prepare` must have run before jax starts where the devices are simulated; `devices` and `mesh` call it.
    """

    name: str
    row: Chip  # the table's; `chip` has what is measured filled in
    dims: tuple[int, ...]
    num_slices: int = 1
    local: bool = False

    @staticmethod
    def parse(text: str) -> "Target":
        """Raises UserError where `text` is no target; "local" starts jax."""
        text = text.strip()
        if text == "local":
            return _local()
        match = _PATTERN.fullmatch(text)
        if match is None or match[2] not in CHIPS:
            raise UserError(
                f"target {text!r} is not known; use local, or a chip and a topology such as v5p:8x8x8, 4*v6e:16x16, "
                f"h100:8 or cpu:8. Chips: {', '.join(CHIPS)}"
            )
        chip, dims = CHIPS[match[2]], tuple(map(int, match[3].split("x")))
        num_slices = int(match[1] or 1)
        require(num_slices >= 1 and min(dims) >= 1, f"target {text!r} has no chips; use numbers of at least 1")
        if chip.torus:
            _check_slice(text, chip, dims)
        else:
            require(
                len(dims) == 1,
                f"target {text!r}: a {chip.name} takes one number, the devices, such as {chip.name}:8",
            )
            require(
                chip.domain == 0 or dims[0] <= chip.domain or dims[0] % chip.domain == 0,
                f"target {text!r}: {chip.name}s come in hosts of {chip.domain}; use up to {chip.domain}, or a multiple",
            )
        return Target(text, chip, dims, num_slices)

    @functools.cached_property
    def chip(self) -> Chip:
        """The chip's peaks, memory and links; a CPU's are measured now, which starts jax."""
        if self.row.platform != "cpu":
            return self.row
        self.prepare()
        return measured_cpu(self.num_devices)

    @property
    def num_chips(self) -> int:
        return math.prod(self.dims) * self.num_slices

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.row.devices_per_chip

    @property
    def num_hosts(self) -> int:
        """Of GPUs that NVLink joins; 1 for other chips."""
        return self.num_slices * max(self.dims[0] // self.row.domain, 1) if self.row.domain else 1

    def with_price(self, dollars: float) -> "Target":
        """The same target at `dollars` a chip-hour."""
        return replace(self, row=replace(self.row, price=dollars))

    @property
    def price(self) -> float | None:
        """US dollars an hour for all of it; None where no price is known."""
        return None if self.row.price is None else self.row.price * self.num_chips

    def prepare(self) -> None:
        """Sets what must be set before jax and libtpu start; does nothing for what has started already."""
        if self.local:
            return
        if self.row.platform == "tpu":
            for name, value in _TPU_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
        # The host's own part is done on its CPU: it need not have the chip, and another program may hold it.
        jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS") or "cpu")
        flags = os.environ.get("XLA_FLAGS", "")
        if self.row.platform == "cpu" and "xla_force_host_platform_device_count" not in flags:
            with contextlib.suppress(RuntimeError):  # jax has started; `devices` counts what there is
                jax.config.update("jax_num_cpu_devices", self.num_devices)

    def devices(self) -> list[Any]:
        """jax devices, described ones where the target is not "local" or a CPU. Raises UserError where it cannot be."""
        if self.local:
            return list(jax.devices())
        self.prepare()
        if self.row.platform == "tpu":
            return list(_described_tpus(self.row.name, self.dims, self.num_slices))
        if self.row.platform == "gpu":
            return list(_described_gpus(self.row.name, self.num_hosts, self.num_devices // self.num_hosts))
        devices = jax.devices("cpu")
        require(
            len(devices) >= self.num_devices,
            f"target {self.name} needs {self.num_devices} simulated devices, and jax has started with {len(devices)}; "
            f"start it with XLA_FLAGS=--xla_force_host_platform_device_count={self.num_devices}",
        )
        return devices[: self.num_devices]

    def mesh(self, config: MeshConfig) -> Mesh:
        """The mesh of `config` on these devices: whole physical axes where the sizes allow it, slices outermost.

        With several slices mesh.data runs over them where it can, otherwise mesh.fsdp. Raises UserError where the sizes
        do not fit.
        """
        devices = self.devices()
        if self.row.platform != "tpu" or self.num_slices == 1:
            try:
                return make_mesh(config, devices)
            except NotImplementedError:  # an axis is no product of whole physical axes
                pass
        sizes = mesh_shape(config, len(devices))
        shape, over = tuple(sizes.values()), tuple(self._slices_along(sizes).values())
        if self.num_slices == 1:
            array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        else:
            inside = tuple(size // slices for size, slices in zip(shape, over, strict=True))
            array = mesh_utils.create_hybrid_device_mesh(inside, over, devices, allow_split_physical_axes=True)
        return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))

    def axis_links(self, mesh: Mesh) -> dict[str, AxisLinks]:
        """What joins the devices of each axis of `mesh`, and the bytes/s that brings into a device."""
        return axis_links(mesh, self.chip, self.dims if self.row.torus else ())

    def _slices_along(self, sizes: dict[str, int]) -> dict[str, int]:
        """How many slices each mesh axis runs over."""
        for axis in ("data", "fsdp"):
            if sizes[axis] % self.num_slices == 0:
                return {name: self.num_slices if name == axis else 1 for name in sizes}
        raise UserError(
            f"neither mesh.data={sizes['data']} nor mesh.fsdp={sizes['fsdp']} is a multiple of the {self.num_slices} "
            f"slices of {self.name}; set mesh.data={self.num_slices}"
        )


def _check_slice(text: str, chip: Chip, dims: tuple[int, ...]) -> None:
    largest = "x".join(map(str, chip.torus))
    require(
        len(dims) == len(chip.torus),
        f"target {text!r}: a {chip.name} topology has {len(chip.torus)} numbers, such as {chip.name}:{largest}",
    )
    fits = all(a <= b for a, b in zip(sorted(dims), sorted(chip.torus), strict=True))
    require(
        fits,
        f"target {text!r} is larger than a slice, {largest} for a {chip.name}; write several as "
        f"2*{chip.name}:{largest}",
    )


def _local() -> Target:
    devices = jax.devices()
    row = chip_of(devices[0])
    num_slices = len({getattr(device, "slice_index", 0) or 0 for device in devices}) if row.platform == "tpu" else 1
    dims: tuple[int, ...] = (len(devices),)
    if row.torus:
        coords = np.array([device.coords for device in devices])
        dims = tuple((np.ptp(coords, axis=0) + 1).tolist())[: len(row.torus)]
    return Target("local", row, dims, num_slices, local=True)


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@functools.lru_cache(maxsize=16)
def _described_tpus(name: str, dims: tuple[int, ...], num_slices: int) -> tuple[Any, ...]:
    require(_has("libtpu"), f'compiling for a {name} needs libtpu: pip install "llmos-jax[tpu]"')
    # Unless told so, libtpu describes a slice without rings, and gathers along one axis where the chips have three.
    rings = [wraps(CHIPS[name], dims, dim) for dim in range(len(dims))]
    options: dict[str, Any] = {"wrap": [*rings, *[False] * (3 - len(rings))]}
    if name == "v4":
        options["chip_config_name"] = "megacore"  # the two cores of a chip as one device, as on a real one
    # A host has 2x2 chips; a smaller slice, or an odd one, is described as hosts of what divides it.
    host = [2 if size % 2 == 0 else 1 for size in dims[:2]] + [1]
    if host != [2, 2, 1]:
        options["chips_per_host_bounds"] = host
    if num_slices > 1:
        options["num_slices"] = num_slices
    try:
        topology = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{name}:{'x'.join(map(str, dims))}", **options
        )
    except Exception as error:
        raise UserError(f"libtpu does not describe {name}:{'x'.join(map(str, dims))}: {error}") from error
    return tuple(topology.devices)


@functools.lru_cache(maxsize=16)
def _described_gpus(name: str, hosts: int, per_host: int) -> tuple[Any, ...]:
    require(
        _has("jax_plugins.xla_cuda13") or _has("jax_plugins.xla_cuda12"),
        f'compiling for a {name} needs the CUDA plugin: pip install "llmos-jax[cuda]"',
    )
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name=name,
        target_config=gpu_description(CHIPS[name]),
        topology=f"1x{hosts}x{per_host}",  # slices x hosts x devices of a host
    )
    return tuple(topology.devices)
