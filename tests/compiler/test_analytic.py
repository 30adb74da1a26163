"""Memory and time by formula, against hand calculations and against what the program itself holds."""

import dataclasses
import math
import re
from pathlib import Path

import jax
import pytest

from llmos_jax.compiler.analytic import training_memory, training_time
from llmos_jax.compiler.analytic_serving import cache_bytes, decode_time, prefill_time
from llmos_jax.compiler.chips import CHIPS, Chip
from llmos_jax.compiler.interconnect import AxisLinks, Span
from llmos_jax.compiler.roofline import train_flops, weights
from llmos_jax.compiler.target import Target
from llmos_jax.config import MESH_AXES, OptimizerConfig, RunConfig, TrainConfig, UserError, check, mesh_shape
from llmos_jax.models.decoder import num_params
from llmos_jax.models.presets import PRESETS
from llmos_jax.overrides import load_config
from llmos_jax.train.step import abstract_state
from tests import tiny

LLAMA = dataclasses.replace(PRESETS["llama3-8b"], dtype="bfloat16", remat="full")
GIB = 2**30
ROOT = Path(__file__).parents[2]


def sizes(**axes: int) -> dict[str, int]:
    return {axis: axes.get(axis, 1) for axis in MESH_AXES}


def run(model=LLAMA, batch_size=8, seq_len=8192, accumulate=1, optimizer="adamw", **changes) -> RunConfig:
    return RunConfig(
        model=dataclasses.replace(model, **changes),
        train=TrainConfig(batch_size=batch_size, seq_len=seq_len, accumulate=accumulate),
        optimizer=OptimizerConfig(name=optimizer),
    )


def links(bandwidth: float = 100e9, **axes: int) -> dict[str, AxisLinks]:
    """Every axis behind a switch of its own, without latency."""
    return {
        axis: AxisLinks(axis, size, (Span("switch", size, bandwidth=bandwidth),), bandwidth, bandwidth, 0.0)
        for axis, size in sizes(**axes).items()
    }


