"""Every optimizer against its formula in numpy, and the schedules at the steps that matter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.config import OptimizerConfig
from llmos_jax.models.decoder import logical_dims
from llmos_jax.train.optimizer import is_matrix, make_optimizer, make_schedule
from tests import tiny

LOGICAL = {
    "embed.table": ("vocab", "embed"),
    "final_norm.scale": ("norm",),
    "head.kernel": ("embed", "vocab"),
    "segments.0.0.attention.o": ("layers", "heads", "head_dim", "embed"),
    "segments.0.0.mlp.up": ("layers", "embed", "mlp"),
    "segments.0.0.mlp.up_bias": ("layers", "mlp"),
}
SHAPES = {
    "embed.table": (8, 4),
    "final_norm.scale": (4,),
    "head.kernel": (4, 8),
    "segments.0.0.attention.o": (2, 2, 3, 4),
    "segments.0.0.mlp.up": (2, 4, 6),
    "segments.0.0.mlp.up_bias": (2, 6),
}
DECAYED = {"head.kernel", "segments.0.0.attention.o", "segments.0.0.mlp.up"}
LR, B1, B2, DECAY, STEPS = 0.1, 0.8, 0.9, 0.3, 3


def toy(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: rng.standard_normal(shape) for path, shape in SHAPES.items()}


def optimized(name: str, **changes) -> dict[str, np.ndarray]:
    """The toy after STEPS updates, each with other gradients."""
    settings = {
        "learning_rate": LR,
        "schedule": "constant",
        "b1": B1,
        "b2": B2,
        "weight_decay": DECAY,
        "clip_norm": 0.0,
    }
    optimizer = make_optimizer(OptimizerConfig(name, **settings | changes), 10, LOGICAL)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), toy(0))
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(STEPS):
        gradients = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), toy(step + 1))
        updates, state = update(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


def looped(rule) -> dict[str, np.ndarray]:
    """The same, one parameter at a time in float64; rule(memory, gradient, step) -> the direction to go against."""
    answer = {}
    for path, p in toy(0).items():
        memory: dict[str, np.ndarray] = {}
        for step in range(STEPS):
            direction = rule(memory, toy(step + 1)[path], step)
            p = p - LR * (direction + (DECAY * p if path in DECAYED else 0))
        answer[path] = p
    return answer


def adamw(memory, g, step):
    memory["m"] = B1 * memory.get("m", 0) + (1 - B1) * g
    memory["v"] = B2 * memory.get("v", 0) + (1 - B2) * g**2
    t = step + 1
    return memory["m"] / (1 - B1**t) / (np.sqrt(memory["v"] / (1 - B2**t)) + 1e-8)


def lion(memory, g, step):
    m = memory.get("m", 0)
    memory["m"] = B2 * m + (1 - B2) * g
    return np.sign(B1 * m + (1 - B1) * g)


def adafactor(memory, g, step):
    """arXiv:1804.04235, algorithm 4 with the update clipping of section 6; too small to be factored."""
    decay = 1 - (step + 1) ** -0.8
    memory["v"] = decay * memory.get("v", 0) + (1 - decay) * (g**2 + 1e-30)
    u = g / np.sqrt(memory["v"])
    return u / max(1, np.sqrt(np.mean(u**2)))


@pytest.mark.compat
@pytest.mark.parametrize("rule", [adamw, lion, adafactor], ids=lambda rule: rule.__name__)
def test_equals_its_formula(rule):
    """Weight decay is decoupled, scaled by the learning rate, and for matrices only."""
    got = optimized(rule.__name__)
    for path, want in looped(rule).items():
        np.testing.assert_allclose(got[path], want, rtol=2e-4, atol=1e-5, err_msg=path)


def test_sgd_with_momentum():
    got = optimized("sgd")
    for path, p in toy(0).items():
        m = 0
        for step in range(STEPS):
            m = B1 * m + toy(step + 1)[path] + (DECAY * p if path in DECAYED else 0)
            p = p - LR * m
        np.testing.assert_allclose(got[path], p, rtol=1e-4, atol=1e-5, err_msg=path)


def test_adafactor_keeps_a_row_and_a_column_of_a_large_matrix():
    logical, rng = {"head.kernel": ("embed", "vocab")}, np.random.default_rng(0)
    settings = OptimizerConfig("adafactor", learning_rate=LR, schedule="constant", weight_decay=0.0, clip_norm=0.0)
    optimizer = make_optimizer(settings, 10, logical)
    p, g = rng.standard_normal((2, 128, 256))
    params = {"head.kernel": jnp.asarray(p, jnp.float32)}
    state = optimizer.init(params)
    assert max(leaf.size for leaf in jax.tree.leaves(state)) == 256
    updates, _ = optimizer.update({"head.kernel": jnp.asarray(g, jnp.float32)}, state, params)
    rows, columns = (g**2).mean(axis=1, keepdims=True), (g**2).mean(axis=0, keepdims=True)
    u = g / np.sqrt(rows * columns / rows.mean())
    want = -LR * u / max(1, np.sqrt(np.mean(u**2)))
    np.testing.assert_allclose(updates["head.kernel"], want, rtol=1e-4, atol=1e-6)


def test_muon_turns_gradients_into_orthogonal_steps():
    """First step, arXiv:2502.16982: U S Vᵀ becomes about 0.2 sqrt(max(in, out)) U Vᵀ for each layer by itself; heads are
    joined with their dimension. What is no matrix of a layer takes Adam's step, with the Nesterov momentum of optax."""
    settings = OptimizerConfig(
        "muon", learning_rate=LR, schedule="constant", b1=B1, b2=B2, weight_decay=0.0, clip_norm=0.0
    )
    optimizer = make_optimizer(settings, 10, LOGICAL)
    params, gradients = ({k: jnp.asarray(v, jnp.float32) for k, v in toy(seed).items()} for seed in (0, 1))
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    for path, (inputs, outputs) in {"segments.0.0.attention.o": (6, 4), "segments.0.0.mlp.up": (4, 6)}.items():
        for layer in range(2):
            g, step = (np.asarray(x[path][layer], np.float64).reshape(inputs, outputs) for x in (gradients, updates))
            u, _, vt = np.linalg.svd(g, full_matrices=False)
            turned = -u.T @ step @ vt.T / (LR * 0.2 * np.sqrt(max(inputs, outputs)))
            np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=2e-3)
            assert ((np.diag(turned) > 0.6) & (np.diag(turned) < 1.3)).all()  # what five Newton-Schulz steps reach
    for path in ("embed.table", "final_norm.scale", "head.kernel", "segments.0.0.mlp.up_bias"):
        ahead = B1 * (1 - B1) / (1 - B1**2) + 1
        np.testing.assert_allclose(updates[path], -LR * ahead * np.sign(gradients[path]), rtol=1e-3)


