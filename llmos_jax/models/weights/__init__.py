"""Published weights in and out: one door that looks at what is there."""

from pathlib import Path

import jax

from llmos_jax.config import ModelConfig, UserError
from llmos_jax.models.weights.assemble import Progress

__all__ = ["load_model_config", "load_weights"]


def load_model_config(path: Path) -> ModelConfig:
    """The ModelConfig of a model folder (safetensors with `config.json`, or one GGUF) or of a GGUF file."""
    path, module = _find(Path(path))
    return module.load_model_config(path)


def load_weights(
    path: Path,
    model: ModelConfig,
    abstract: dict[str, jax.ShapeDtypeStruct],
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """The parameters in a model folder or GGUF file, with the shape, dtype and sharding of `abstract`.

    `progress(bytes placed, bytes in all)` is called after each parameter.
    """
    path, module = _find(Path(path))
    return module.load(path, model, abstract, progress)


def _find(path: Path):
    """(folder, huggingface) or (file, gguf); safetensors come first where a folder has both."""
    from llmos_jax.models.weights import huggingface

    if path.is_file():
        if path.suffix == ".gguf":
            return path, _gguf()
        raise UserError(f"{path} is not a model; give a folder with config.json and safetensors, or a .gguf file")
    if not path.is_dir():
        raise UserError(f"{path} does not exist; `llmos models` lists what is pulled")
    if (path / "config.json").exists() and any(path.glob("*.safetensors")):
        return path, huggingface
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0], _gguf()
    if files:
        raise UserError(f"{path} has {len(files)} GGUF files; name one: {huggingface.few([f.name for f in files])}")
    if any(path.glob("*.bin")):
        raise UserError(f"{path} has its weights as pickles (.bin), which llmos does not open; convert to safetensors")
    raise UserError(f"{path} is not a model folder: it has no config.json with safetensors, and no .gguf file")


def _gguf():
    from llmos_jax.models.weights import gguf  # its package takes long to import

    return gguf
