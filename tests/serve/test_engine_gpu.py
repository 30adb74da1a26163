"""The engine on a GPU: the answers of one sequence alone, in any mixture. Run by scripts/gpu_check.sh."""

import dataclasses

import numpy as np
import pytest

from llmos_jax.models.generate import Generator
from tests import tiny
from tests.serve import engines
from tests.serve.engines import drive, request, tokens

pytestmark = pytest.mark.gpu

MODEL = tiny.model(max_seq_len=128, embed_dim=128, mlp_dim=256, head_dim=64, num_kv_heads=4)
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, MODEL.vocab_size, n).tolist() for n in (3, 17, 40, 9, 26, 5)]


@pytest.mark.parametrize("num_pages", [96, 14])
def test_answers_are_those_of_one_sequence_alone(num_pages):
    generator = Generator(MODEL, tiny.params(MODEL), tiny.mesh())
    alone = {(str(i), 0): list(generator(prompt, 12)) for i, prompt in enumerate(PROMPTS)}
    wanted = [request(str(i), prompt) for i, prompt in enumerate(PROMPTS)]
    assert tokens(drive(engines.engine(engines.runner(MODEL), num_pages=num_pages, chunk=7), wanted, every=2)) == alone


@pytest.mark.parametrize(
    ("change", "limit"), [({"dtype": "bfloat16"}, 0.2), ({"quantize": "int8"}, 0.2), ({"quantize": "int4"}, 1.2)]
)
def test_narrow_weights_give_nearly_the_same_probabilities(change, limit):
    """A model this small is moved by 0.9 in four bits on a CPU too."""
    exact, narrow = engines.runner(MODEL), engines.runner(dataclasses.replace(MODEL, **change))
    wanted = [request(str(i), prompt, logprobs=0) for i, prompt in enumerate(PROMPTS)]
    one, other = (drive(engines.engine(built), wanted) for built in (exact, narrow))
    for key in one:
        assert abs(one[key][0].logprobs[0].logprob - other[key][0].logprobs[0].logprob) < limit