def held(tree) -> int:
    """Bytes that one device holds of a tree of abstract arrays."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# Parameters and optimizer state: the program's own arrays are the truth.


@pytest.mark.parametrize("name", PRESETS)
def test_every_parameter_is_counted(name):
    assert sum(weight.size for weight in weights(PRESETS[name])) == num_params(PRESETS[name])


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon", "sgd", "adafactor"])
@pytest.mark.parametrize(
    ("base", "axes"),
    [
        (tiny.DENSE, {"fsdp": 2, "tensor": 4}),
        (tiny.DENSE, {"data": 2, "context": 2, "fsdp": 2}),
        (tiny.MOE, {"fsdp": 2, "expert": 4}),
        (tiny.model(embed_dim=128, mlp_dim=256, vocab_size=512, tie_embeddings=True, qk_norm=True), {"fsdp": 8}),
    ],
)
def test_state_is_what_the_program_holds(optimizer, base, axes):
    config = run(base, 8, 16, optimizer=optimizer)
    state = abstract_state(config, tiny.mesh(**axes))
    memory = training_memory(config, sizes(**axes), CHIPS["v5p"])
    assert memory.parameters == held(state.params)
    # counters and the norms' moments, which adafactor keeps beside a dummy, are a few hundred bytes
    assert memory.optimizer == pytest.approx(held(state.opt_state), rel=0.02, abs=512)


def test_adamw_of_llama_on_a_pod_by_hand():
    """8.03e9 parameters of 4 bytes over 256 chips, twice that for moments, once for gradients."""
    memory = training_memory(run(batch_size=512), sizes(fsdp=256), CHIPS["v5p"])
    assert memory.parameters == pytest.approx(8.03e9 * 4 / 256, rel=1e-2)  # norms are not split
    assert memory.optimizer == pytest.approx(2 * memory.parameters) and memory.gradients == memory.parameters
    # full recomputation keeps the stream: 32 layers x 2 sequences x 8192 tokens x 4096 x 2 bytes
    assert memory.activations == 32 * 2 * 8192 * 4096 * 2 == 4 * GIB
    assert memory.batch == 2 * 8192 * 5 * 4
    assert memory.total == sum(vars(memory).values())


# What each choice does to memory.


def test_recomputation_trades_memory():
    kept = {
        remat: training_memory(run(remat=remat), sizes(fsdp=8), CHIPS["v5p"]).activations
        for remat in ("full", "dots", "none")
    }
    assert kept["full"] < kept["dots"] < kept["none"]
    # dots, a token and layer: q, k, v (32 + 16) x 128, out 4096, gate and up 2 x 14336, down 4096
    assert kept["dots"] - kept["full"] == 32 * 8192 * 2 * (48 * 128 + 2 * 4096 + 2 * 14336)


@pytest.mark.parametrize(("axis", "share"), [("tensor", 8), ("context", 8), ("fsdp", 8)])
def test_an_axis_splits_what_is_kept(axis, share):
    one = training_memory(run(), sizes(), CHIPS["v5p"])
    split = training_memory(run(), sizes(**{axis: share}), CHIPS["v5p"])
    assert split.activations == pytest.approx(one.activations / share)
    assert (split.parameters == one.parameters) == (axis == "context")


def test_accumulation_keeps_float32_sums():
    """A micro-batch has a quarter of the activations; its gradients are beside their sum."""
    whole = training_memory(run(), sizes(fsdp=2), CHIPS["v5p"])
    parts = training_memory(run(accumulate=4), sizes(fsdp=2), CHIPS["v5p"])
    assert parts.activations == whole.activations / 4 and parts.gradients == 2 * whole.gradients
    assert parts.batch == whole.batch


@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/*.py")), ids=lambda file: file.stem)
def test_a_configuration_that_names_a_target_fits_it(file):
    named = re.search(r"--target (\S+)", file.read_text())
    if named is None or "--program serve" in file.read_text():
        pytest.skip("it names no target to train on")
    target, config = Target.parse(named[1]), load_config(file)
    check(config, target.num_devices)
    memory = training_memory(config, mesh_shape(config.mesh, target.num_devices), target.chip)
    assert memory.fits(target.chip)


def test_what_does_not_fit():
    config = run(batch_size=1)
    assert not training_memory(config, sizes(), CHIPS["v5e"]).fits(CHIPS["v5e"])
    assert training_memory(run(), sizes(fsdp=8), CHIPS["v5p"]).fits(CHIPS["v5p"])


# Time.


def test_arithmetic_by_hand():
    """Without recomputation on one chip: 6 FLOPs a token and parameter at the share of the peak;
    attention with 2 + 5 products of T^2/2 pairs."""
    target, model = Target.parse("v5p:1x1x1"), dataclasses.replace(LLAMA, remat="none")
    time = training_time(run(model, batch_size=1), sizes(), target, links())
    chip = target.chip
    products = 6 * (8.03e9 - 128_256 * 4096) * 8192 / (459e12 * chip.matmul_share)
    attention = 3.5 * 4 * 32 * 128 * 32 * 8192**2 / 2 / (459e12 * chip.attention_share)
    assert time.compute == pytest.approx(products + attention, rel=1e-3)
    assert time.recompute == 0 and set(time.communication.values()) == {0.0}
    assert time.step == pytest.approx(time.compute + time.optimizer, rel=1e-6)
    # every byte of parameters, moments and gradients: 3 + 4 times 4 bytes
    assert time.optimizer == pytest.approx(7 * 4 * 8.03e9 / (2765e9 * 0.85), rel=1e-3)
    assert time.mfu == pytest.approx(train_flops(model, 8192) / time.step / 459e12)
    assert time.tokens_per_second_per_chip == pytest.approx(8192 / time.step)


def test_recomputation_by_hand():
    """full: the layers' forward pass once more but the last product, 2 FLOPs a token and parameter; names: less what
    is kept; dots: attention only."""
    target, chip = Target.parse("v5p:1x1x1"), CHIPS["v5p"]
    layers = num_params(LLAMA) - 2 * 128_256 * 4096
    attention = 4 * 32 * 128 * 32 * 8192**2 / 2 / (459e12 * chip.attention_share)
    full = training_time(run(batch_size=1), sizes(), target, links()).recompute
    dots = training_time(run(batch_size=1, remat="dots"), sizes(), target, links()).recompute
    names = run(batch_size=1, remat="names", remat_save=("gate", "attention"))
    named = training_time(names, sizes(), target, links()).recompute
    assert full - named == pytest.approx(
        2 * 32 * 4096 * 14336 * 8192 / (459e12 * chip.matmul_share) + attention, rel=1e-3
    )
    assert training_memory(names, sizes(), CHIPS["v5p"]).activations == 32 * 8192 * 2 * (4096 + 14336 + 4096)
    layers -= 32 * 4096 * 14336
    assert full == pytest.approx(2 * layers * 8192 / (459e12 * chip.matmul_share) + attention, rel=1e-3)
    assert dots == pytest.approx(attention, rel=1e-3)


def test_communication_by_hand():
    """fsdp 8 over 100 GB/s: bfloat16 weights gathered twice (head and table once), gradients scattered once, 7/8 of
    each moved."""
    target = Target.parse("v5p:2x2x2")
    time = training_time(run(), sizes(fsdp=8), target, links(fsdp=8))
    outside = 2 * 128_256 * 4096
    layers = num_params(LLAMA) - outside
    assert time.communication["fsdp"] == pytest.approx((3 * layers + 2 * outside) * 2 * 7 / 8 / 100e9, rel=1e-3)
    assert time.exposed["fsdp"] == 0  # 0.5 s beside 2 s of arithmetic
    slow = training_time(run(), sizes(fsdp=8), target, links(bandwidth=1e9, fsdp=8))
    assert slow.exposed["fsdp"] == pytest.approx(slow.communication["fsdp"] - slow.compute, rel=0.01)


def test_tensor_communication_is_waited_for():
    """Two gathers and two sums of the stream a layer, forward, recomputed and backward."""
    target = Target.parse("v5p:2x2x2")
    time = training_time(run(), sizes(tensor=8), target, links(tensor=8))
    stream = 8 * 8192 * 4096 * 2
    assert time.exposed["tensor"] == time.communication["tensor"]
    assert time.exposed["tensor"] == pytest.approx(32 * 3 * 4 * stream * 7 / 8 / 100e9)
    assert time.communication["fsdp"] == 0.0


def test_experts_are_reached_by_gathering_tokens():
    target, model = Target.parse("v5p:2x2x1"), dataclasses.replace(PRESETS["mixtral-8x7b"], dtype="bfloat16")
    time = training_time(run(model, 4, 4096), sizes(expert=4), target, links(expert=4))
    tokens = 4 * 4096 * 4096 * 2 * 3 / 4 / 100e9  # gathered by four chips
    replicated = (num_params(model) - 32 * 8 * 3 * 4096 * 14336) * 2 * 2 * 3 / 4 / 100e9  # gradients of all but experts
    assert time.communication["expert"] == pytest.approx(32 * 2 * 2 * tokens + replicated, rel=1e-3)


def test_sorting_by_expert_by_hand():
    """Mixtral: 32 layers x 4,096 tokens x 2 choices x (4 x 4,096 + 6 x 14,336) elements of 2 bytes, forward and twice
    that backward."""
    model = dataclasses.replace(PRESETS["mixtral-8x7b"], dtype="bfloat16", remat="none")
    time = training_time(run(model, 1, 4096), sizes(), Target.parse("v5p:1x1x1"), links())
    assert time.sorting == pytest.approx(32 * 4096 * 2 * (16_384 + 86_016) * 2 * 3 / (2765e9 * 0.85))
    assert training_time(run(), sizes(), Target.parse("v5p:1x1x1"), links()).sorting == 0.0


def test_a_model_does_not_change_what_a_chip_reaches():
    """Without recomputation or attention to speak of, every model computes at the same share of the peak."""
    target = Target.parse("v5p:1x1x1")
    for name in ("llama3-8b", "qwen3-32b", "mixtral-8x7b"):
        model = dataclasses.replace(PRESETS[name], dtype="bfloat16", remat="none")
        time = training_time(run(model, 64, 128), sizes(), target, links())
        done = train_flops(model, 128) * 64
        assert done / time.compute / 459e12 == pytest.approx(CHIPS["v5p"].matmul_share, rel=0.01)


def test_a_chip_without_peaks_is_refused():
    target = dataclasses.replace(Target.parse("h100:1"), row=Chip("NVIDIA RTX 3090", "NVIDIA RTX 3090", "gpu"))
    with pytest.raises(UserError, match="no peaks are known for a NVIDIA RTX 3090"):
        training_time(run(), sizes(), target, links())


# Serving.


def test_cache_by_hand():
    """Llama-3-70B: 80 layers x 2 x 8 heads x 128 x 2 bytes = 327,680 bytes a token."""
    model = dataclasses.replace(PRESETS["llama3-70b"], dtype="bfloat16")
    assert cache_bytes(model, 1, 1) == 327_680
    assert cache_bytes(model, 64, 2048) == 64 * 2048 * 327_680


def test_decoding_reads_everything_once():
    """The scaling book's bound: (weights + cache) / bandwidth, here at the share that is reached."""
    model = dataclasses.replace(PRESETS["llama3-70b"], dtype="bfloat16")
    target = Target.parse("v6e:2x4")
    time = decode_time(model, sizes(tensor=8), target, 64, 1536, links(tensor=8))
    weights_read = (num_params(model) - 128_256 * 8192) * 2
    assert time.memory == pytest.approx((weights_read + 64 * 1536 * 327_680) / 8 / (1638e9 * 0.85), rel=1e-3)
    assert time.communication == pytest.approx(2 * 80 * 2 * 64 * 8192 * 2 * 7 / 8 / 100e9)
    assert time.seconds == time.memory + time.communication and time.tokens == 64  # memory-bound
    assert time.tokens_per_second == pytest.approx(64 / time.seconds)


