"""Qwen3 235B-A22B from scratch on 256 chips of TPU7x, which are 512 devices, split fully over them.

What:    all 235 G parameters, of which a token meets 22 G (8 of 128 experts); bfloat16 with float32 masters,
         AdamW; every layer recomputed in the backward pass. Two sequences of 8,192 tokens a device; no token is
         dropped.
Cost:    11,900 steps, 100 G tokens; time and money are what the plan answers. No data is needed to plan; to train, set
         data.sources and data.tokenizer.
Command: llmos plan configs/qwen3_235b.py --target tpu7x:4x8x8
Result:  see docs/planning.md.
"""

import dataclasses

from llmos_jax.config import CheckpointConfig, OptimizerConfig, RunConfig, TrainConfig
from llmos_jax.models.presets import PRESETS


def get_config() -> RunConfig:
    return RunConfig(
        name="qwen3_235b",
        model=dataclasses.replace(PRESETS["qwen3-235b-a22b"], dtype="bfloat16", remat="full", router_aux_weight=0.001),
        train=TrainConfig(steps=11_900, batch_size=1024, seq_len=8_192),
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=500),
        checkpoint=CheckpointConfig(every=500),
    )
