"""The chip that a program is traced for."""

from typing import NamedTuple

import jax


class Chip(NamedTuple):
    """What a program is traced for."""

    platform: str  # "cpu", "gpu" or "tpu"
    kind: str  # as jax names the device: "TPU v6 lite", "NVIDIA H200", "cpu"


def current_chip() -> Chip:
    """The chip of the mesh in use, which may only be described; without a mesh, that of the first device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        first = jax.devices()[0]
        return Chip(first.platform, first.device_kind)
    return Chip({"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform), device.device_kind)


def interpreted() -> bool:
    """Whether a Pallas kernel is to be interpreted: there is no chip to compile it for."""
    return current_chip().platform == "cpu"
