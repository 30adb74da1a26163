"""What a served model is computed in."""

from types import SimpleNamespace

import pytest

from llmos_jax import opening
from llmos_jax.config import ServeConfig
from llmos_jax.serve import models
from llmos_jax.serve.models import ServedModel
from tests import tiny


@pytest.mark.parametrize(
    ("platform", "quantize", "dtype", "expected"),
    [
        ("cpu", "none", "", ("bfloat16", "bfloat16", "bfloat16")),
        ("cpu", "int8", "", ("float32", "bfloat16", "bfloat16")),  # products take int8 anyway; pages stay small
        ("cpu", "int8", "float32", ("float32", "float32", "float32")),
        ("cpu", "int8", "bfloat16", ("bfloat16", "bfloat16", "bfloat16")),
        ("tpu", "int8", "", ("bfloat16", "bfloat16", "bfloat16")),
    ],
)
def test_dtypes(monkeypatch, platform, quantize, dtype, expected):
    monkeypatch.setattr(opening, "find", lambda reference: SimpleNamespace(model=tiny.DENSE))
    monkeypatch.setattr(models, "default_dtype", lambda platform: "bfloat16")
    found = models.resolve(ServedModel("m", "somewhere", ServeConfig(), dtype, quantize), platform)
    assert (found.model.dtype, found.model.param_dtype, found.serve.kv_dtype) == expected
