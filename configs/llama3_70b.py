"""Llama 3 70B from scratch on 512 chips of v5p, split fully over them.

What:    all 70.6 G parameters, bfloat16 with float32 masters, AdamW; every layer recomputed in the backward pass. Two
         sequences of 8,192 tokens a chip: 8.4 M tokens a step, within the 4 M to 16 M that the Llama 3 report names
         (arXiv:2407.21783).
Cost:    11,900 steps, 100 G tokens; time and money are what the plan answers. No data is needed to plan; to train, set
         data.sources and data.tokenizer.
Command: llmos plan configs/llama3_70b.py --target v5p:8x8x8
Result:  see docs/planning.md.
"""

import dataclasses

from llmos_jax.config import CheckpointConfig, OptimizerConfig, RunConfig, TrainConfig
from llmos_jax.models.presets import PRESETS


def get_config() -> RunConfig:
    return RunConfig(
        name="llama3_70b",
        model=dataclasses.replace(PRESETS["llama3-70b"], dtype="bfloat16", remat="full"),
        train=TrainConfig(steps=11_900, batch_size=1024, seq_len=8_192),
        optimizer=OptimizerConfig(learning_rate=1.5e-4, warmup_steps=500),
        checkpoint=CheckpointConfig(every=500),
    )
