"""Targets: what a description means, what joins its devices, and devices that are described for real."""

import dataclasses
import importlib.util
import itertools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from llmos_jax.compiler.chips import CHIPS, gpu_description, peak_flops
from llmos_jax.compiler.interconnect import axis_links, wraps
from llmos_jax.compiler.options import compiler_options
from llmos_jax.compiler.target import Target
from llmos_jax.config import MeshConfig, UserError

# jax's own store keeps programs of described devices, and warns that it cannot load them.
unread = pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")
needs_libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="needs the TPU compiler (pip install jax[tpu])"
)


@pytest.mark.parametrize(
    ("text", "chips", "devices", "slices"),
    [
        ("v5p:8x8x8", 512, 512, 1),
        ("4*v6e:16x16", 1024, 1024, 4),
        ("tpu7x:4x4x4", 64, 128, 1),  # two devices a chip
        ("v4:2x2x1", 4, 4, 1),
        ("h100:8", 8, 8, 1),
        ("2*h100:8", 16, 16, 2),
        ("cpu:8", 8, 8, 1),
    ],
)
def test_what_a_description_means(text, chips, devices, slices):
    target = Target.parse(text)
    assert (target.num_chips, target.num_devices, target.num_slices) == (chips, devices, slices)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v9:2x2", ["v9:2x2", "v5p:8x8x8", *CHIPS]),
        ("v6e", ["'v6e'", "local"]),
        ("v6e:8", ["2 numbers", "v6e:16x16"]),
        ("v5p:8x8", ["3 numbers"]),
        ("v6e:32x16", ["larger than a slice", "2*v6e:16x16"]),
        ("h100:12", ["hosts of 8"]),
        ("h100:2x4", ["one number"]),
        ("0*v6e:2x2", ["at least 1"]),
        ("v6e:2x0", ["at least 1"]),
    ],
)
def test_a_wrong_description_says_what_is_right(text, words):
    with pytest.raises(UserError) as error:
        Target.parse(text)
    assert all(word in str(error.value) for word in words)


def test_the_local_devices():
    target = Target.parse("local")
    assert target.devices() == jax.devices()
    assert target.num_devices == len(jax.devices())
    assert target.mesh(MeshConfig()).shape["fsdp"] == len(jax.devices())


def test_simulated_devices_share_one_host():
    one, four = Target.parse("cpu:1").chip, Target.parse("cpu:4").chip
    assert four.f32 == pytest.approx(one.f32 / 4) and four.memory_bytes == pytest.approx(one.memory_bytes / 4)
    assert 1e8 < one.f32 < 1e15 and 1e8 < one.memory_bandwidth < 1e13
    assert Target.parse("cpu:2").devices() == jax.devices()[:2]


def test_more_simulated_devices_than_jax_started_with():
    with pytest.raises(UserError, match="xla_force_host_platform_device_count=512"):
        Target.parse("cpu:512").devices()


def test_price():
    target = Target.parse("v6e:2x2").with_price(1.5)
    assert target.price == 6.0
    assert dataclasses.replace(target, row=CHIPS["h100"]).price is None


@pytest.mark.skipif(bool(importlib.util.find_spec("libtpu")), reason="libtpu is here")
def test_a_missing_compiler_is_named():
    with pytest.raises(UserError, match=r'v6e needs libtpu: pip install "llmos-jax\[tpu\]"'):
        Target.parse("v6e:2x2").devices()


# The table.


@pytest.mark.parametrize(
    "chip", [chip for chip in CHIPS.values() if chip.platform != "cpu"], ids=lambda chip: chip.name
)
def test_a_row_is_whole(chip):
    for name in ("bf16", "f32", "memory_bandwidth", "clock_hz", "link_bandwidth", "dcn_bandwidth", "host_bandwidth"):
        assert getattr(chip, name) > 0, name
    assert 0.7 * chip.memory_bytes < chip.usable_bytes < chip.memory_bytes
    assert 0 < chip.attention_share <= chip.matmul_share <= 1
    assert (chip.torus != ()) == (chip.wrap != 0) == (chip.domain == 0)
    # products of 16-bit inputs are worth a few hundred FLOPs a byte on every chip of the last years
    assert 100 < chip.bf16 / chip.memory_bandwidth < 600


@pytest.mark.parametrize(
    ("name", "units", "passes"), [("v4", 8, 1), ("v5e", 4, 1), ("v5p", 8, 1), ("v6e", 2, 8), ("tpu7x", 2, 8)]
)
def test_a_tpu_peak_is_its_matrix_units_times_its_clock(name, units, passes):
    """128 x 128 multiply-adds a unit and cycle; from v6e on 256 x 256, twice."""
    assert CHIPS[name].bf16 == pytest.approx(units * passes * 2 * 128 * 128 * CHIPS[name].clock_hz, rel=0.002)


