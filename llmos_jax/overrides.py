"""Loading a configuration file, changing it with `--set`, and telling where each value came from."""

import ast
import dataclasses
import difflib
import importlib.util
import json
import types
import typing
from pathlib import Path
from typing import Any

from llmos_jax.config import RunConfig, UserError


def load_config(path: str | Path, settings: list[str] | None = None) -> RunConfig:
    """`get_config()` of the Python file `path`, with `settings` ("train.steps=10") applied. Raises UserError."""
    return apply_settings(load_file(path), settings or [])


def load_file(path: str | Path) -> RunConfig:
    path = Path(path)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        hint = f"; {path.parent} has {', '.join(near[:8])}" if near else ""
        raise UserError(f"there is no configuration {path}{hint}")
    spec = importlib.util.spec_from_file_location(f"llmos_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; a configuration is a file with get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} has no get_config(); define one that returns a RunConfig")
    try:
        config = module.get_config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"get_config() of {path} fails: {type(error).__name__}: {error}") from error
    if not isinstance(config, RunConfig):
        raise UserError(f"get_config() of {path} returns a {type(config).__name__}, not a RunConfig")
    return config


def apply_settings(config: RunConfig, settings: list[str]) -> RunConfig:
    """`config` with each "path.to.field=value" applied in order; values are typed by the field. Raises UserError."""
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator:
            raise UserError(f"--set {setting} has no value; write --set {setting}=VALUE")
        config = _replace(config, name.strip().split("."), text.strip(), name.strip())
    return config


def _replace(value: Any, path: list[str], text: str, name: str) -> Any:
    head, *rest = path
    if isinstance(value, tuple):
        if not head.isdigit() or int(head) >= len(value):
            raise UserError(f"--set {name}: {head!r} is not an index into its {len(value)} entries (the first is 0)")
        i = int(head)
        new = _replace(value[i], rest, text, name) if rest else _parse(text, type(value[i]), name)
        return (*value[:i], new, *value[i + 1 :])
    hints = typing.get_type_hints(type(value))
    if head not in hints:
        raise UserError(_unknown(value, path, name))
    current = getattr(value, head)
    if rest:
        if not dataclasses.is_dataclass(current) and not isinstance(current, tuple):
            raise UserError(f"--set {name}: {head} is a single value and has no field {rest[0]!r}")
        new = _replace(current, rest, text, name)
    elif dataclasses.is_dataclass(current):
        fields = ", ".join(f.name for f in dataclasses.fields(current))
        raise UserError(f"--set {name} names a group; set one of its fields: {fields}")
    else:
        new = _parse(text, hints[head], name)
    return dataclasses.replace(value, **{head: new})


def _unknown(value: Any, path: list[str], name: str) -> str:
    """The nearest field of the group `value`, or of any group if that fits better; path: of `name`, from `value` on."""
    group, (field, *rest) = name.split(".")[: -len(path)], path
    here = [f.name for f in dataclasses.fields(value)]
    near = difflib.get_close_matches(field, here, 1, 0.6)
    if near:
        return f"there is no setting {name!r}; did you mean {'.'.join([*group, near[0], *rest])!r}?"
    everywhere = {leaf.split(".")[-1]: leaf for leaf in flatten(RunConfig())}
    near = difflib.get_close_matches(path[-1], list(everywhere), 1, 0.6)
    if near:
        return f"there is no setting {name!r}; did you mean {everywhere[near[0]]!r}?"
    return f"there is no setting {name!r}; {'.'.join(group) or 'the configuration'} has {', '.join(here)}"


