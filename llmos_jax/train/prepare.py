"""What a run needs before its first step: processes, model shape, mesh, tokenizer, data, and a workdir that agrees."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from llmos_jax import opening, overrides
from llmos_jax.config import RunConfig, UserError, check, with_model
from llmos_jax.data.pipeline import TrainData, build_data
from llmos_jax.data.tokenizer import Tokenizer, load_tokenizer
from llmos_jax.data.trained_tokenizer import trained_tokenizer
from llmos_jax.runtime.distributed import barrier, is_primary
from llmos_jax.runtime.workdir import is_remote, read_file, write_file
from llmos_jax.sharding import make_mesh, process_rows

Say = Callable[[str], None]
KEPT = "complete"  # a file that marks a tokenizer's folder as ours


class Run(NamedTuple):
    config: RunConfig  # resolved: the model's shape is that of init_from, where it is set
    workdir: str
    mesh: Mesh
    tokenizer: Tokenizer
    data: TrainData
    rows: slice  # of the global batch, that this process feeds


def prepare(config: RunConfig, workdir: str, say: Say = lambda _: None) -> Run:
    """Checks and builds everything that comes before a device is used.

    Raises UserError where the configuration is wrong, does not fit the devices or the data, or differs from the one
    `workdir` was started with.
    """
    if not config.data.sources:
        raise UserError("data.sources is empty; name at least one source, such as a folder of text")
    config = resolve_model(config)
    check(config, jax.device_count())
    _agree_with_workdir(config, workdir)
    if not is_remote(workdir):
        try:
            Path(workdir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the workdir {workdir} cannot be made: {error.strerror}; name another folder") from error
    tokenizer = _tokenizer(config, workdir, say)
    mesh = make_mesh(config.mesh)
    if jax.process_count() > 1 and not is_primary():
        barrier("data")  # the first process builds the token stores, the others find them
    data = build_data(config, tokenizer, data_progress(say))
    if jax.process_count() > 1 and is_primary():
        barrier("data")
    if is_primary():
        _write_config(config, workdir)
    return Run(config, workdir, mesh, tokenizer, data, process_rows(mesh, config.train.batch_size))


def resolve_model(config: RunConfig) -> RunConfig:
    """`config` with the architecture of `init_from`, where it is set."""
    return with_model(config, opening.find(config.init_from).model) if config.init_from else config


def _agree_with_workdir(config: RunConfig, workdir: str) -> None:
    stored = read_file(workdir, "config.json")
    if stored is None:
        return
    changed = overrides.differences(overrides.from_json(stored.decode()), config)
    if changed:
        listed = "\n  ".join(changed)
        raise UserError(
            f"{workdir} was started with another configuration:\n  {listed}\n"
            "Change these back to resume it, or train in a new --workdir."
        )


def _write_config(config: RunConfig, workdir: str) -> None:
    try:
        write_file(workdir, "config.json", overrides.to_json(config).encode())
    except OSError as error:
        raise UserError(f"the workdir {workdir} cannot be written: {error}; name another folder") from error


def _tokenizer(config: RunConfig, workdir: str, say: Say) -> Tokenizer:
    """The run's tokenizer, kept in the workdir so that a checkpoint can be asked and exported on its own."""
    if is_remote(workdir):
        return chosen_tokenizer(config, say)
    folder = Path(workdir) / "tokenizer"
    # Without a stored configuration, what is there is from a start that was refused, and may not be this run's.
    started = read_file(workdir, "config.json") is not None and folder.exists()
    if is_primary() and not started:
        _keep(chosen_tokenizer(config, say), folder)
    barrier("tokenizer")
    return load_tokenizer(folder)


def _keep(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes `folder` whole or not at all; one that llmos did not write is not touched."""
    if folder.exists() and not (folder / KEPT).exists():
        raise UserError(f"{folder} is not from a run; train in a new --workdir")
    draft = folder.with_name(".tokenizer.new")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        tokenizer.save(draft)
        (draft / KEPT).touch()
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    except OSError as error:
        raise UserError(f"the workdir {folder.parent} cannot be written: {error}; name another folder") from error


def chosen_tokenizer(config: RunConfig, say: Say) -> Tokenizer:
    name = config.data.tokenizer
    if name == "train":
        return trained_tokenizer(config.data, config.data.tokenizer_vocab_size or config.model.vocab_size, say)
    if name:
        path = Path(name).expanduser()
        return load_tokenizer(path) if path.exists() else opening.tokenizer_of(opening.find(name))
    if config.init_from:
        return opening.tokenizer_of(opening.find(config.init_from))
    raise UserError('data.tokenizer is empty; name a pulled model or a tokenizer file, or "train" to make one')


def data_progress(say: Say):
    """Says how far tokenizing is, a line every 10 million tokens."""
    milestones: dict[str, int] = {}

    def progress(path: str, documents: int, tokens: int) -> None:
        if tokens // 10**7 > milestones.get(path, 0):
            milestones[path] = tokens // 10**7
            say(f"tokenizing {path}: {documents:,} documents, {tokens:,} tokens")

    return progress
