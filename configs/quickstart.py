"""A small Llama that learns Python from the source text of the Python it runs on.

What:    7 M parameters (6 layers of 256, vocabulary 4,096 trained on the corpus) on the modules of the standard library,
         some 5 MB; one document in twenty is held out.
Cost:    120 steps of 4,096 tokens; about a minute and a half on 2 cores.
Command: llmos train configs/quickstart.py --workdir runs/quickstart
Result:  held-out loss falls from 8.4 nats a token (every token alike) to below 4.6.
"""

import sysconfig

from llmos_jax.config import (
    CheckpointConfig,
    CleanConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SourceConfig,
    TrainConfig,
)


def get_config() -> RunConfig:
    return RunConfig(
        name="quickstart",
        model=ModelConfig(
            vocab_size=4_096,
            num_layers=6,
            embed_dim=256,
            num_heads=4,
            num_kv_heads=2,
            head_dim=64,
            mlp_dim=768,
            max_seq_len=512,
            tie_embeddings=True,
        ),
        data=DataConfig(
            sources=(SourceConfig(f"{sysconfig.get_paths()['stdlib']}/*.py"),),
            eval_fraction=0.05,
            clean=CleanConfig(min_chars=200),
            tokenizer="train",
        ),
        train=TrainConfig(steps=120, batch_size=16, seq_len=256, eval_every=40, eval_batches=8),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=10, weight_decay=0.1),
        checkpoint=CheckpointConfig(every=40),
        log=LogConfig(every=5),
    )
