"""Which tiles of rows meet which groups: what the grouped kernels walk instead of every pair of them."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Int


class Visits(NamedTuple):
    """The pairs of a tile and a group that share rows, in the order of rows; `count` of them, the rest is filling.

    group: num_groups is that of the rows past the last group. low, high: the shared rows, counted from the tile's
    first. x_tile, w_group: what to have loaded; where nothing is multiplied, what is there already. first, last:
    whether the group has no visit before, or after.
    """

    tile: Int[Array, "visits"]
    group: Int[Array, "visits"]
    low: Int[Array, "visits"]
    high: Int[Array, "visits"]
    x_tile: Int[Array, "visits"]
    w_group: Int[Array, "visits"]
    first: Int[Array, "visits"]
    last: Int[Array, "visits"]


def visits(group_sizes: Int[Array, "E"], num_rows: int, tile: int, *, of_groups: bool = False) -> tuple[Visits, Array]:
    """The visits and their number, which is at most that of tiles plus that of groups.

    They cover every row, those past the last group too; or with `of_groups` every group, the empty ones too.
    """
    num_groups, num_tiles = group_sizes.shape[0], -(-num_rows // tile)
    ends = jnp.append(jnp.minimum(jnp.cumsum(group_sizes), num_rows), num_rows).astype(jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    counts = jnp.where(ends > starts, (ends - 1) // tile - starts // tile + 1, 0)
    if of_groups:
        counts = jnp.maximum(counts, 1).at[-1].set(0)
    visit_ends = jnp.cumsum(counts)
    index = jnp.arange(num_tiles + num_groups, dtype=jnp.int32)
    group = jnp.minimum(jnp.searchsorted(visit_ends, index, side="right", method="compare_all"), num_groups)
    group = group.astype(jnp.int32)
    place = index - (visit_ends - counts)[group]  # among the group's visits
    tiles = jnp.minimum(starts[group] // tile + place, num_tiles - 1)
    used = jnp.max(jnp.where(group_sizes > 0, jnp.arange(num_groups), 0))
    found = Visits(
        tile=tiles,
        group=group,
        low=jnp.clip(starts[group] - tiles * tile, 0, tile),
        high=jnp.clip(ends[group] - tiles * tile, 0, tile),
        x_tile=jnp.minimum(tiles, jnp.maximum(starts[-1] - 1, 0) // tile),
        w_group=jnp.minimum(group, used),
        first=place == 0,
        last=place == counts[group] - 1,
    )
    return Visits(*(field.astype(jnp.int32) for field in found)), visit_ends[-1].astype(jnp.int32)
