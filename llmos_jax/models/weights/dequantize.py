"""The numbers in a GGUF's blocks: those that the `gguf` package computes, bit for bit, in half of the time or less.

The package works along the 16 or 32 numbers of a block, which is short for numpy; and most matrices must be turned
afterwards, since their rows in the file are our columns. Here the bytes are turned instead, which are fewer: the first
bytes of all rows' blocks lie side by side, then the second ones, and so on. Every operation runs along the rows, and what
comes out is turned already.
"""

from collections.abc import Callable

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from llmos_jax.models.weights.threads import threads

PIECE = 2**18  # numbers that a thread makes at once: they stay in its cache from one operation to the next
FLOATS = {Kind.F32: np.float32, Kind.F16: np.float16}


def dequantize(data: np.ndarray, kind: Kind, by_columns: bool = False) -> np.ndarray:
    """float32 [rows..., columns] of floats, or of the bytes of blocks, uint8 [rows..., bytes]; in threads.

    by_columns: whether what is made of blocks lies in memory by its columns, as it is best read when it is turned.
    Raises NotImplementedError for a type that neither this file nor the package knows.
    """
    if kind in FLOATS:
        return data.astype(np.float32, copy=False)
    size, stored = gguf.GGML_QUANT_SIZES[kind]  # numbers and bytes of a block
    blocks = data.reshape(-1, data.shape[-1] // stored, stored)
    if kind not in UNPACK:
        return _by_package(blocks, kind).reshape(*data.shape[:-1], -1)
    rows, count, _ = blocks.shape
    if by_columns:
        num_rows = min(rows, PIECE // size)
        columns = np.empty((count, size, rows), np.float32)
        numbers = np.moveaxis(columns.reshape(count * size, *data.shape[:-1]), 0, -1)
    else:
        # The pieces are turned once more: where rows are an odd number of cache lines apart, all of the cache is used.
        num_rows = PIECE // (count * size) // 32 * 32 + 16
        numbers = np.empty((rows, count * size), np.float32)
    num_blocks = max(PIECE // (size * num_rows), 1)

    def piece(row: int, block: int) -> None:
        part, place = slice(row, row + num_rows), slice(block, block + num_blocks)
        turned = np.ascontiguousarray(blocks[part, place].transpose(1, 2, 0))
        if by_columns:
            UNPACK[kind](turned, columns[place, :, part])
        else:
            made = np.empty((len(turned), size, turned.shape[2]), np.float32)
            UNPACK[kind](turned, made)
            numbers[part, block * size : (block + len(turned)) * size] = made.reshape(-1, turned.shape[2]).T

    starts = [(row, block) for block in range(0, count, num_blocks) for row in range(0, rows, num_rows)]
    list(threads().map(piece, *zip(*starts, strict=True)))
    return numbers.reshape(*data.shape[:-1], -1) if not by_columns else numbers


def _by_package(blocks: np.ndarray, kind: Kind) -> np.ndarray:
    size, stored = gguf.GGML_QUANT_SIZES[kind]
    flat, count = blocks.reshape(-1, stored), max(PIECE // size, 1)
    numbers = np.empty((len(flat), size), np.float32)

    def piece(i: int) -> None:
        # As a single row: the package works through 16 rows at a time, which are short ones in small models.
        numbers[i : i + count] = gguf.dequantize(flat[i : i + count].reshape(1, -1), kind).reshape(-1, size)

    list(threads().map(piece, range(0, len(flat), count)))
    return numbers


# Each type: blocks uint8 [blocks, bytes of a block, rows] -> out float32 [blocks, numbers of a block, rows]. The layouts
# are those of ggml-common.h in llama.cpp; rounding is that of the package, product by product.


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """float32 [blocks, 1, rows] of the float16 at byte `at`."""
    bits = blocks[:, at].astype(np.uint16) | blocks[:, at + 1].astype(np.uint16) << 8
    return bits.view(np.float16).astype(np.float32)[:, None]


def _nibbles(stored: np.ndarray, out: np.ndarray, upper: np.ndarray | None = None) -> None:
    """The low halves of `stored` [blocks, n, rows], then the high ones, into out [blocks, 2 n, rows]; `upper`, of out's
    shape, are the bits above them."""
    count = stored.shape[1]
    for part, value in (slice(None, count), stored & 15), (slice(count, None), stored >> 4):
        out[:, part] = value if upper is None else value | upper[:, part] << 4


def _bits(stored: np.ndarray) -> np.ndarray:
    """uint8 [blocks, 8 n, rows]: the bits of `stored` [blocks, n, rows], the lowest of each byte first."""
    return np.unpackbits(stored, axis=1, bitorder="little")


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    _nibbles(blocks[:, 2:], out)
    out -= 8
    out *= _half(blocks, 0)


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    _nibbles(blocks[:, 4:], out)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q5_0(blocks: np.ndarray, out: np.ndarray) -> None:
    _nibbles(blocks[:, 6:], out, _bits(blocks[:, 2:6]))
    out -= 16
    out *= _half(blocks, 0)


def _q5_1(blocks: np.ndarray, out: np.ndarray) -> None:
    _nibbles(blocks[:, 8:], out, _bits(blocks[:, 4:8]))
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    out[...] = blocks[:, 2:].view(np.int8)
    out *= _half(blocks, 0)


def _with_scales(blocks: np.ndarray, out: np.ndarray) -> None:
    """Multiplies the eight groups of 32 in out by their scales and takes off their minima (Q4_K and Q5_K)."""
    low, high, both = (blocks[:, start : start + 4] for start in (4, 8, 12))
    scales = np.concatenate([low & 63, both & 15 | low >> 2 & 48], axis=1)
    minima = np.concatenate([high & 63, both >> 4 | high >> 2 & 48], axis=1)
    groups = out.reshape(len(out), 8, 32, -1)
    groups *= (_half(blocks, 0) * scales.astype(np.float32))[:, :, None]
    groups -= (_half(blocks, 2) * minima.astype(np.float32))[:, :, None]


def _q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(4):
        _nibbles(blocks[:, 16 + 32 * i : 48 + 32 * i], out[:, 64 * i : 64 * (i + 1)])
    _with_scales(blocks, out)


def _q5_k(blocks: np.ndarray, out: np.ndarray) -> None:
    high = blocks[:, 16:48]
    for i in range(4):
        upper = np.concatenate([high >> 2 * i & 1, high >> 2 * i + 1 & 1], axis=1)
        _nibbles(blocks[:, 48 + 32 * i : 80 + 32 * i], out[:, 64 * i : 64 * (i + 1)], upper)
    _with_scales(blocks, out)


def _q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    for i in range(2):
        high = blocks[:, 128 + 32 * i : 160 + 32 * i]
        upper = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
        _nibbles(blocks[:, 64 * i : 64 * (i + 1)], out[:, 128 * i : 128 * (i + 1)], upper)
    out -= 32
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32) * _half(blocks, 208)
    groups = out.reshape(len(out), 16, 16, -1)
    groups *= scales[:, :, None]


UNPACK: dict[Kind, Callable[[np.ndarray, np.ndarray], None]] = {
    Kind.Q4_0: _q4_0,
    Kind.Q4_1: _q4_1,
    Kind.Q5_0: _q5_0,
    Kind.Q5_1: _q5_1,
    Kind.Q8_0: _q8_0,
    Kind.Q4_K: _q4_k,
    Kind.Q5_K: _q5_k,
    Kind.Q6_K: _q6_k,
}