def test_gradients_are_clipped_by_their_global_norm():
    """SGD without momentum moves by lr * g * min(1, clip / |g|)."""
    settings = {"name": "sgd", "learning_rate": 1.0, "schedule": "constant", "b1": 0.0, "weight_decay": 0.0}
    params = {path: jnp.zeros(shape) for path, shape in SHAPES.items()}
    gradients = {path: jnp.asarray(g, jnp.float32) for path, g in toy(1).items()}
    norm = np.sqrt(sum(np.sum(g**2) for g in toy(1).values()))
    for clip, scale in [(0.5, 0.5 / norm), (norm * 2, 1.0), (0.0, 1.0)]:
        optimizer = make_optimizer(OptimizerConfig(**settings, clip_norm=clip), 10, LOGICAL)
        updates, _ = optimizer.update(gradients, optimizer.init(params), params)
        for path, g in toy(1).items():
            np.testing.assert_allclose(updates[path], -scale * g, rtol=1e-5)


def test_what_counts_as_a_matrix():
    config = tiny.model(tiny.MOE, position="learned", norm="layernorm", qkv_bias=True, qk_norm=True)
    matrices = {path.split(".")[-1] for path, dims in logical_dims(config).items() if is_matrix(path, dims)}
    assert matrices == {"q", "k", "v", "o", "gate", "up", "down", "router", "kernel"}
    assert not is_matrix("embed.positions", ("norm", "embed"))


# Schedules.


def rates(steps: int, at: list[int], **changes) -> list[float]:
    schedule = make_schedule(OptimizerConfig(learning_rate=1.0, final_ratio=0.1, **changes), steps)
    return [float(schedule(step)) for step in at]


def test_warm_up_moves_from_the_first_step():
    for schedule in ("cosine", "linear", "wsd", "constant"):
        assert rates(100, [0, 1, 3, 4], schedule=schedule, warmup_steps=4)[:3] == pytest.approx([0.25, 0.5, 1.0])
        assert rates(100, [0, 1], schedule=schedule, warmup_steps=1)[0] == pytest.approx(1.0)
        assert rates(100, [0], schedule=schedule) == pytest.approx([1.0])


def test_cosine():
    """Half way down at half of the steps after warm-up, the final ratio at the end and for ever."""
    assert rates(104, [4, 29, 54, 104, 500], schedule="cosine", warmup_steps=4) == pytest.approx(
        [1.0, 0.1 + 0.9 * (1 + np.cos(np.pi / 4)) / 2, 0.55, 0.1, 0.1]
    )


def test_linear():
    assert rates(104, [4, 54, 104, 500], schedule="linear", warmup_steps=4) == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_wsd_stays_at_the_peak_and_falls_at_the_end():
    got = rates(100, [10, 79, 80, 90, 100], schedule="wsd", warmup_steps=10, decay_steps=20)
    assert got == pytest.approx([1.0, 1.0, 1.0, 0.55, 0.1])
    assert rates(100, [89, 95, 100], schedule="wsd") == pytest.approx([1.0, 0.55, 0.1])  # a tenth of the run
    assert rates(20, [10, 15, 20], schedule="wsd", warmup_steps=10, decay_steps=50) == pytest.approx([1.0, 0.55, 0.1])


def test_constant():
    assert rates(100, [3, 50, 500], schedule="constant", warmup_steps=3) == pytest.approx([1.0, 1.0, 1.0])


def test_a_run_of_warm_up_only():
    assert rates(4, [0, 3], schedule="cosine", warmup_steps=4) == pytest.approx([0.25, 1.0])
