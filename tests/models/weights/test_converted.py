"""Converted weights come back as they were made, are made again where they are not, and are nobody's to change."""

import os
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.compiler import cache
from llmos_jax.models.decoder import abstract_params
from llmos_jax.models.weights import converted as module
from llmos_jax.models.weights import load_model_config, load_weights
from tests import tiny
from tests.models import golden
from tests.models.weights import gguf_files


@pytest.fixture(autouse=True)
def home(empty_cache: Path) -> Path:
    return empty_cache


@pytest.fixture
def file(tmp_path: Path) -> Path:
    stored = golden.load("llama")
    folder = golden.write_folder(tmp_path / "llama", stored.config, stored.tensors)
    return gguf_files.write(tmp_path / "llama.gguf", folder, stored, gguf.GGMLQuantizationType.Q8_0)


@pytest.fixture
def conversions(monkeypatch) -> list[Path]:
    """The files that are converted, as it happens."""
    seen: list[Path] = []
    plain = module._write

    def write(file, source, *rest):
        seen.append(source)
        plain(file, source, *rest)

    monkeypatch.setattr(module, "_write", write)
    return seen


def load(file: Path, mesh=None, **changes) -> dict[str, jax.Array]:
    model = load_model_config(file)
    model = type(model)(**{**vars(model), **changes})
    return load_weights(file, model, abstract_params(model, mesh or tiny.mesh(data=1)))


def kept(home: Path) -> list[Path]:
    return sorted((home / "executables").glob("*.weights"))


def same(one: dict[str, jax.Array], other: dict[str, jax.Array]) -> bool:
    return one.keys() == other.keys() and all(
        (one[path].dtype, one[path].sharding) == (other[path].dtype, other[path].sharding)
        and np.asarray(one[path]).tobytes() == np.asarray(other[path]).tobytes()
        for path in one
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_they_are_converted_once_and_come_back_bit_for_bit(file, home, conversions, dtype, monkeypatch):
    first, second = (load(file, param_dtype=dtype) for _ in range(2))
    assert conversions == [file] and len(kept(home)) == 1
    assert same(first, second) and first["embed.table"].dtype == dtype
    monkeypatch.setenv("LLMOS_CACHE_BYTES", "0")
    assert same(first, load(file, param_dtype=dtype))


def test_another_file_or_dtype_is_another(file, home, conversions):
    load(file)
    load(file, param_dtype="bfloat16")
    assert len(conversions) == len(kept(home)) == 2
    copy = file.with_name("copy.gguf")
    copy.write_bytes(file.read_bytes())
    load(copy)
    assert conversions[2:] == [copy]
    link = file.with_name("link.gguf")  # as a pulled model is, of its blob
    link.hardlink_to(file)
    load(link)
    assert len(conversions) == 3
    os.utime(file)
    load(file)
    assert len(conversions) == 4


def test_damage_is_found_said_and_mended(file, home, conversions, capfd):
    whole = load(file)
    (entry,) = kept(home)
    content = entry.read_bytes()
    places = {"an array": -1, "the seal": 20, "the header": 200, "its end": None}
    for number, (what, at) in enumerate(places.items(), start=2):
        bad = bytearray(content[: -module.BOUNDARY] if at is None else content)
        if at is not None:
            bad[at if at >= 0 else content.rindex(np.asarray(whole["final_norm.scale"]).tobytes())] ^= 1
        entry.write_bytes(bytes(bad))
        cache._said.clear()
        assert same(load(file), whole) and same(load(file), whole), what
        assert len(conversions) == number, what
        assert "cannot be used" in capfd.readouterr().err
    entry.write_bytes(b"")
    assert same(load(file), whole) and len(kept(home)) == 1


def test_a_program_that_takes_the_memory_over_does_not_reach_the_file(file, home):
    load(file)
    (entry,) = kept(home)
    content = entry.read_bytes()
    params = load(file)
    doubled = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2, tree), donate_argnums=0)(params)
    jax.block_until_ready(doubled)
    assert entry.read_bytes() == content
    entry.unlink()  # what is in use stays
    assert float(jnp.abs(doubled["embed.table"]).sum()) > 0


def test_they_are_counted_and_removed_with_the_executables(file, home, conversions, monkeypatch):
    load(file)
    (entry,) = cache.entries()
    assert entry.header["program"] == "weights" and entry.size == kept(home)[0].stat().st_size
    monkeypatch.setenv("LLMOS_CACHE_BYTES", str(entry.size // 2))  # too small for it to be kept now
    cache.prune()
    assert cache.entries() == []
    load(file)
    assert cache.entries() == [] and len(conversions) == 1


def test_arrays_on_several_devices_are_read_anew(file, home):
    load(file, tiny.mesh(data=1, tensor=2))
    assert kept(home) == []


def test_a_disk_that_is_full_does_not_stop_it(file, home, monkeypatch, capfd):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write", full)
    assert same(load(file), load(file))
    assert "No space left" in capfd.readouterr().err and kept(home) == []