@pytest.mark.parametrize(
    ("name", "version"), [("v4", "V4"), ("v5e", "V5E"), ("v5p", "V5P"), ("v6e", "V6E"), ("tpu7x", "7X")]
)
def test_a_table_of_jax_says_the_same(name, version):
    tpu_info = pytest.importorskip("jax._src.pallas.mosaic.tpu_info")
    chip, version = CHIPS[name], getattr(tpu_info.ChipVersion, f"TPU_{version}")
    cores = version.num_physical_tensor_cores_per_chip // chip.devices_per_chip
    core = tpu_info.get_tpu_info_for_chip(version, 1)  # its figures are those of one core
    assert chip.bf16 == pytest.approx(core.bf16_ops_per_second * cores, rel=0.01)
    assert chip.memory_bytes == pytest.approx(core.hbm_capacity_bytes * cores, rel=0.01)
    assert chip.memory_bandwidth == pytest.approx(core.mem_bw_bytes_per_second * cores, rel=0.13)  # v5p: 2,460 GB/s


def test_peaks():
    assert peak_flops("TPU v5p", "tpu", "bfloat16") == peak_flops("TPU v5", "tpu", "bfloat16") == 459e12
    assert peak_flops("TPU v5 lite", "tpu", "bfloat16") == 197e12  # not mistaken for a v5
    assert peak_flops("NVIDIA H100 80GB HBM3", "gpu", "bfloat16") == 989e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "gpu", "float32") == 494.5e12  # TF32
    assert peak_flops("TPU7x", "tpu", "int8") == peak_flops("TPU7x", "tpu", "bfloat16")  # not native there
    assert peak_flops("TPU7x", "tpu", "float8_e4m3fn") == 2 * peak_flops("TPU7x", "tpu", "bfloat16")
    assert peak_flops("abacus", "gpu", "bfloat16") == 0.0
    assert 1e8 < peak_flops("cpu", "cpu", "float32") < 1e15


def test_a_described_gpu_carries_its_numbers():
    text = gpu_description(CHIPS["h200"])
    assert "core_count: 132" in text and "memory_bandwidth: 4800000000000" in text and 'str: "NVIDIA H200"' in text
    assert text.count("{") == text.count("}")


# The interconnect, on stand-ins for devices that have coordinates.


def chips(*dims: int, cores: int = 1, slices: int = 1) -> np.ndarray:
    """Stand-ins, [slices, x, y, (z), cores]."""
    places = itertools.product(range(slices), *map(range, dims), range(cores))
    found = [
        SimpleNamespace(slice_index=s, coords=[*coords, 0][:3], core_on_chip=core, process_index=s)
        for s, *coords, core in places
    ]
    return np.array(found).reshape(slices, *dims, cores)


def links(devices: np.ndarray, shape: tuple[int, ...], chip: str, dims: tuple[int, ...], axes=("a", "b")):
    mesh = SimpleNamespace(devices=devices.reshape(shape), axis_names=axes)
    return axis_links(mesh, CHIPS[chip], dims)  # type: ignore[arg-type]


def test_where_a_torus_closes():
    assert wraps(CHIPS["v6e"], (16, 16), 0) and not wraps(CHIPS["v6e"], (8, 16), 0) and wraps(CHIPS["v6e"], (8, 16), 1)
    assert wraps(CHIPS["v5p"], (4, 8, 8), 0) and not wraps(CHIPS["v5p"], (2, 4, 4), 1)  # a cube is switched whole


def test_whole_axes_of_a_torus():
    """v5p 8x8x8 as 8 x 64: a ring of 8, and two rings at once. 2 links of 100 GB/s each."""
    found = links(chips(8, 8, 8), (8, 64), "v5p", (8, 8, 8))
    assert found["a"].bandwidth == 200e9 and found["b"].bandwidth == 400e9
    assert str(found["a"]) == "x8 ring" and str(found["b"]) == "y8 ring x z8 ring"


def test_the_scaling_books_gather():
    """Chapter on sharding, bf16[2048, 8192] on v5e: without a ring of 4, three hops of a quarter over one link; 560 us
    at the book's 45 GB/s. A ring of 16 uses two links."""
    line = links(chips(4, 4), (4, 4), "v5e", (4, 4))["a"]
    ring = links(chips(16, 16), (16, 16), "v5e", (16, 16))["a"]
    size = 2 * 2048 * 8192
    assert line.seconds("all-gather", size) == pytest.approx(560e-6 * 45 / 50 + 3e-6, rel=2e-3)
    assert ring.seconds("all-gather", size) == pytest.approx(size * 15 / 16 / 100e9 + 8e-6)
    assert ring.seconds("all-reduce", size) == pytest.approx(2 * ring.seconds("reduce-scatter", size))
    # an all-to-all of a ring takes a quarter of the gather of what all hold together (latency aside)
    everything = 16 * size
    assert ring.seconds("all-to-all", size) - 8e-6 == pytest.approx(everything / 4 / 100e9)


