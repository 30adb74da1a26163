"""A step over a mesh against the same step on one device: weights as they are served, split or not."""

import dataclasses

import jax
import numpy as np
import pytest

from llmos_jax.config import ServeConfig
from llmos_jax.serve import cache, forward
from llmos_jax.serve.weights import served_params
from llmos_jax.sharding import replicated
from tests import tiny

SERVE = ServeConfig(max_model_len=32, max_sequences=4, max_step_tokens=16, page_size=8, num_pages=8, kv_dtype="float32")
MODEL = tiny.model(dtype="float32", embed_dim=32, head_dim=128, mlp_dim=1024)


def logits(quantize: str, tensor: int) -> np.ndarray:
    """Of a prompt of eight tokens."""
    model, mesh = dataclasses.replace(MODEL, quantize=quantize), tiny.mesh(tensor=tensor)
    full = {path: jax.device_put(np.asarray(value), replicated(mesh)) for path, value in tiny.params(model).items()}
    params = served_params(model, full, mesh)
    shape = forward.shapes(model, SERVE, "tpu")[0]
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    pool = cache.abstract_pool(model, SERVE, mesh)
    program = forward.forward_program(model, shape, mesh, abstract, pool).compile()
    flat = np.zeros(shape.num_integers, np.int32)
    given = forward.split(shape, flat)
    given.tokens[:] = given.positions[:] = given.rows[:] = np.arange(8)
    given.adapter[:] = -1
    given.lengths[0] = given.starts[1:] = 8
    given.num_sequences[:] = 1
    given.block_tables[0] = np.arange(shape.table)
    last = jax.device_put(np.zeros(SERVE.max_sequences, np.int32), replicated(mesh))
    return np.asarray(program(params, cache.empty_pool(pool, None), last, flat, None)[0])


@pytest.mark.parametrize(("quantize", "tolerance"), [("none", 1e-4), ("int8", 0.05), ("int4", 1e-4)])
def test_a_step_over_eight_devices_gives_the_logits_of_one(quantize, tolerance):
    """int8 alone differs: each device rounds the activations that it has by a scale of its own."""
    one, eight = logits(quantize, 1), logits(quantize, 8)
    spread = np.abs(one).max()
    assert spread > 0.1 and np.abs(eight - one).max() < tolerance * spread
    assert (one.argmax(-1) == eight.argmax(-1)).mean() >= 0.75


def test_a_cpu_fills_up_less():
    serve = dataclasses.replace(SERVE, max_sequences=16, max_step_tokens=512)
    found = {platform: forward.shapes(MODEL, serve, platform) for platform in ("cpu", "tpu")}
    assert [shape.tokens for shape in found["tpu"]] == [8, 16, 32, 128, 512]
    assert [shape.tokens for shape in found["cpu"]] == [1, 8, 16, 32, 64, 128, 256, 512]
    assert {shape.rows for shape in found["cpu"]} == {8, 16}, "no more programs that draw"
