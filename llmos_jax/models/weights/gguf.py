"""GGUF files in: one tensor at a time, dequantized on the host and placed straight into its sharding.

Names follow from the Hugging Face names through the table of the `gguf` package, so a family has one name map.
What llama.cpp's converter changes in the values is undone here, by `UNDO`.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import jax
import numpy as np

from llmos_jax.config import ModelConfig, UserError
from llmos_jax.models.families import FAMILIES
from llmos_jax.models.registry import model_from_gguf
from llmos_jax.models.weights.assemble import Progress, assemble
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
    (r"\.q_proj\.", lambda array, model: _unpermute(array, model, model.num_heads)),
    (r"\.k_proj\.", lambda array, model: _unpermute(array, model, model.num_kv_heads)),
)
_SHIFTED: tuple[tuple[str, Undo], ...] = ((r"norm\.weight$", lambda array, model: array - 1),)

# Family -> (pattern of Hugging Face names, what brings the GGUF's tensor back to Hugging Face's).
UNDO: dict[str, tuple[tuple[str, Undo], ...]] = {
    "llama": _PERMUTED,
    "mixtral": _PERMUTED,
    "gemma2": _SHIFTED,
    "gemma3": _SHIFTED,
    "gpt2": ((r"\.c_(attn|proj|fc)\.weight$", lambda array, model: array.T),),
}


def open_gguf(path: Path) -> gguf.GGUFReader:
    """A reader of the file; UserError where it is not a whole GGUF."""
    path = Path(path)
    try:
        status = path.stat()
        reader = _reader(path, status.st_size, status.st_mtime_ns)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; give the path of a GGUF file") from error
    except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
        raise UserError(f"{path} is not a GGUF file, or is damaged or cut short ({error}); pull it again") from error
    if "split.count" in reader.fields and reader.fields["split.count"].contents() > 1:
        raise UserError(f"{path} is one part of a split GGUF; join the parts with llama-gguf-split --merge first")
    return reader


@functools.lru_cache(maxsize=1)  # seconds for a large vocabulary, and the configuration and the weights both need it
def _reader(path: Path, size: int, mtime_ns: int) -> gguf.GGUFReader:
    return gguf.GGUFReader(path)


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
    return assemble(model, abstract, source, progress)


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
        array = self._dequantized(self.name(entry, layer))
        for pattern, undo in UNDO.get(self.model.family, ()):
            if re.search(pattern, entry.hf):
                array = undo(array, self.model)
        everything = (slice(None),) * len(entry.layout.ours)
        if entry.has_experts:
            return np.stack([entry.read(one.__getitem__, everything, self.sizes) for one in array])
        return entry.read(lambda parts: array[parts], everything, self.sizes)

    def _dequantized(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        try:
            return gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise UserError(f"{self.path} has {name} as {tensor.tensor_type.name}, which cannot be read") from error