def test_an_axis_that_is_split():
    """v6e 16x16 as 64 x 4: the 4 are neighbours on x, the 64 the other 4 of x, whose links four groups share, and y."""
    found = links(chips(16, 16).reshape(4, 4, 16).transpose(0, 2, 1), (64, 4), "v6e", (16, 16))
    assert found["b"].bandwidth == 100e9 and not found["b"].spans[0].ring
    assert found["a"].bandwidth == 2 * 100e9 / 4 + 2 * 100e9


def test_two_devices_of_a_chip_share_its_links():
    devices = chips(4, 4, 4, cores=2)
    one_of_two = links(devices.transpose(0, 4, 1, 2, 3), (2, 64), "tpu7x", (4, 4, 4))
    assert one_of_two["a"].bandwidth == 600e9  # the die-to-die link
    assert one_of_two["b"].bandwidth == 3 * 200e9 / 2
    both = links(devices, (1, 128), "tpu7x", (4, 4, 4))
    assert both["b"].bandwidth == 3 * 200e9  # what arrives is for both


def test_slices_are_joined_by_the_network():
    """Each chip fetches its 1/16 of the other slice's half, then the slice gathers it all."""
    found = links(chips(4, 4, slices=2), (1, 32), "v6e", (4, 4))["b"]
    assert found.num_slices == 2 and found.inside == 16
    size = 1e9
    assert found.seconds("all-gather", size) == pytest.approx(
        size * 15 / 16 / 200e9 + 6e-6 + size / 16 / 2 / CHIPS["v6e"].dcn_bandwidth
    )
    assert links(chips(4, 4, slices=2), (2, 16), "v6e", (4, 4))["a"].seconds("all-reduce", size) == pytest.approx(
        2 * size / 2 / CHIPS["v6e"].dcn_bandwidth
    )


def test_gpus_behind_a_switch():
    """Two hosts of 8: scaling book, part 12: a gather inside a node takes bytes * 7/8 / 450 GB/s."""
    found = links(chips(8, slices=2), (2, 8), "h100", ())
    assert found["b"].seconds("all-gather", 1e9) == pytest.approx(1e9 * 7 / 8 / 450e9 + 8e-6)
    assert found["a"].num_slices == 2 and found["a"].inside == 1


# Described devices.


@pytest.mark.described
@needs_libtpu
@pytest.mark.parametrize("text", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x2", "v6e:1x1", "tpu7x:2x2x1", "2*v6e:2x2"])
def test_described_tpus(text):
    target = Target.parse(text)
    devices = target.devices()
    assert len(devices) == target.num_devices
    assert devices[0].device_kind.startswith(target.chip.kind)
    assert set(target.axis_links(target.mesh(MeshConfig(data=target.num_slices)))) >= {"data", "fsdp", "tensor"}


@pytest.mark.described
@needs_libtpu
def test_a_mesh_over_slices():
    target = Target.parse("2*v6e:4x4")
    mesh = target.mesh(MeshConfig(data=2, fsdp=4, tensor=4))
    found = target.axis_links(mesh)
    assert found["data"].num_slices == 2 and found["fsdp"].num_slices == found["tensor"].num_slices == 1
    with pytest.raises(UserError, match=r"set mesh\.data=2"):
        target.mesh(MeshConfig(data=1, fsdp=1, tensor=32))


@pytest.mark.described
@needs_libtpu
@unread
def test_the_options_are_known_to_the_compiler():
    target = Target.parse("v5e:2x2")
    mesh = target.mesh(MeshConfig())
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    x = jax.ShapeDtypeStruct((1024, 1024), "float32", sharding=place)
    with jax.set_mesh(mesh):
        compiled = jax.jit(lambda x: x @ x).lower(x).compile(compiler_options=dict(compiler_options(mesh)))
    assert "all-gather" in compiled.as_text()


@pytest.mark.described
@needs_libtpu
@unread
def test_the_compiler_knows_of_the_rings():
    """A gather over a whole cube uses its three axes at once; on a slice without rings it goes along one chain."""
    for text, emitter in [("v5p:4x4x4", "3DAllGather"), ("v6e:4x4", "1DAllGather")]:
        mesh = Target.parse(text).mesh(MeshConfig())
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
        x = jax.ShapeDtypeStruct((mesh.size * 128, 8192), "bfloat16", sharding=place)
        with jax.set_mesh(mesh):
            gather = jax.jit(lambda x: x * 2, out_shardings=jax.sharding.NamedSharding(mesh, jax.P()))
            assert f'"emitter":"{emitter}' in gather.lower(x).compile().as_text()
