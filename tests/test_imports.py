"""The import rule: dependencies point one way, and importing the package or its command line does not load jax."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STANDARD_LIBRARY = set(sys.stdlib_module_names)

# What each part of llmos_jax may import of the others; itself is always allowed.
FOUNDATION = {"config", "files", "overrides", "sharding", "compiler"}
LIBRARY = FOUNDATION | {"models", "data", "runtime", "pallas_kernels"}
ALLOWED = {
    "__init__": set(),
    "config": set(),
    "files": set(),
    "overrides": {"config"},
    "sharding": {"config"},
    "compiler": {"config", "files", "sharding", "pallas_kernels"},
    "models": {"config", "files", "sharding", "compiler", "pallas_kernels"},
    "runtime": FOUNDATION | {"pallas_kernels"},
    "data": FOUNDATION | {"runtime"},
    "opening": LIBRARY,
    "train": LIBRARY | {"opening"},
    "plan": LIBRARY | {"opening", "train", "serve"},
    "serve": LIBRARY | {"opening"},
    "compress": LIBRARY | {"opening"},
}
OURS = {"llmos_jax", "pallas_kernels", "scripts", "configs", "tests"}


def imports(file: Path, inside_functions: bool = True) -> set[str]:
    """Full names of what `file` imports; `from a import b` counts as a.b, since b may be a module."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: imports are written in full"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        if inside_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse(file.read_text()))
    return found


def parts(names: set[str]) -> set[str]:
    """Of full names, the part of llmos_jax, or the package where it is another of ours."""
    answer = set()
    for name in names:
        package, _, rest = name.partition(".")
        if package in OURS:
            answer.add(rest.split(".")[0] if package == "llmos_jax" else package)
    return answer


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def part_of(file: Path) -> str:
    return file.relative_to(ROOT / "llmos_jax").parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", files("llmos_jax"), ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_one_way(file):
    part, used = part_of(file), parts(imports(file))
    assert not used & {"scripts", "configs", "tests"}
    if part in ALLOWED:
        assert used <= ALLOWED[part] | {part, "__version__"}


@pytest.mark.parametrize("file", files("pallas_kernels"), ids=lambda file: str(file.relative_to(ROOT)))
def test_kernels_stand_alone(file):
    packages = {name.split(".")[0] for name in imports(file)}
    assert packages <= STANDARD_LIBRARY | {"jax", "jaxtyping", "numpy", "pallas_kernels"}


@pytest.mark.parametrize("name", ["__init__", "config", "overrides"])
def test_a_configuration_needs_the_standard_library_only(name):
    packages = {n.split(".")[0] for n in imports(ROOT / "llmos_jax" / f"{name}.py")}
    assert packages <= STANDARD_LIBRARY | {"llmos_jax"}


@pytest.mark.parametrize("file", files("llmos_jax"), ids=lambda file: str(file.relative_to(ROOT)))
def test_other_frameworks_are_never_imported(file):
    assert not {name.split(".")[0] for name in imports(file)} & {"torch", "transformers", "tensorflow"}


@pytest.mark.parametrize("module", ["llmos_jax", "llmos_jax.config", "llmos_jax.overrides", "llmos_jax.cli"])
def test_loading_it_does_not_load_jax(module):
    check = (
        f"import sys, {module}; print([m for m in ('jax', 'numpy', 'flax', 'tensorstore', 'rich') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["llmos_jax.models.generate", "llmos_jax.opening", "llmos_jax.train.loop"])
def test_a_start_loads_nothing_that_only_some_need(module):
    """Kernels of chips that are not there, the templates of conversations, the package of one file format; for a program
    that was compiled before, what it was made of."""
    names = ["jax.experimental.pallas.tpu", "jax.experimental.pallas.mosaic_gpu", "jinja2", "gguf"]
    if module != "llmos_jax.train.loop":
        names += ["flax", "optax", "orbax"]
    check = f"import sys, {module}; print([m for m in {names} if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]"
