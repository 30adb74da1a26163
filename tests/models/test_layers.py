"""Norms, embedding, mlp and rotary positions against formulas written here in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmos_jax.config import RopeConfig
from llmos_jax.models.layers import Embed, Mlp, Norm, out_std, parameter, rope_frequencies, rope_tables
from pallas_kernels import rotary
from tests import tiny

RNGS = nnx.Rngs(params=0)
X = jax.random.normal(jax.random.key(0), (2, 5, 16))


def fill(module: nnx.Module, seed: int = 1) -> dict[str, np.ndarray]:
    """Random values in every parameter of `module`; returns them in float64 by name."""
    rng, values = np.random.default_rng(seed), {}
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        value = rng.standard_normal(variable.get_value().shape).astype(np.float32)
        variable.set_value(jnp.asarray(value))
        values[str(path[-1])] = value.astype(np.float64)
        setattr(module, path[-1], variable)
    return values


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_norm(kind, offset):
    norm = Norm(tiny.model(norm=kind, norm_offset=offset, norm_eps=1e-3), RNGS)
    # a fresh norm multiplies by one
    y = np.asarray(X, np.float64)
    centred = y - y.mean(axis=-1, keepdims=True) if kind == "layernorm" else y
    unit = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(norm(X), unit, atol=1e-5)
    values = fill(norm)
    want = unit * (values["scale"] + offset) + values.get("bias", 0)
    np.testing.assert_allclose(norm(X), want, atol=1e-5)


def test_norm_computes_in_float32_and_keeps_the_dtype():
    norm = Norm(tiny.model(), RNGS)
    large = jnp.full((1, 1, 16), 300.0, jnp.float16)  # its square is beyond float16
    np.testing.assert_array_equal(norm(large), jnp.ones((1, 1, 16), jnp.float16))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_mlp(activation, gated, bias):
    mlp = Mlp(tiny.model(activation=activation, gated_mlp=gated, mlp_bias=bias), RNGS)
    w = fill(mlp)
    act = np.vectorize(
        {
            "silu": lambda x: x / (1 + math.exp(-x)),
            "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
            "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        }[activation]
    )
    x = np.asarray(X, np.float64)
    up = x @ w["up"] + w.get("up_bias", 0)
    hidden = act(x @ w["gate"]) * up if gated else act(up)
    want = hidden @ w["down"] + w.get("down_bias", 0)
    np.testing.assert_allclose(mlp(X), want, atol=1e-5 * np.abs(want).max())


def test_embedding_is_scaled_and_placed():
    embed = Embed(tiny.model(embed_scale=3.0, position="learned"), RNGS)
    w = fill(embed)
    tokens, positions = jnp.array([[3, 63, 0]]), jnp.array([[0, 1, 7]])
    np.testing.assert_allclose(
        embed(tokens, positions),
        w["table"][np.asarray(tokens)] * 3.0 + w["positions"][np.asarray(positions)],
        rtol=1e-6,
    )


def test_the_embedding_scale_is_rounded_to_the_compute_dtype():
    embed = Embed(tiny.model(embed_scale=math.sqrt(1152), dtype="bfloat16"), RNGS)
    embed.table.set_value(jnp.ones((64, 16)))
    assert np.unique(np.asarray(embed(jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.int32)), np.float32)) == 34.0


def test_fresh_parameters():
    config = tiny.model(num_layers=8, param_dtype="bfloat16")
    value = parameter(RNGS, config, (3,), (64, 128), ("embed", "mlp"), 0.02)
    assert value.get_value().shape == (3, 64, 128) and value.get_value().dtype == jnp.bfloat16
    assert value.get_metadata("logical") == ("layers", "embed", "mlp")
    assert float(jnp.std(value.get_value().astype(jnp.float32))) == pytest.approx(0.02, rel=0.02)
    assert not parameter(RNGS, config, (), (4,), ("norm",), 0.0).get_value().any()
    assert out_std(config) == 0.02 / 4  # 1 / sqrt(two projections in each of eight layers)


# Rotary positions.


def plain(head_dim: int, theta: float) -> list[float]:
    return [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]


def llama3(rope: RopeConfig, frequency: float) -> float:
    """By wavelength, as the Llama 3.1 release words it."""
    wavelength = 2 * math.pi / frequency
    if wavelength < rope.original_max_seq_len / rope.high_freq_factor:
        return frequency
    if wavelength > rope.original_max_seq_len / rope.low_freq_factor:
        return frequency / rope.factor
    smooth = (rope.original_max_seq_len / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    return (1 - smooth) * frequency / rope.factor + smooth * frequency


def yarn(rope: RopeConfig, head_dim: int, theta: float) -> list[float]:
    """arXiv:2309.00071, section 3.2, with the bounds of its released code."""

    def where(rotations: float) -> float:
        return (head_dim * math.log(rope.original_max_seq_len / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low, high = max(math.floor(where(rope.beta_fast)), 0), min(math.ceil(where(rope.beta_slow)), head_dim - 1)
    answer = []
    for i, frequency in enumerate(plain(head_dim, theta)):
        interpolated = min(max((i - low) / (high - low), 0.0), 1.0)
        answer.append(frequency / rope.factor * interpolated + frequency * (1 - interpolated))
    return answer


@pytest.mark.parametrize(("theta", "head_dim"), [(10_000.0, 64), (500_000.0, 128), (10_000.0, 2)])
def test_frequencies(theta, head_dim):
    def check(rope: RopeConfig, want: list[float], temperature: float = 1.0):
        got, factor = rope_frequencies(rope, head_dim, theta)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        assert got.dtype == np.float32 and factor == pytest.approx(temperature)

    unscaled = plain(head_dim, theta)
    check(RopeConfig(), unscaled)
    check(RopeConfig(scaling="linear", factor=8.0), [f / 8 for f in unscaled])
    rope = RopeConfig(scaling="llama3", factor=8.0, original_max_seq_len=8192)
    check(rope, [llama3(rope, f) for f in unscaled])
    rope = RopeConfig(scaling="yarn", factor=4.0, original_max_seq_len=4096)
    check(rope, yarn(rope, head_dim, theta), 0.1 * math.log(4) + 1)
    check(
        RopeConfig(scaling="yarn", factor=4.0, original_max_seq_len=4096, attention_factor=1.5),
        yarn(rope, head_dim, theta),
        1.5,
    )


def test_local_layers_keep_their_own_unscaled_base():
    """Gemma 3: the long-context scaling is for the global layers."""
    rope = RopeConfig(theta=1e6, local_theta=1e4, scaling="linear", factor=8.0)
    positions = jnp.arange(6)[None]

    def angles(local: bool):
        cos, sin = rope_tables(rope, 8, positions, local)
        assert cos.shape == (1, 6, 1, 4)
        return np.arctan2(sin, cos)[0, 1, 0]

    np.testing.assert_allclose(angles(local=True), plain(8, 1e4), rtol=1e-5)
    np.testing.assert_allclose(angles(local=False), np.array(plain(8, 1e6)) / 8, rtol=1e-5)
    same = RopeConfig(theta=1e6, scaling="linear", factor=8.0)  # without a base of their own they are scaled alike
    np.testing.assert_array_equal(rope_tables(same, 8, positions, True)[1], rope_tables(same, 8, positions, False)[1])


def test_rotation_turns_the_pairs_of_both_halves():
    """As complex numbers: x_i + j x_{i + H/2} is multiplied by exp(j position frequency_i)."""
    positions = jnp.array([[0, 5, 2], [1, 1, 9]])
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 8))
    turned = rotary(x, *rope_tables(RopeConfig(), 8, positions, local=False))
    angles = np.asarray(positions)[..., None, None] * np.array(plain(8, 10_000.0))
    x = np.asarray(x, np.float64)
    want = (x[..., :4] + 1j * x[..., 4:]) * np.exp(1j * angles)
    np.testing.assert_allclose(turned, np.concatenate([want.real, want.imag], axis=-1), atol=1e-5)


def test_scores_depend_on_the_distance_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(t: int, s: int) -> float:
        turned = [
            rotary(x, *rope_tables(RopeConfig(), 8, jnp.array([[at]], jnp.int32), local=False))
            for x, at in ((q, t), (k, s))
        ]
        return float(jnp.vdot(*turned))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(8, 3), abs=1e-3)


def test_bfloat16_inputs_are_turned_in_float32():
    x = jax.random.normal(jax.random.key(0), (1, 2, 1, 8)).astype(jnp.bfloat16)
    tables = rope_tables(RopeConfig(), 8, jnp.array([[0, 30_000]], jnp.int32), local=False)
    turned = rotary(x, *tables)
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(turned, rotary(x.astype(jnp.float32), *tables).astype(jnp.bfloat16))
