"""Qwen3 32B from scratch on one v6e pod of 256 chips, split fully over it.

What:    all 32.8 G parameters, bfloat16 with float32 masters, AdamW; every layer recomputed in the backward pass. One
         sequence of 8,192 tokens a chip: a v6e has 31 GiB.
Cost:    47,700 steps, 100 G tokens; time and money are what the plan answers. No data is needed to plan; to train, set
         data.sources and data.tokenizer.
Command: llmos plan configs/qwen3_32b.py --target v6e:16x16
Result:  see docs/planning.md.
"""

import dataclasses

from llmos_jax.config import CheckpointConfig, OptimizerConfig, RunConfig, TrainConfig
from llmos_jax.models.presets import PRESETS


def get_config() -> RunConfig:
    return RunConfig(
        name="qwen3_32b",
        model=dataclasses.replace(PRESETS["qwen3-32b"], dtype="bfloat16", remat="full"),
        train=TrainConfig(steps=47_700, batch_size=256, seq_len=8_192),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=500),
        checkpoint=CheckpointConfig(every=500),
    )
