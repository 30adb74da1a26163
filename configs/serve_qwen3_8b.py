"""Qwen3 8B served on four chips of v6e, each layer split over all of them.

What:    weights in bfloat16, 4.1 GB a chip, and pages in bfloat16 in what is left of its 32 GB. 64 answers at once, each of
         1,024 tokens to a prompt of 1,024: the setup of the published runs.
Cost:    no training; the price of a million answered tokens is what the plan answers.
Command: llmos plan --program serve configs/serve_qwen3_8b.py --target v6e:2x2
Result:  see docs/planning.md.
"""

import dataclasses

from llmos_jax.config import MeshConfig, RunConfig, ServeConfig
from llmos_jax.models.presets import PRESETS


def get_config() -> RunConfig:
    return RunConfig(
        name="serve_qwen3_8b",
        model=dataclasses.replace(PRESETS["qwen3-8b"], dtype="bfloat16"),
        mesh=MeshConfig(fsdp=1, tensor=-1),
        serve=ServeConfig(max_model_len=2_048, max_sequences=64, max_step_tokens=1_024),
    )
