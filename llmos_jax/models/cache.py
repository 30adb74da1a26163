"""The keys and values that a decoder keeps of a text."""

from typing import NamedTuple

from jaxtyping import Array, Float


class Cache(NamedTuple):
    """Keys and values of one layer for S tokens."""

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
