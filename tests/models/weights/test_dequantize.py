"""Blocks of every type become the numbers that the `gguf` package makes of them, bit for bit."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from llmos_jax.models.weights import dequantize as module
from llmos_jax.models.weights.dequantize import UNPACK, dequantize

BY_PACKAGE = (Kind.Q2_K, Kind.IQ4_XS, Kind.BF16)


def random_blocks(kind: Kind, shape: tuple[int, ...]) -> np.ndarray:
    """Any bytes are blocks; float16s that are no numbers are left to the test of them."""
    size, stored = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 256, (*shape[:-1], shape[-1] // size * stored), np.uint8)
    with np.errstate(all="ignore"):
        numbers = gguf.dequantize(data, kind)
    bad = ~np.isfinite(numbers.reshape(-1, size)).all(axis=1)
    data.reshape(-1, stored)[bad] = 0
    return data


@pytest.mark.parametrize("piece", [2**18, 17 * 256, 1])
@pytest.mark.parametrize("kind", [*UNPACK, *BY_PACKAGE], ids=lambda kind: kind.name)
def test_as_the_package(kind, piece, monkeypatch):
    monkeypatch.setattr(module, "PIECE", max(piece, gguf.GGML_QUANT_SIZES[kind][0]))
    for shape in ((5, 768), (1, 256), (512,), (3, 7, 256)):
        data = random_blocks(kind, shape)
        expected = gguf.dequantize(data, kind)
        for by_columns in (False, True):
            found = dequantize(data, kind, by_columns)
            assert found.dtype == np.float32 and found.shape == shape
            assert found.tobytes() == expected.tobytes()  # the signs of zeros too


@pytest.mark.parametrize("kind", UNPACK, ids=lambda kind: kind.name)
def test_what_is_no_number_stays_none(kind):
    data = np.full((2, 2 * gguf.GGML_QUANT_SIZES[kind][1]), 0xFF, np.uint8)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(dequantize(data, kind), gguf.dequantize(data, kind))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_floats_are_floats(dtype):
    data = np.arange(12, dtype=dtype).reshape(3, 4)
    found = dequantize(data, Kind.F32 if dtype == np.float32 else Kind.F16)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, data)


def test_an_unknown_type_is_said():
    with pytest.raises(NotImplementedError):
        dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[Kind.Q8_K][1]), np.uint8), Kind.Q8_K)