def _parse(text: str, kind: Any, name: str) -> Any:
    """`text` as a value of the field type `kind`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if text.lower() == "none" and type(None) in args:
            return None
        return _parse(text, next(a for a in args if a is not type(None)), name)
    if kind is str:
        return text
    if kind is bool:
        if text.lower() in ("true", "1", "yes", "on"):
            return True
        if text.lower() in ("false", "0", "no", "off"):
            return False
        raise UserError(f"--set {name}={text}: write true or false")
    if kind is int:
        return _whole_number(text, name)
    if kind is float:
        return _number(text, name)
    if origin is tuple:
        return _parse_tuple(text, args[0], name)
    raise UserError(f"--set {name}={text}: this field can only be set in the configuration file")


def _number(text: str, name: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"--set {name}={text}: it takes a number") from None


def _whole_number(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = _number(text, name)  # 1e6 is a whole number too; infinity is none
    if not number.is_integer():
        raise UserError(f"--set {name}={text}: it takes a whole number")
    return int(number)


def _parse_tuple(text: str, item: Any, name: str) -> tuple:
    """Comma-separated, or a Python tuple; a tuple of groups takes the value of each group's first field (its path)."""
    if text.startswith(("(", "[")):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise UserError(f"--set {name}={text}: this is not a Python tuple") from None
        # ("global") is a string to Python, but who writes it means a tuple of one
        parts = [str(part) for part in (value if isinstance(value, tuple | list) else [value])]
    else:
        parts = [part.strip() for part in text.split(",") if part.strip()]
    if isinstance(item, type) and dataclasses.is_dataclass(item):
        first = dataclasses.fields(item)[0].name
        return tuple(item(**{first: part}) for part in parts)
    return tuple(_parse(part, item, name) for part in parts)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf of a configuration by its dotted path; what `--set` can name."""
    if dataclasses.is_dataclass(value):
        items = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        items = [(str(i), item) for i, item in enumerate(value)]
    else:
        return {prefix: value}
    leaves: dict[str, Any] = {}
    for name, item in items:
        leaves |= flatten(item, f"{prefix}.{name}" if prefix else name)
    return leaves


def explain(path: str | Path, settings: list[str]) -> dict[str, tuple[Any, str]]:
    """(value, where it came from) of every leaf: "default", the file's name, or "command line"."""
    default, file = flatten(RunConfig()), flatten(load_file(path))
    final = flatten(load_config(path, settings))
    on_command_line = [setting.partition("=")[0].strip() for setting in settings]
    answer = {}
    for name, value in final.items():
        if any(name == s or name.startswith(f"{s}.") for s in on_command_line):
            source = "command line"
        elif name in default and file.get(name) == default[name] == value:
            source = "default"
        else:
            source = Path(path).name
        answer[name] = (value, source)
    return answer


def to_json(config: RunConfig) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str) -> RunConfig:
    """The inverse of `to_json`. Raises UserError for what is no JSON and for unknown fields (of another version)."""
    try:
        return _build(RunConfig, json.loads(text), "")
    except (ValueError, TypeError) as error:
        raise UserError(f"the stored configuration cannot be read: {error}") from error


def _build(kind: Any, value: Any, name: str) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        unknown = set(value) - set(hints)
        if unknown:
            raise UserError(
                f"the stored configuration has {name}{sorted(unknown)[0]}, which this version does not know"
            )
        return kind(**{key: _build(hints[key], item, f"{name}{key}.") for key, item in value.items()})
    if typing.get_origin(kind) is tuple:
        return tuple(_build(typing.get_args(kind)[0], item, name) for item in value)
    return value


# What a resumed run may change: where and how it runs, not what it computes.
FREE_TO_CHANGE = (
    "name",
    "mesh.",
    "checkpoint.",
    "faults.",
    "log.",
    "data.num_threads",
    "data.prefetch",
    "data.cache_bytes",
    "data.cache_dir",
    "train.eval_every",
    "train.eval_batches",
    "model.remat",
    "model.scan_layers",
)


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """What stands against resuming `old` as `new`: one line a field whose change would change the run."""
    before, after = flatten(old), flatten(new)
    free: tuple[str, ...] = FREE_TO_CHANGE
    if new.optimizer.schedule in ("constant", "wsd") and new.train.steps > old.train.steps:
        free = (*free, "train.steps")  # the schedule so far was the same: the run may go on for longer
    names = [n for n in {**before, **after} if before.get(n) != after.get(n)]
    return [f"{n}: {before.get(n)!r} then, {after.get(n)!r} now" for n in names if not n.startswith(free)]
