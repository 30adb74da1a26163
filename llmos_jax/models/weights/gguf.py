"""GGUF files in: one tensor at a time, dequantized on the host and placed straight into its sharding.

Names follow from the Hugging Face names through the table of the `gguf` package, so a family has one name map.
What llama.cpp's converter changes in the values is undone here, by `UNDO`.
"""

import functools
import math
import mmap
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import jax
import numpy as np

from llmos_jax.config import ModelConfig, UserError
from llmos_jax.models.families import FAMILIES
from llmos_jax.models.registry import model_from_gguf
from llmos_jax.models.weights.assemble import Progress, assemble
from llmos_jax.models.weights.converted import converted
from llmos_jax.models.weights.dequantize import FLOATS, dequantize
from llmos_jax.models.weights.huggingface import few
from llmos_jax.models.weights.names import Entry, Index, Slot, sizes, slots

# In a GGUF, but derived from the rest or a second copy of it.
IGNORED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def _unpermute(array: np.ndarray, model: ModelConfig, heads: int) -> np.ndarray:
    """From rotary pairs side by side (i, i+1) to the halves (i, i + H/2) of Hugging Face's files."""
    pairs = array.reshape(heads, model.head_dim // 2, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


Undo = Callable[[np.ndarray, ModelConfig], np.ndarray]
_PERMUTED: tuple[tuple[str, Undo], ...] = (
    (r"\.q_proj\.", lambda rows, model: _unpermute(rows, model, model.num_heads)),
    (r"\.k_proj\.", lambda rows, model: _unpermute(rows, model, model.num_kv_heads)),
)
_SHIFTED: tuple[tuple[str, Undo], ...] = ((r"norm\.weight$", lambda array, model: array - 1),)

# Family -> (pattern of Hugging Face names, what brings the GGUF's tensor back to Hugging Face's): the order of its rows,
# which are still blocks then, and what is done to the numbers.
UNDO_ORDER: dict[str, tuple[tuple[str, Undo], ...]] = {"llama": _PERMUTED, "mixtral": _PERMUTED}
UNDO: dict[str, tuple[tuple[str, Undo], ...]] = {
    "gemma2": _SHIFTED,
    "gemma3": _SHIFTED,
    "gpt2": ((r"\.c_(attn|proj|fc)\.weight$", lambda array, model: array.T),),
}


class Field(NamedTuple):
    """A value of the metadata: a number, a truth value, a text, or a list of such."""

    value: Any

    def contents(self) -> Any:
        return self.value


class Tensor(NamedTuple):
    name: str
    tensor_type: gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # as GGUF counts: the fastest axis first
    data: np.ndarray  # the slowest axis first; floats for F32 and F16, else the bytes of a row's blocks (uint8)


@dataclass(frozen=True)
class File:
    """The metadata and the tensors of a GGUF; the data of the tensors stays in the file until it is looked at."""

    fields: dict[str, Field]
    tensors: list[Tensor]


def open_gguf(path: Path) -> File:
    """What is in the file; UserError where it is not a whole GGUF."""
    path = Path(path)
    try:
        status = path.stat()
        file = _read_header(path, status.st_size, status.st_mtime_ns)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; give the path of a GGUF file") from error
    except (ValueError, KeyError, OSError, OverflowError, MemoryError, struct.error) as error:
        raise UserError(f"{path} is not a GGUF file, or is damaged or cut short ({error}); pull it again") from error
    if "split.count" in file.fields and file.fields["split.count"].contents() > 1:
        raise UserError(f"{path} is one part of a split GGUF; join the parts with llama-gguf-split --merge first")
    return file


@functools.lru_cache(maxsize=1)  # the configuration, the tokenizer and the weights all need it
def _read_header(path: Path, size: int, mtime_ns: int) -> File:
    """Reads the header in one pass; `gguf.GGUFReader` makes an array of each token's bytes, which takes seconds.

    The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
    Raises ValueError, KeyError, OverflowError, MemoryError and struct.error where it is not that.
    """
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(data)
    magic, version = cursor.numbers("4sI")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r}, version {version}")
    count, pairs = cursor.numbers("QQ")
    fields: dict[str, Field] = {}
    for _ in range(pairs):
        name = cursor.text()
        if name in fields:
            raise ValueError(f"{name} is there twice")
        fields[name] = Field(cursor.value(*cursor.numbers("I")))
    described = [cursor.tensor() for _ in range(count)]
    if len({name for name, *_ in described}) < count:
        raise ValueError("two tensors have one name")
    alignment = fields["general.alignment"].contents() if "general.alignment" in fields else 32
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"its alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    return File(fields, [_tensor(data, start, *one) for one in described])


_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class _Cursor:
    """Reads a header from its beginning on; beyond the end of the file there is a struct.error."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def numbers(self, layout: str) -> tuple[Any, ...]:
        """Of a `struct` layout, without padding."""
        found = struct.unpack_from(f"<{layout}", self.data, self.at)
        self.at += struct.calcsize(f"<{layout}")
        return found

    def text(self) -> str:
        return self._texts(1)[0]

    def _texts(self, count: int) -> list[str]:
        """Written for speed: a vocabulary has hundreds of thousands."""
        data, length, at, end = self.data, struct.Struct("<Q").unpack_from, self.at, len(self.data)
        texts = []
        for _ in range(count):
            start = at + 8
            at = start + length(data, at)[0]
            if at > end:
                raise ValueError("a text goes beyond its end")
            texts.append(data[start:at].decode())
        self.at = at
        return texts

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            of, count = self.numbers("IQ")
            if of == _STRING:
                return self._texts(count)
            if of == _ARRAY:
                return [self.value(of) for _ in range(count)]
            return list(self.numbers(f"{count}{_NUMBERS[of]}"))
        return self.numbers(_NUMBERS[kind])[0]

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape, type, where it starts after the header)"""
        name, (rank,) = self.text(), self.numbers("I")
        *shape, kind, offset = self.numbers(f"{rank}QIQ")
        return name, tuple(shape), kind, offset


