"""Every rule of a configuration, by the sentence that its user reads."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_jax.config import (
    MESH_AXES,
    RUNTIME_MODEL_FIELDS,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RopeConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
    UserError,
    check,
    mesh_shape,
    with_model,
)
from llmos_jax.models.presets import PRESETS


def refused(config: RunConfig, num_devices: int | None = None) -> str:
    with pytest.raises(UserError) as error:
        check(config, num_devices)
    return str(error.value)


MODEL_RULES = [
    ({"activation": "relu"}, "model.activation='relu' is not known; use one of silu, gelu_tanh, gelu"),
    ({"norm": "batch"}, "model.norm='batch' is not known; use one of rmsnorm, layernorm"),
    ({"position": "alibi"}, "model.position='alibi' is not known; use one of rope, learned"),
    ({"remat": "some"}, "model.remat='some' is not known; use one of none, full, dots, dots_no_batch, names"),
    (
        {"remat": "names", "remat_save": ("x",)},
        "model.remat_save='x' is not known; use one of input, q, k, v, attention, attention_out, gate, up, mlp_out",
    ),
    ({"remat_save": ("q",)}, "model.remat_save is set but model.remat=none; set model.remat=names"),
    ({"dtype": "int8"}, "model.dtype='int8' is not known; use one of float32, bfloat16, float16"),
    ({"param_dtype": "float64"}, "model.param_dtype='float64' is not known; use one of float32, bfloat16, float16"),
    (
        {"rope": RopeConfig(scaling="ntk")},
        "model.rope.scaling='ntk' is not known; use one of none, linear, llama3, yarn",
    ),
    ({"num_layers": 0}, "model.num_layers=0 must be at least 1"),
    ({"vocab_size": -5}, "model.vocab_size=-5 must be at least 1"),
    (
        {"num_heads": 6, "num_kv_heads": 4},
        "model.num_heads=6 is not a multiple of model.num_kv_heads=4; use num_kv_heads of 1, 2, 3, 6",
    ),
    ({"head_dim": 5}, "model.head_dim=5 is odd, and rotary positions turn pairs; use an even head_dim"),
    ({"layer_pattern": ()}, 'model.layer_pattern is empty; use ("global",)'),
    ({"layer_pattern": ("sparse",)}, "model.layer_pattern='sparse' is not known; use one of global, local"),
    (
        {"layer_pattern": ("local",)},
        "model.layer_pattern has local layers but model.sliding_window is not set; set it to the window's tokens",
    ),
    ({"rope": RopeConfig(scaling="yarn")}, "model.rope.scaling=yarn needs model.rope.original_max_seq_len"),
    (
        {"num_experts": 4, "num_experts_per_token": 5},
        "model.num_experts_per_token=5 must be between 1 and model.num_experts=4",
    ),
    ({"num_experts": 4, "gated_mlp": False}, "model.num_experts needs model.gated_mlp=True and model.mlp_bias=False"),
]

RUN_RULES = [
    (
        {"optimizer": OptimizerConfig("adam")},
        "optimizer.name='adam' is not known; use one of adamw, adafactor, lion, muon, sgd",
    ),
    (
        {"optimizer": OptimizerConfig(schedule="step")},
        "optimizer.schedule='step' is not known; use one of cosine, wsd, linear, constant",
    ),
    ({"optimizer": OptimizerConfig(learning_rate=0.0)}, "optimizer.learning_rate=0.0 must be above 0"),
    ({"optimizer": OptimizerConfig(learning_rate=math.nan)}, "optimizer.learning_rate=nan must be above 0"),
    (
        {"optimizer": OptimizerConfig(warmup_steps=200)},
        "optimizer.warmup_steps=200 is more than train.steps=100; lower it",
    ),
    ({"train": TrainConfig(objective="dpo")}, "train.objective='dpo' is not known; use one of causal_lm"),
    ({"train": TrainConfig(steps=0)}, "train.steps=0 must be at least 1"),
    (
        {"train": TrainConfig(batch_size=8, accumulate=3)},
        "train.accumulate=3 does not divide train.batch_size=8; use one of 1, 2, 4, 8",
    ),
    (
        {"train": TrainConfig(seq_len=4096)},
        "train.seq_len=4096 is longer than model.max_seq_len=2048; lower one or raise the other",
    ),
    ({"data": DataConfig(eval_fraction=1.0)}, "data.eval_fraction=1.0 must be in [0, 1)"),
    (
        {"data": DataConfig(eval_fraction=0.1, eval_sources=(SourceConfig("x"),))},
        "data.eval_fraction and data.eval_sources both name held-out text; set one of them",
    ),
    ({"data": DataConfig(sources=(SourceConfig(),))}, "source 0 has no path; set data.sources.0.path"),
    (
        {"data": DataConfig(sources=(SourceConfig("a.txt", weight=0.0),))},
        "source 'a.txt' has weight 0.0; use one above 0, or leave it out",
    ),
    (
        {"data": DataConfig(sources=(SourceConfig("a.txt", format="csv"),))},
        "format of 'a.txt'='csv' is not known; use one of auto, text, lines, jsonl, parquet",
    ),
    ({"checkpoint": CheckpointConfig(every=0)}, "checkpoint.every=0 must be at least 1"),
    ({"checkpoint": CheckpointConfig(keep=0)}, "checkpoint.keep=0 must be at least 1"),
    ({"log": LogConfig(every=0)}, "log.every=0 must be at least 1"),
]

MOE = {"num_experts": 6, "num_experts_per_token": 2}
MESH_RULES = [
    ({}, {"tensor": 16, "fsdp": 1}, "mesh.tensor=16 does not divide model.num_kv_heads=8; use one of 1, 2, 4, 8"),
    ({"vocab_size": 33}, {"tensor": 4}, "mesh.tensor=4 does not divide model.vocab_size=33; use one of 1, 3, 11, 33"),
    (
        {"mlp_dim": 30},
        {"tensor": 4},
        "mesh.tensor=4 does not divide model.mlp_dim=30; use one of 1, 2, 3, 5, 6, 10, 15, 30",
    ),
    (
        {**MOE, "moe_mlp_dim": 6},
        {"tensor": 4},
        "mesh.tensor=4 does not divide model.moe_mlp_dim=6; use one of 1, 2, 3, 6",
    ),
    ({"embed_dim": 12}, {"fsdp": 8}, "mesh.fsdp=8 does not divide model.embed_dim=12; put the rest on mesh.data"),
    (
        {},
        {"context": 3, "fsdp": 1},
        "mesh.context=3 does not divide train.seq_len=512; use one of 1, 2, 4, 8, 16, 32, 64",
    ),
    ({}, {"expert": 2}, "mesh.expert=2 does not divide model.num_experts=0; a dense model has mesh.expert=1"),
    (MOE, {"expert": 4}, "mesh.expert=4 does not divide model.num_experts=6; use one of 1, 2, 3, 6"),
    (
        {},
        {"data": 16, "fsdp": 1},
        "train.batch_size=8 in 1 micro-batches gives 8 sequences, which do not divide over mesh data x fsdp x expert = 16; "
        "use a batch_size that is a multiple of 16",
    ),
]


@pytest.mark.parametrize(("changes", "message"), MODEL_RULES, ids=lambda value: value if isinstance(value, str) else "")
def test_rules_of_a_model(changes, message):
    assert refused(RunConfig(model=ModelConfig(**changes))) == message


@pytest.mark.parametrize(("changes", "message"), RUN_RULES, ids=lambda value: value if isinstance(value, str) else "")
def test_rules_of_a_run(changes, message):
    assert refused(RunConfig(**changes)) == message


@pytest.mark.parametrize(
    ("model", "axes", "message"), MESH_RULES, ids=lambda value: value if isinstance(value, str) else ""
)
def test_rules_of_a_mesh(model, axes, message):
    config = RunConfig(model=ModelConfig(**model), mesh=MeshConfig(**{"fsdp": 1} | axes))
    check(config)  # no rule of a mesh is asked without devices
    assert refused(config, math.prod(axes.values())) == message


def test_what_is_no_use_is_not_asked_for():
    check(RunConfig(model=ModelConfig(head_dim=5, position="learned")))
    check(RunConfig(init_from="smollm2", train=TrainConfig(seq_len=100_000)))  # the pulled model has its own length
    moe = ModelConfig(**MOE, mlp_dim=33, moe_mlp_dim=8)
    check(RunConfig(model=moe, mesh=MeshConfig(fsdp=1, tensor=2)), 2)  # no layer has a dense mlp
    dense_first = dataclasses.replace(moe, num_dense_layers=1)
    assert "model.mlp_dim=33" in refused(RunConfig(model=dense_first, mesh=MeshConfig(fsdp=1, tensor=2)), 2)


def test_the_defaults_and_every_preset_pass():
    check(RunConfig(), 8)
    for model in PRESETS.values():
        check(RunConfig(model=model))


# The mesh.


@pytest.mark.parametrize(
    ("axes", "num_devices", "message"),
    [
        ({"data": -1, "fsdp": -1}, 8, "only one mesh axis may be -1, not data and fsdp"),
        ({"tensor": 0}, 8, "mesh.tensor=0 must be at least 1, or -1 for what is left"),
        (
            {"tensor": 3},
            8,
            "the mesh axes multiply to 3, which does not divide the 8 devices; use axes that multiply to 1, 2, 4, 8",
        ),
        (
            {"fsdp": 1, "tensor": 2},
            8,
            "the mesh axes multiply to 2 but there are 8 devices; set one axis to -1 to take what is left",
        ),
    ],
)
def test_meshes_that_do_not_fit(axes, num_devices, message):
    with pytest.raises(UserError) as error:
        mesh_shape(MeshConfig(**axes), num_devices)
    assert str(error.value) == message


@given(
    sizes=st.lists(st.sampled_from([1, 2, 3, 4]), min_size=5, max_size=5),
    free=st.one_of(st.none(), st.sampled_from(MESH_AXES)),
)
def test_the_free_axis_takes_what_is_left(sizes, free):
    given_sizes = dict(zip(MESH_AXES, sizes, strict=True))
    config = MeshConfig(**given_sizes | ({free: -1} if free else {}))
    assert mesh_shape(config, math.prod(sizes)) == given_sizes


# A pulled model.


def test_a_pulled_model_keeps_how_the_run_computes():
    run = RunConfig(model=ModelConfig(remat="full", dtype="bfloat16", num_layers=3))
    pulled = PRESETS["qwen3-8b"]
    got = with_model(run, pulled).model
    for field in dataclasses.fields(ModelConfig):
        source = run.model if field.name in RUNTIME_MODEL_FIELDS else pulled
        assert getattr(got, field.name) == getattr(source, field.name), field.name
