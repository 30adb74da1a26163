"""The adapters that are loaded, on the devices: a fixed number of slots, so that loading one compiles nothing."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llmos_jax.config import ModelConfig, ServeConfig, UserError
from llmos_jax.serve.adapters import Adapter
from llmos_jax.sharding import sharding


class Adapters:
    """The loaded adapters of a model as one pair of matrices a projection: see `models.layers.Adapters`."""

    def __init__(self, model: ModelConfig, serve: ServeConfig, mesh: Mesh):
        self._rank, self._slots, self._mesh, self._dtype = serve.adapter_rank, serve.max_adapters, mesh, model.dtype
        ranks = self._rank * self._slots
        self._host: list[dict[str, tuple[np.ndarray, np.ndarray]]] = []
        for _, feed_forward in model.layer_kinds:
            sizes = _sizes(model, feed_forward)
            self._host.append(
                {
                    name: (np.zeros((i, ranks), np.float32), np.zeros((ranks, o), np.float32))
                    for name, (i, o) in sizes.items()
                }
            )

    def put(self, slot: int, adapter: Adapter | None) -> None:
        """Fills or empties a slot. Raises UserError for an adapter of a larger rank than the server was started with."""
        if adapter is not None and adapter.rank > self._rank:
            raise UserError(
                f"the adapter {adapter.name} has rank {adapter.rank}, and this server takes {self._rank}; start it "
                f"with --adapter-rank {adapter.rank}"
            )
        part = slice(slot * self._rank, (slot + 1) * self._rank)
        for layer, held in enumerate(self._host):
            for name, (a, b) in held.items():
                a[:, part], b[part] = 0.0, 0.0
                if adapter is not None and name in adapter.layers[layer]:
                    new_a, new_b = adapter.layers[layer][name]
                    a[:, part.start : part.start + new_a.shape[1]] = new_a
                    b[part.start : part.start + new_b.shape[0]] = new_b

    def layers(self) -> tuple[dict[str, Any], ...]:
        """On the devices."""

        def place(name: str, a: np.ndarray, b: np.ndarray) -> tuple[jax.Array, jax.Array]:
            into, out = (_DIMS[name], None) if name in ("o", "down") else (None, _DIMS[name])
            dtype = jnp.dtype(self._dtype)
            return (
                jax.device_put(a.astype(dtype), sharding(self._mesh, (into, None))),
                jax.device_put(b.astype(dtype), sharding(self._mesh, (None, out))),
            )

        return tuple({name: place(name, *pair) for name, pair in held.items()} for held in self._host)


_DIMS = {"q": "heads", "k": "kv_heads", "v": "kv_heads", "o": "heads", "gate": "mlp", "up": "mlp", "down": "mlp"}


def _sizes(model: ModelConfig, feed_forward: str) -> dict[str, tuple[int, int]]:
    """(in, out) of the projections of a layer that adapters may change."""
    d, heads, kv = model.embed_dim, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    sizes = {"q": (d, heads), "k": (d, kv), "v": (d, kv), "o": (heads, d)}
    if feed_forward == "mlp":
        sizes |= {"up": (d, model.mlp_dim), "down": (model.mlp_dim, d)}
        sizes |= {"gate": (d, model.mlp_dim)} if model.gated_mlp else {}
    return sizes
