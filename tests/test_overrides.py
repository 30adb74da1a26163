"""Configuration files, `--set`, where a value came from, and a configuration as JSON."""

import dataclasses
import math
import re
import typing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_jax.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, SourceConfig, TrainConfig, UserError
from llmos_jax.overrides import (
    apply_settings,
    differences,
    explain,
    flatten,
    from_json,
    load_config,
    load_file,
    to_json,
)

TWO_SOURCES = RunConfig(data=DataConfig(sources=(SourceConfig("a.txt"), SourceConfig("b.jsonl", weight=2.0))))


def refused(*settings: str, config: RunConfig = TWO_SOURCES) -> str:
    with pytest.raises(UserError) as error:
        apply_settings(config, list(settings))
    return str(error.value)


def value_at(config, path: str):
    for name in path.split("."):
        config = config[int(name)] if isinstance(config, tuple) else getattr(config, name)
    return config


def kind_at(path: str):
    """The declared type of the field at `path`."""
    *groups, name = path.split(".")
    return typing.get_type_hints(type(value_at(TWO_SOURCES, ".".join(groups)) if groups else RunConfig()))[name]


FIELDS = {path: kind_at(path) for path in flatten(TWO_SOURCES)}
WORDS = st.text(st.characters(categories=["L", "N"], include_characters=" ./:-_="), max_size=12).map(str.strip)
VALUES = {
    str: WORDS,
    bool: st.booleans(),
    int: st.integers(-(10**12), 10**12),
    float: st.floats(allow_nan=False),
    float | None: st.none() | st.floats(allow_nan=False),
    int | None: st.none() | st.integers(1, 10**9),
    tuple[str, ...]: st.lists(st.sampled_from(["global", "local"])).map(tuple),
}


@st.composite
def typed_settings(draw):
    path = draw(st.sampled_from([path for path, kind in FIELDS.items() if kind in VALUES]))
    return path, draw(VALUES[FIELDS[path]])


@given(typed_settings())
def test_a_typed_value_comes_back(setting):
    path, value = setting
    text = ",".join(value) if isinstance(value, tuple) else str(value)
    got = value_at(apply_settings(TWO_SOURCES, [f"{path}={text}"]), path)
    assert got == value and type(got) is type(value)


def test_every_kind_of_field_can_be_set():
    left = {path for path, kind in FIELDS.items() if kind not in VALUES}
    assert left == {"data.eval_sources"}  # a tuple of groups: see below


@pytest.mark.parametrize(
    ("setting", "want"),
    [
        ("train.steps=1_000", 1000),
        ("train.steps=1e3", 1000),
        (" train.steps = 7 ", 7),
        ("optimizer.learning_rate=3e-4", 3e-4),
        ("optimizer.learning_rate=1", 1.0),
        (f"optimizer.learning_rate={'9' * 400}", math.inf),
        ("model.tie_embeddings=yes", True),
        ("model.tie_embeddings=OFF", False),
        ("model.sliding_window=none", None),
        ("model.layer_pattern=local, global", ("local", "global")),
        ('model.layer_pattern=("local", "global")', ("local", "global")),
        ('model.layer_pattern=("local")', ("local",)),
        ("model.layer_pattern=['local']", ("local",)),
        ("model.layer_pattern=", ()),
        ("name=a=b", "a=b"),
        ("data.sources.1.path=c.txt", "c.txt"),
        ("model.rope.theta=1e6", 1e6),
        ("data.eval_sources=x.txt,y.txt", (SourceConfig("x.txt"), SourceConfig("y.txt"))),
    ],
)
def test_what_can_be_written(setting, want):
    got = value_at(apply_settings(TWO_SOURCES, [setting]), setting.partition("=")[0].strip())
    assert got == want and type(got) is type(want)


def test_settings_apply_in_order_and_leave_the_rest_alone():
    got = apply_settings(TWO_SOURCES, ["train.steps=5", "data.sources.1.weight=3", "train.steps=6"])
    changed = {path for path, value in flatten(got).items() if flatten(TWO_SOURCES)[path] != value}
    assert changed == {"train.steps", "data.sources.1.weight"} and got.train.steps == 6


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.steps", "--set train.steps has no value; write --set train.steps=VALUE"),
        ("train.step=5", "there is no setting 'train.step'; did you mean 'train.steps'?"),
        ("model.rope.thetta=5", "there is no setting 'model.rope.thetta'; did you mean 'model.rope.theta'?"),
        ("trian.steps=5", "there is no setting 'trian.steps'; did you mean 'train.steps'?"),
        ("learning_rate=1", "there is no setting 'learning_rate'; did you mean 'optimizer.learning_rate'?"),
        (
            "mesh.zzz=1",
            "there is no setting 'mesh.zzz'; mesh has data, fsdp, tensor, context, expert",
        ),
        ("model.zzz.theta=5", "there is no setting 'model.zzz.theta'; did you mean 'model.rope.theta'?"),
        ("train=5", "--set train names a group; set one of its fields: steps, batch_size"),
        ("train.steps.more=5", "--set train.steps.more: steps is a single value and has no field 'more'"),
        ("data.sources.2.path=x", "--set data.sources.2.path: '2' is not an index into its 2 entries (the first is 0)"),
        ("data.sources.x.path=x", "--set data.sources.x.path: 'x' is not an index into its 2 entries (the first is 0)"),
        ("data.sources.0=x", "--set data.sources.0=x: this field can only be set in the configuration file"),
        ("train.steps=many", "--set train.steps=many: it takes a number"),
        ("train.steps=1.5", "--set train.steps=1.5: it takes a whole number"),
        ("train.steps=inf", "--set train.steps=inf: it takes a whole number"),
        ("train.steps=nan", "--set train.steps=nan: it takes a whole number"),
        ("train.steps=1e400", "--set train.steps=1e400: it takes a whole number"),
        ("train.steps=", "--set train.steps=: it takes a number"),
        ("train.steps=none", "--set train.steps=none: it takes a number"),
        ("model.tie_embeddings=maybe", "--set model.tie_embeddings=maybe: write true or false"),
        ("model.layer_pattern=(", "--set model.layer_pattern=(: this is not a Python tuple"),
        ("model.layer_pattern=[{[]: 1}]", "--set model.layer_pattern=[{[]: 1}]: this is not a Python tuple"),
        ("=5", "there is no setting ''; the configuration has name, seed"),
    ],
)
def test_what_cannot_be_set_is_told(setting, message):
    assert refused(setting).startswith(message)


