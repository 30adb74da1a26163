"""Opens a model wherever it is: pulled by name, in a folder or file, or the last checkpoint of a training workdir."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from llmos_jax import overrides
from llmos_jax.config import ModelConfig, UserError, check_model
from llmos_jax.data.tokenizer import Tokenizer, check_fits, load_tokenizer
from llmos_jax.models.parameters import Params, known_params
from llmos_jax.models.weights import load_model_config, load_weights
from llmos_jax.runtime import store
from llmos_jax.runtime.workdir import read_file

Progress = Callable[[int, int], None]  # bytes so far, bytes in all


class Source(NamedTuple):
    """A model that is found and described, but of which no weight has been read."""

    path: str  # of a folder, a file or a workdir
    model: ModelConfig
    is_workdir: bool


def find(reference: str) -> Source:
    """Where `reference` is and what model it holds. Raises UserError where there is none."""
    stored = _stored_config(reference)
    if stored is not None:
        return Source(reference, overrides.from_json(stored.decode()).model, True)
    path = store.resolve(reference)
    model = load_model_config(path)
    check_model(model)
    return Source(str(path), model, False)


def tokenizer_of(source: Source) -> Tokenizer:
    folder = Path(source.path) / "tokenizer" if source.is_workdir else Path(source.path)
    tokenizer = load_tokenizer(folder, _gguf_fields)
    check_fits(tokenizer, source.model)
    return tokenizer


def _gguf_fields(file: Path) -> Mapping[str, Any]:
    """The file was read for the configuration already, and is not read again."""
    from llmos_jax.models.weights.gguf import open_gguf  # takes long to import

    return open_gguf(file).fields


def weights_of(source: Source, model: ModelConfig, mesh: Mesh, progress: Progress | None = None) -> Params:
    """The parameters in `model`'s dtype, each born in its sharding on `mesh`.

    `model` is `source.model`, up to how it is computed (dtypes, remat).
    """
    abstract = known_params(model, mesh)
    if not source.is_workdir:
        return load_weights(Path(source.path), model, abstract, progress)
    from llmos_jax.runtime.checkpoint import load_params  # what reads checkpoints takes long to import

    stored = known_params(source.model, mesh)
    _, params = load_params(source.path, stored)
    return {path: jax.numpy.asarray(params[path], abstract[path].dtype) for path in abstract}


def for_inference(model: ModelConfig, dtype: str = "") -> ModelConfig:
    """`model` to be computed in `dtype`; the default is bfloat16 on accelerators and float32 on a CPU."""
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return dataclasses.replace(model, dtype=dtype, param_dtype=dtype, remat="none", remat_save=(), remat_offload=())


def _stored_config(reference: str) -> bytes | None:
    """The configuration in a training workdir; None where `reference` is something else."""
    if "://" not in reference and not (Path(reference) / "checkpoints").is_dir():
        if (Path(reference) / "metrics.jsonl").exists():
            raise UserError(f"{reference} is a workdir without a checkpoint yet; let it train until it has saved one")
        return None
    return read_file(reference, "config.json")
