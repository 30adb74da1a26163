"""Llama 3 8B from scratch on one v6e pod of 256 chips, split fully over it.

What:    all 8.03 G parameters, bfloat16 with float32 masters, AdamW; every layer recomputed in the backward pass. Three
         sequences of 8,192 tokens a chip, the batch of Google's published recipe for v6e-256.
Cost:    15,900 steps, 100 G tokens; time and money are what the plan answers. No data is needed to plan; to train, set
         data.sources and data.tokenizer.
Command: llmos plan configs/llama3_8b.py --target v6e:16x16
Result:  see docs/planning.md.
"""

import dataclasses

from llmos_jax.config import CheckpointConfig, OptimizerConfig, RunConfig, TrainConfig
from llmos_jax.models.presets import PRESETS


def get_config() -> RunConfig:
    return RunConfig(
        name="llama3_8b",
        model=dataclasses.replace(PRESETS["llama3-8b"], dtype="bfloat16", remat="full"),
        train=TrainConfig(steps=15_900, batch_size=768, seq_len=8_192),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=500),
        checkpoint=CheckpointConfig(every=500),
    )
