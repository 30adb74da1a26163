"""Hugging Face folders: safetensors in, sharded or not, streamed; safetensors and `config.json` out."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open

from llmos_jax.config import ModelConfig, UserError
from llmos_jax.models.registry import model_from_hf, model_to_hf
from llmos_jax.models.weights.assemble import Progress, assemble
from llmos_jax.models.weights.names import Entry, Index, family_names, sizes, slots

INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError where it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); pull the model again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; pull the model again")
    return value


def load_model_config(folder: Path) -> ModelConfig:
    """The ModelConfig of the `config.json` in `folder`."""
    return model_from_hf(read_json(Path(folder) / "config.json"))


def load(
    folder: Path,
    model: ModelConfig,
    abstract: dict[str, jax.ShapeDtypeStruct],
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """The parameters of `model` from the safetensors in `folder`, with the shape, dtype and sharding of `abstract`.

    Each process reads only the parts that its devices hold, where the layout in the file allows.
    Raises UserError for damaged files, missing and unexpected tensors, and shapes other than the model's.
    """
    folder = Path(folder)
    with contextlib.ExitStack() as stack, _readable(folder):
        source = _Safetensors(folder, model, stack)
        source.check(abstract)
        return assemble(model, abstract, source, progress)


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"the safetensors in {folder} are damaged ({error}); pull the model again") from error


class _Safetensors:
    """The tensors of a folder under their canonical names; implements assemble.Source."""

    def __init__(self, folder: Path, model: ModelConfig, stack: contextlib.ExitStack):
        self.folder, self.model, self.names, self.sizes = folder, model, family_names(model), sizes(model)
        self.slices: dict[str, Any] = {}
        for path in _shards(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="numpy"))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path} is damaged or cut short ({error}); pull the model again") from error
            for name in file.keys():  # noqa: SIM118
                self.slices[self.names.canonical(name)] = file.get_slice(name)

    def check(self, abstract: dict[str, jax.ShapeDtypeStruct]) -> None:
        """UserError unless the files hold the model's tensors, each of its shape, and no others."""
        expected: dict[str, tuple[int, ...]] = {}
        for slot in slots(self.model, abstract):
            shape = slot.entry.file_shape(self.sizes)
            expected |= dict.fromkeys(slot.file_names(self.model), shape)
        missing = [name for name in expected if name not in self.slices]
        if missing:
            raise UserError(
                f"{self.folder} has no {few(missing)}; a {self.model.family} model with this config.json needs them: "
                "the files are incomplete or of another model"
            )
        strange = [name for name in self.slices if name not in expected and not self.names.is_ignored(name, self.model)]
        if strange:
            raise UserError(
                f"{self.folder} holds {few(strange)}, which a {self.model.family} model with this config.json does not "
                "have: the files are of another model"
            )
        for name, shape in expected.items():
            found = tuple(self.slices[name].get_shape())
            if found != shape:
                raise UserError(f"{self.folder} has {name} of shape {found}, but its config.json means {shape}")

    def read(self, entry: Entry, layer: int | None, index: Index) -> np.ndarray:
        if not entry.has_experts:
            return entry.read(lambda parts: self.slices[entry.name(layer)][parts], index, self.sizes)
        experts = range(*index[0].indices(self.model.num_experts))
        return np.stack(
            [
                entry.read(self.slices[entry.name(layer, expert)].__getitem__, index[1:], self.sizes)
                for expert in experts
            ]
        )


