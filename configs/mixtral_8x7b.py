"""Mixtral 8x7B from scratch on 128 chips of v5p (v5p-256 in Google's count of cores), split fully over them.

What:    all 46.7 G parameters, of which a token meets 12.9 G; bfloat16 with float32 masters, AdamW; every layer
         recomputed in the backward pass. Four sequences of 8,192 tokens a chip; no token is dropped.
Cost:    23,800 steps, 100 G tokens; time and money are what the plan answers. No data is needed to plan; to train, set
         data.sources and data.tokenizer.
Command: llmos plan configs/mixtral_8x7b.py --target v5p:4x4x8
Result:  see docs/planning.md.
"""

import dataclasses

from llmos_jax.config import CheckpointConfig, OptimizerConfig, RunConfig, TrainConfig
from llmos_jax.models.presets import PRESETS


def get_config() -> RunConfig:
    return RunConfig(
        name="mixtral_8x7b",
        model=dataclasses.replace(PRESETS["mixtral-8x7b"], dtype="bfloat16", remat="full", router_aux_weight=0.02),
        train=TrainConfig(steps=23_800, batch_size=512, seq_len=8_192),
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=500),
        checkpoint=CheckpointConfig(every=500),
    )
