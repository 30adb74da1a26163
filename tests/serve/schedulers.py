"""A scheduler without an engine, and how a test drives it."""

import itertools

from llmos_jax.serve.block_manager import BlockManager
from llmos_jax.serve.limits import Limits
from llmos_jax.serve.request import Request, Sampling
from llmos_jax.serve.scheduler import Scheduler

SERIAL = itertools.count()
SAMPLING = {"max_tokens", "min_tokens", "stop_ids", "prompt_logprobs", "presence_penalty"}


def scheduler(num_blocks=64, block_size=4, host=0, costs=None, clock=lambda: 0.0, **limits):
    limits = {"max_tokens": 16, "max_rows": 16, "max_sequences": 4, "max_model_len": 64} | limits
    return Scheduler(Limits(**limits), BlockManager(num_blocks, block_size, host), costs, clock)


def request(prompt=4, id=None, **given):
    """prompt: its length, of tokens that no other request has, or the tokens."""
    number = next(SERIAL)
    tokens = tuple(range(1000 * number, 1000 * number + prompt)) if isinstance(prompt, int) else tuple(prompt)
    sampling = Sampling(**({"max_tokens": 8} | {name: given.pop(name) for name in SAMPLING & set(given)}))
    given.setdefault("arrival", float(number))
    return Request(id or f"r{number}", tokens, sampling, **given)


def take(s, step, token=7):
    """Takes in a step that drew `token` everywhere."""
    return [s.advance(chunk, [token] * chunk.num_rows) for chunk in step.chunks]


def run(s, token=7, most=1000):
    """Drives it to the end."""
    for _ in range(most):
        if not s.has_work:
            return
        take(s, s.schedule(), token)
    raise AssertionError("no end")


def shape(step):
    return [(c.sequence.request.id, c.start, c.num_tokens, c.num_drafts, c.num_rows) for c in step.chunks]
