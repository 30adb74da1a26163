"""Gemma 3 27B from scratch on 128 chips of v5p, split fully over them.

What:    all 27.0 G parameters, bfloat16 with float32 masters, AdamW; recomputed in the backward pass by periods of six
         layers, five of which see 1,024 tokens. Two sequences of 8,192 tokens a chip.
Cost:    47,700 steps, 100 G tokens; time and money are what the plan answers. No data is needed to plan; to train, set
         data.sources and data.tokenizer.
Command: llmos plan configs/gemma3_27b.py --target v5p:4x4x8
Result:  see docs/planning.md.
"""

import dataclasses

from llmos_jax.config import CheckpointConfig, OptimizerConfig, RunConfig, TrainConfig
from llmos_jax.models.presets import PRESETS


def get_config() -> RunConfig:
    return RunConfig(
        name="gemma3_27b",
        model=dataclasses.replace(PRESETS["gemma3-27b"], dtype="bfloat16", remat="full"),
        train=TrainConfig(steps=47_700, batch_size=256, seq_len=8_192),
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup_steps=500),
        checkpoint=CheckpointConfig(every=500),
    )