@given(st.text(max_size=30), st.text(max_size=30))
def test_nothing_that_is_written_ends_in_a_traceback(name, text):
    for path in (name, "train.steps", "optimizer.learning_rate", "model.layer_pattern", "model.sliding_window"):
        try:
            apply_settings(TWO_SOURCES, [f"{path}={text}"])
        except UserError as error:
            assert str(error)


# Files.


def write(folder: Path, body: str) -> Path:
    file = folder / "tiny.py"
    file.write_text(body)
    return file


GOOD = """
from llmos_jax.config import *

def get_config():
    return RunConfig(name="tiny", train=TrainConfig(steps=7), data=DataConfig(sources=(SourceConfig("a.txt"),)))
"""


def test_a_file_and_settings(tmp_path):
    config = load_config(write(tmp_path, GOOD), ["train.batch_size=2"])
    assert (config.name, config.train.steps, config.train.batch_size) == ("tiny", 7, 2)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = (", "cannot be read: SyntaxError"),
        ("import no_such_module", "cannot be read: ModuleNotFoundError: No module named 'no_such_module'"),
        ("x = 1", "has no get_config(); define one that returns a RunConfig"),
        ("def get_config():\n    return 5", "returns a int, not a RunConfig"),
        ("def get_config():\n    return 1 / 0", "tiny.py fails: ZeroDivisionError: division by zero"),
        ("from llmos_jax.config import UserError\nraise UserError('own words')", "own words"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, body, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load_file(write(tmp_path, body))


def test_a_file_that_is_not_there(tmp_path):
    write(tmp_path, GOOD)
    with pytest.raises(UserError, match=r"there is no configuration .*tinny.py; .* has tiny.py"):
        load_file(tmp_path / "tinny.py")
    with pytest.raises(UserError, match=r"there is no configuration .*x.py$"):
        load_file(tmp_path / "nowhere" / "x.py")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(
        UserError, match=r"notes.txt is not a Python file; a configuration is a file with get_config\(\)"
    ):
        load_file(tmp_path / "notes.txt")


def test_where_each_value_came_from(tmp_path):
    settings = ["train.batch_size=8", "data.eval_sources=e.txt"]  # the first as it was by default
    found = explain(write(tmp_path, GOOD), settings)
    assert found["train.steps"] == (7, "tiny.py")
    assert found["data.sources.0.path"] == ("a.txt", "tiny.py")
    assert found["train.batch_size"] == (8, "command line")
    assert found["data.eval_sources.0.path"] == ("e.txt", "command line")
    assert found["model.rope.theta"] == (10_000.0, "default")
    assert found.keys() == flatten(load_config(write(tmp_path, GOOD), settings)).keys()


# JSON.


@given(st.lists(typed_settings(), max_size=5))
def test_json_and_back(settings):
    config = TWO_SOURCES
    for path, value in settings:
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        config = apply_settings(config, [f"{path}={text}"])
    assert from_json(to_json(config)) == config


def test_json_of_another_version():
    text = to_json(RunConfig()).replace('"theta"', '"teta"')
    with pytest.raises(
        UserError, match=r"the stored configuration has model.rope.teta, which this version does not know"
    ):
        from_json(text)
    with pytest.raises(UserError, match=r"the stored configuration cannot be read"):
        from_json("{")
    fewer = from_json('{"name": "old", "train": {"steps": 3}}')
    assert fewer == RunConfig(name="old", train=TrainConfig(steps=3))  # what it does not name has its default


# Resuming.


def test_what_stands_against_resuming():
    old = TWO_SOURCES
    free = ["name=x", "mesh.tensor=2", "checkpoint.keep=9", "log.every=1", "model.remat=full", "data.num_threads=7"]
    assert differences(old, apply_settings(old, free)) == []
    changed = apply_settings(old, ["optimizer.learning_rate=1", "model.num_layers=3", "data.sources.1.path=z"])
    assert differences(old, changed) == [
        "model.num_layers: 8 then, 3 now",
        "data.sources.1.path: 'b.jsonl' then, 'z' now",
        "optimizer.learning_rate: 0.001 then, 1.0 now",
    ]
    fewer = dataclasses.replace(old, data=DataConfig(sources=old.data.sources[:1]))
    assert any(line == "data.sources.1.path: 'b.jsonl' then, None now" for line in differences(old, fewer))


@pytest.mark.parametrize(
    ("schedule", "steps", "allowed"),
    [("constant", 200, True), ("wsd", 200, True), ("cosine", 200, False), ("constant", 50, False)],
)
def test_a_run_may_go_on_for_longer_where_the_schedule_so_far_is_the_same(schedule, steps, allowed):
    old = RunConfig(model=ModelConfig(), optimizer=OptimizerConfig(schedule=schedule))
    new = dataclasses.replace(old, train=TrainConfig(steps=steps))
    assert (differences(old, new) == []) == allowed