def _tensor(data: mmap.mmap, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> Tensor:
    tensor_type = gguf.GGMLQuantizationType(kind)
    rows = gguf.quant_shape_to_byte_shape(shape[::-1], tensor_type)
    stored = np.frombuffer(data, np.uint8, math.prod(rows), start + offset).reshape(rows)
    return Tensor(name, tensor_type, shape, stored.view(FLOATS.get(tensor_type, np.uint8)))


def load_model_config(path: Path) -> ModelConfig:
    """The ModelConfig that the metadata of the file describes."""
    return model_from_gguf(open_gguf(path))


def load(
    path: Path,
    model: ModelConfig,
    abstract: dict[str, jax.ShapeDtypeStruct],
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """The parameters of `model` from a GGUF of any quantization, with the shape, dtype and sharding of `abstract`.

    Raises UserError for a damaged file, missing and unexpected tensors, and shapes other than the model's.
    """
    source = _Gguf(Path(path), model)
    source.check(abstract)

    def convert() -> dict[str, jax.Array]:
        return assemble(model, abstract, source, progress)

    if all(tensor.tensor_type in FLOATS for tensor in source.tensors.values()):
        return convert()
    return converted(Path(path), model, abstract, convert)


class _Gguf:
    """The tensors of one file; implements assemble.Source."""

    def __init__(self, path: Path, model: ModelConfig):
        self.path, self.model, self.sizes = path, model, sizes(model)
        self.tensors = {tensor.name: tensor for tensor in open_gguf(path).tensors}
        architecture = FAMILIES[model.family].gguf
        by_name = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
        self.names = gguf.get_tensor_name_map(by_name[architecture], model.num_layers)
        self.last: tuple[tuple[Entry, int | None] | None, np.ndarray] = (None, np.zeros(0))

    def name(self, entry: Entry, layer: int | None) -> str:
        """The tensor's name in the file; all the experts of a layer share one."""
        stem, _, suffix = entry.hf.replace(".{expert}", "").format(layer=layer).rpartition(".")
        return f"{self.names.get_name(stem)}.{suffix}"

    def shape(self, entry: Entry) -> tuple[int, ...]:
        shape = entry.file_shape(self.sizes)
        if self.model.family == "gpt2" and re.search(UNDO["gpt2"][0][0], entry.hf):
            shape = shape[::-1]
        return (self.sizes["E"], *shape) if entry.has_experts else shape

    def check(self, abstract: dict[str, jax.ShapeDtypeStruct]) -> None:
        """UserError unless the file holds the model's tensors, each of its shape, and no others."""
        expected: dict[str, tuple[int, ...]] = {}
        for slot in slots(self.model, abstract):
            expected |= dict.fromkeys(self._names(slot), self.shape(slot.entry))
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            raise UserError(f"{self.path} has no {few(missing)}; it is not a whole {self.model.family} model")
        tied = ("output.weight",) if self.model.tie_embeddings else ()
        strange = [name for name in self.tensors if name not in expected and name not in (*IGNORED, *tied)]
        if strange:
            raise UserError(f"{self.path} holds {few(strange)}, which a {self.model.family} model does not have")
        for name, shape in expected.items():
            found = tuple(int(size) for size in reversed(self.tensors[name].shape))
            if found != shape:
                raise UserError(f"{self.path} has {name} of shape {found}, but its metadata means {shape}")

    def _names(self, slot: Slot) -> list[str]:
        return [self.name(slot.entry, layer) for layer in slot.layers or (None,)]

    def read(self, entry: Entry, layer: int | None, index: Index) -> np.ndarray:
        if self.last[0] != (entry, layer):
            self.last = (None, np.zeros(0))  # free it before the next is made
            self.last = ((entry, layer), self._whole(entry, layer))
        return self.last[1][index]

    def _whole(self, entry: Entry, layer: int | None) -> np.ndarray:
        """One layer's parameter in our layout, float32."""
        name = self.name(entry, layer)
        tensor = self.tensors[name]
        try:
            data = self._undone(UNDO_ORDER, entry, tensor.data)
            array = dequantize(data, tensor.tensor_type, by_columns=entry.layout.ours[-1] != entry.layout.file[-1][-1])
        except NotImplementedError as error:
            raise UserError(f"{self.path} has {name} as {tensor.tensor_type.name}, which cannot be read") from error
        array = self._undone(UNDO, entry, array)
        everything = (slice(None),) * len(entry.layout.ours)
        if entry.has_experts:
            return np.stack([entry.read(one.__getitem__, everything, self.sizes) for one in array])
        return entry.read(lambda parts: array[parts], everything, self.sizes)

    def _undone(self, table: dict[str, tuple[tuple[str, Undo], ...]], entry: Entry, array: np.ndarray) -> np.ndarray:
        for pattern, undo in table.get(self.model.family, ()):
            if re.search(pattern, entry.hf):
                array = undo(array, self.model)
        return array