def _shards(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        files = read_json(folder / INDEX).get("weight_map", {}).values()
        paths = [folder / name for name in sorted(set(files))]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    absent = [path.name for path in paths if not path.exists()]
    if absent:
        raise UserError(f"{folder} lacks {few(absent)} of its {len(paths)} weight files; pull the model again")
    if not paths:
        raise UserError(f"{folder} has no .safetensors files; give a folder with safetensors, or a GGUF file")
    return paths


def few(names: list[str], most: int = 3) -> str:
    """The first of `names`, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def export(
    folder: Path,
    model: ModelConfig,
    params: dict[str, jax.Array],
    dtype: str | None = None,
    tokenizer_folder: Path | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes `params` as a Hugging Face folder that transformers 4 and 5 load.

    The folder appears whole or not at all. In a multi-process run every process calls this, and the first writes.

    Args:
      dtype: of the written tensors ("float32", "bfloat16", "float16"); None: that of each parameter.
      tokenizer_folder: a folder whose tokenizer, chat template and generation_config.json come along.
      max_shard_bytes: size from which the weights are split over several files.

    Raises UserError where `folder` exists and is not empty, or the family cannot say what the model is.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty; choose another folder, or remove it first")
    config = model_to_hf(model)
    tensors = _file_tensors(model, params, dtype)
    config["torch_dtype"] = dtype or str(params["embed.table"].dtype)
    writes = jax.process_index() == 0
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent)) if writes else None
    try:
        _write_shards(temporary, tensors, _Pieces(params), max_shard_bytes)
        if temporary is not None:
            _write_companions(temporary, config, tokenizer_folder)
            temporary.chmod(0o755)
            temporary.replace(folder)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


@dataclass
class _FileTensor:
    """A tensor to be written: its name, shape and dtype in the file, and the (path, entry, i, expert) it is made of."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    parts: list[tuple[str, Entry, int | None, int | None]]

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


class _Pieces:
    """Layers of parameters on the host, the last one kept: the experts of a layer are written one after the other."""

    def __init__(self, params: dict[str, jax.Array]):
        self.params = params
        self.key: tuple[str, int | None] | None = None
        self.value = np.zeros(0)

    def get(self, path: str, i: int | None) -> np.ndarray:
        if self.key != (path, i):
            array = self.params[path] if i is None else self.params[path][i]
            local = array.is_fully_addressable
            self.value = np.asarray(array if local else multihost_utils.process_allgather(array, tiled=True))
            self.key = (path, i)
        return self.value


def _file_tensors(model: ModelConfig, params: dict[str, jax.Array], dtype: str | None) -> list[_FileTensor]:
    size = sizes(model)
    tensors: dict[str, _FileTensor] = {}
    for slot in slots(model, params):
        stored = np.dtype(dtype or params[slot.path].dtype)
        if stored.name not in SAFETENSORS_DTYPES:
            raise UserError(f"cannot write weights as {stored.name}; use one of {', '.join(SAFETENSORS_DTYPES)}")
        for i, layer in enumerate(slot.layers) if slot.layers is not None else [(None, None)]:
            for expert in range(model.num_experts) if slot.entry.has_experts else [None]:
                name = slot.entry.name(layer, expert)
                tensor = tensors.setdefault(name, _FileTensor(name, slot.entry.file_shape(size), stored, []))
                tensor.parts.append((slot.path, slot.entry, i, expert))
    for tensor in tensors.values():
        tensor.parts.sort(key=lambda part: part[1].part or (0, 1))
    return list(tensors.values())


def _tensor_bytes(tensor: _FileTensor, pieces: _Pieces) -> bytes:
    arrays = []
    for path, entry, i, expert in tensor.parts:
        piece = pieces.get(path, i)
        arrays.append(entry.layout.to_file(piece if expert is None else piece[expert]))
    return np.concatenate(arrays, axis=-1).astype(tensor.dtype, copy=False).tobytes()


def _write_shards(folder: Path | None, tensors: list[_FileTensor], pieces: _Pieces, max_bytes: int) -> None:
    shards: list[list[_FileTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.num_bytes for t in shards[-1]) + tensor.num_bytes > max_bytes:
            shards.append([])
        shards[-1].append(tensor)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        _write_safetensors(folder and folder / name, shard, pieces)
    if folder is not None and len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.num_bytes for tensor in tensors)
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_safetensors(path: Path | None, tensors: list[_FileTensor], pieces: _Pieces) -> None:
    """One file, tensor by tensor; without a path the pieces are only gathered, for the process that writes."""
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)  # keeps every tensor aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.num_bytes
        kind = SAFETENSORS_DTYPES[tensor.dtype.name]
        header[tensor.name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") if path else contextlib.nullcontext() as file:
        if file is not None:
            file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            data = _tensor_bytes(tensor, pieces)
            if file is not None:
                file.write(data)


def _write_companions(folder: Path, config: dict[str, Any], tokenizer_folder: Path | None) -> None:
    """The tokenizer's files and `config.json`, which takes the ids of special tokens from generation_config.json."""
    if tokenizer_folder is not None:
        for name in TOKENIZER_FILES:
            if (Path(tokenizer_folder) / name).exists():
                shutil.copyfile(Path(tokenizer_folder) / name, folder / name)
    generation = folder / "generation_config.json"
    if not generation.exists():
        _write_json(generation, {"_from_model_config": True})
    ids = read_json(generation)
    ids = {key: ids.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "config.json", {**config, **ids})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
