"""The objective against the full logits in float64."""

import dataclasses

import jax
import numpy as np
import pytest

from llmos_jax.config import TrainConfig, UserError
from llmos_jax.models.decoder import bind
from llmos_jax.train.objectives import causal_lm, objective
from tests import tiny

CONFIGS = {
    "dense": tiny.run(tiny.DENSE, batch_size=3, z_loss=0.01),
    "tied": tiny.run(tiny.model(tie_embeddings=True, logit_softcap=2.0), batch_size=3),
    "moe": tiny.run(tiny.MOE, batch_size=3),
}


def logits_of(config, params, batch) -> np.ndarray:
    model = bind(config.model, params)
    return np.asarray(model.logits(model(batch["tokens"], batch["positions"], batch["segment_ids"]).hidden), np.float64)


@pytest.mark.parametrize("name", CONFIGS)
def test_sums_over_the_tokens_that_count(name):
    config = CONFIGS[name]
    params, batch = tiny.params(config.model), jax.tree.map(jax.numpy.asarray, tiny.batch(config))
    sums = jax.jit(lambda p, b: causal_lm(config, p, b))(params, batch)
    logits, mask = logits_of(config, params, batch), np.asarray(batch["loss_mask"])
    lse = np.log(np.exp(logits).sum(axis=-1))
    nll = lse - np.take_along_axis(logits, np.asarray(batch["targets"])[..., None], axis=-1)[..., 0]
    assert float(sums.tokens) == mask.sum() > 20
    assert float(sums.nll) == pytest.approx((mask * nll).sum(), rel=1e-5)
    assert float(sums.loss) == pytest.approx((mask * (nll + config.train.z_loss * lse**2)).sum(), rel=1e-5)
    assert (float(sums.aux) > 0.5) == (name == "moe")


def test_an_unknown_objective_is_refused():
    config = dataclasses.replace(CONFIGS["dense"], train=TrainConfig(objective="magic"))
    with pytest.raises(UserError, match=r"train\.objective='magic' is not known; use causal_lm"):
        objective(config)