def test_decoding_reads_the_chosen_experts():
    model = dataclasses.replace(PRESETS["mixtral-8x7b"], dtype="bfloat16")
    target = Target.parse("v5p:1x1x1")
    one, many = (decode_time(model, sizes(), target, batch, 1, links()).memory for batch in (1, 256))
    experts = sum(weight.size for weight in weights(model) if weight.part == "experts")
    assert (many - one) * 2765e9 * 0.85 == pytest.approx(experts * 2 * 0.75, rel=1e-2)  # two of eight, and all


def test_prefill_is_arithmetic():
    model = dataclasses.replace(LLAMA, dtype="bfloat16")
    time = prefill_time(model, sizes(), Target.parse("v5p:1x1x1"), 1, 8192, links())
    layers = num_params(model) - 2 * 128_256 * 4096
    attention = 4 * 32 * 128 * 32 * 8192**2 / 2 / CHIPS["v5p"].attention_share
    assert time.seconds == pytest.approx((2 * layers * 8192 / CHIPS["v5p"].matmul_share + attention) / 459e12, rel=1e-2)


def test_a_window_bounds_what_is_read():
    """Gemma 3: of 62 layers 10 see everything, the others 1,024 tokens."""
    model = dataclasses.replace(PRESETS["gemma3-27b"], dtype="bfloat16")
    target = Target.parse("v5p:1x1x1")
    short, long = (decode_time(model, sizes(), target, 1, length, links()).memory for length in (32_768, 65_536))
    assert (long - short) * 2765e9 * 0.85 == pytest.approx(10 * 2 * 16 * 128 * 2 * 32_768, rel=1e-6)
