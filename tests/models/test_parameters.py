"""What is known of a model's parameters is what its modules say, whether it comes from the disk or from them."""

import sys
from pathlib import Path

import pytest

from llmos_jax.compiler import cache
from llmos_jax.models import parameters as module
from llmos_jax.models.decoder import abstract_params
from llmos_jax.models.parameters import known_params
from tests import tiny

CONFIGS = {
    "tied": tiny.model(tie_embeddings=True, qkv_bias=True),
    "experts": tiny.MOE,
    "two kinds": tiny.model(num_layers=3, layer_pattern=("local", "global"), sliding_window=8, param_dtype="bfloat16"),
}


@pytest.fixture(autouse=True)
def home(empty_cache: Path) -> Path:
    module._known.cache_clear()
    return empty_cache


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_what_the_modules_say(name, monkeypatch):
    config, mesh = CONFIGS[name], tiny.mesh(data=2, tensor=2)
    expected = abstract_params(config, mesh)
    for again in range(2):
        found = known_params(config, mesh)
        assert list(found) == list(expected)
        for path, leaf in found.items():
            like = expected[path]
            assert (leaf.shape, leaf.dtype, leaf.sharding) == (like.shape, like.dtype, like.sharding)
        module._known.cache_clear()
        if not again:
            monkeypatch.setitem(sys.modules, "llmos_jax.models.decoder", None)  # the second time from the disk


def test_damage_and_a_cache_that_is_off_are_no_matter(home, monkeypatch):
    config, mesh = CONFIGS["tied"], tiny.mesh(data=1)
    expected = known_params(config, mesh)
    (file,) = (home / "executables").glob("*.parameters")
    content = file.read_bytes()
    for bad in (b"", b"x\ny", content[:-1], content.replace(b"float32", b"float64", 1)):
        file.write_bytes(bad)
        module._known.cache_clear()
        assert known_params(config, mesh) == expected and file.read_bytes() == content
    assert [entry.header["program"] for entry in cache.entries()] == ["parameters"]
    monkeypatch.setenv("LLMOS_CACHE_BYTES", "0")
    module._known.cache_clear()
    assert known_params(config, mesh) == expected


def test_another_model_is_another(home):
    for config in CONFIGS.values():
        known_params(config, tiny.mesh(data=1))
    assert len(list((home / "executables").glob("*.parameters"))) == len(CONFIGS)
