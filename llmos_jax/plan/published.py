"""Measured runs of other servers that a plan is shown beside, each as its authors published it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmos_jax.compiler.target import Target
from llmos_jax.config import ModelConfig
from llmos_jax.models.presets import PRESETS

if TYPE_CHECKING:
    from llmos_jax.plan.serving import Load


@dataclass(frozen=True)
class Published:
    """A closed loop of `users`. tokens_per_second: answered, by all chips. between_tokens: seconds."""

    server: str
    model: str  # as they call it
    preset: str  # the same shape
    chip: str
    num_chips: int
    users: int
    prompt: int
    answer: int
    tokens_per_second: float
    between_tokens: float


PUBLISHED = (
    Published("tpu-inference", "Llama-3.3-70B", "llama3-70b", "v6e", 8, 64, 1_024, 1_024, 2_495, 0.025),
    Published("sglang-jax", "Qwen3-8B", "qwen3-8b", "v6e", 4, 64, 1_024, 1_024, 5_297, 0.011),
)
_SHAPE = ("num_layers", "embed_dim", "num_heads", "num_kv_heads", "mlp_dim", "vocab_size", "num_experts")


def matching(model: ModelConfig, target: Target, load: "Load") -> list[Published]:
    """Those of this model's shape, chips and load."""

    def same(one: Published) -> bool:
        shapes = [[getattr(config, name) for name in _SHAPE] for config in (model, PRESETS[one.preset])]
        chips = (one.chip, one.num_chips) == (target.row.name, target.num_chips)
        return shapes[0] == shapes[1] and chips and (one.users, one.prompt, one.answer) == tuple(load)

    return [one for one in PUBLISHED if same(one)]
