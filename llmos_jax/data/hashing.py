"""Hashes that never change: between runs, machines, Python versions or NumPy versions.

The order of examples, the held-out split and the search for near duplicates all rest on these, so neither `hash()`
(salted in every process) nor `numpy.random` (whose streams may change between releases) is used for them.
"""

import hashlib

import numpy as np


def text_hash(text: str) -> int:
    """The first 64 bits of BLAKE2b of the UTF-8 text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def derived_seed(*parts: object) -> int:
    """A 32-bit seed from any values that print the same everywhere; different parts give unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "little")


def mix64(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (doi:10.1145/2660193.2660195): a one-to-one scrambling of uint64 values."""
    x = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(count: int, seed: int) -> np.ndarray:
    """int64 [count]: the numbers below `count` in an order that `seed` alone decides."""
    keys = mix64(np.arange(count, dtype=np.uint64) ^ mix64(np.array([seed], np.uint64)))
    return np.argsort(keys, kind="stable")
