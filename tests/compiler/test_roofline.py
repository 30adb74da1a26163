"""FLOPs by hand and by XLA's own count."""

import functools

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_jax.compiler.roofline import attention_pairs, forward_flops, matmul_params, train_flops
from llmos_jax.models.decoder import abstract_params, forward_logits, num_params
from llmos_jax.models.presets import PRESETS
from pallas_kernels import native
from tests import tiny


def test_parameters_that_multiply_by_hand():
    """Two layers of q, k, v, o (16 x 4 x (2 * 8 + 2 * 8)) and mlp (3 * 16 * 32), and the head 16 x 64."""
    assert matmul_params(tiny.DENSE) == 2 * (2048 + 1536) + 1024
    assert matmul_params(tiny.model(gated_mlp=False)) == 2 * (2048 + 1024) + 1024
    # the second layer: 2 of 8 experts of 3 * 16 * 16, and the router
    assert matmul_params(tiny.MOE) == 2 * 2048 + 1536 + (2 * 768 + 16 * 8) + 1024
    assert matmul_params(tiny.model(tie_embeddings=True)) == matmul_params(tiny.DENSE)  # a tied head multiplies too


def test_a_published_model():
    """Llama 3 8B: all parameters but the embedding table and the norms; 6 FLOPs a token for each, and attention."""
    model = PRESETS["llama3-8b"]
    assert matmul_params(model) == num_params(model) - 128_256 * 4096 - 65 * 4096
    want = 6 * matmul_params(model) * 8192 + 12 * 32 * 4096 * 8192 * 8193 / 2
    assert train_flops(model, 8192) == pytest.approx(want)


@given(st.integers(1, 60), st.one_of(st.none(), st.integers(1, 80)))
def test_pairs_are_counted(seq_len, window):
    seen = sum(t - s < (window or seq_len) for t in range(seq_len) for s in range(t + 1))
    assert attention_pairs(seq_len, window) == seen


def test_the_formula_is_what_xla_counts(monkeypatch):
    """Wide enough that products are nearly all; without a mask XLA multiplies every pair. It does not count our kernels."""
    monkeypatch.setattr(native, "_native", lambda: native.Native("is left out"))
    model = tiny.model(embed_dim=128, head_dim=32, mlp_dim=256, vocab_size=512, num_layers=1, max_seq_len=64)
    run = jax.jit(functools.partial(forward_logits, model))
    tokens = jax.ShapeDtypeStruct((1, 64), "int32")
    counted = run.lower(abstract_params(model), tokens).compile().cost_analysis()["flops"]
    masked = 4 * 8 * 32 * (64 * 64 - attention_pairs(64, None))
    assert counted == pytest.approx(forward_flops(model, 64) + masked, rel=0.05)
