"""Llama 3.1 405B from scratch on 4,096 chips of v5p: the parameters split 2,048 ways, each layer in two.

What:    all 406 G parameters, bfloat16 with float32 masters, AdamW; every layer recomputed in the backward pass. 2,048
         sequences of 8,192 tokens, the 16 M tokens a step of the report (arXiv:2407.21783); so two chips
         share a sequence, and `tensor` splits the layers between them.
Cost:    6,000 steps, 100 G tokens; time and money are what the plan answers. No data is needed to plan; to train, set
         data.sources and data.tokenizer.
Command: llmos plan configs/llama3_405b.py --target v5p:16x16x16
Result:  see docs/planning.md.
"""

import dataclasses

from llmos_jax.config import CheckpointConfig, MeshConfig, OptimizerConfig, RunConfig, TrainConfig
from llmos_jax.models.presets import PRESETS


def get_config() -> RunConfig:
    return RunConfig(
        name="llama3_405b",
        model=dataclasses.replace(PRESETS["llama3.1-405b"], dtype="bfloat16", remat="full"),
        train=TrainConfig(steps=6_000, batch_size=2048, seq_len=8_192),
        optimizer=OptimizerConfig(learning_rate=8e-5, warmup_steps=500),
        mesh=MeshConfig(fsdp=2048, tensor=2),
        checkpoint=CheckpointConfig(every=500),
    )
