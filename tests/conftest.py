"""What every test shares: eight simulated devices, a store of compiled programs, checked shapes, a home of its own.

Environment: LLMOS_TEST_PLATFORM (default cpu; "cuda" runs the tests marked gpu) and LLMOS_TEST_CACHE, the folder of
compiled programs. All of it must be set before jax is first imported, so nothing here imports it at the top.
"""

import gc
import os
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

PLATFORM = os.environ.get("LLMOS_TEST_PLATFORM", "cpu")
CACHE = os.environ.get("LLMOS_TEST_CACHE") or str(Path(__file__).parents[1] / ".pytest_cache" / "jax")

os.environ["JAX_PLATFORMS"] = PLATFORM
os.environ.setdefault("PJRT_NPROC", "32")  # threads enough for eight devices to meet in a collective, on any machine
os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ.setdefault("LLMOS_CACHE_BYTES", "0")  # jax's cache outlives a session; the tests of ours turn it on
if PLATFORM == "cpu":
    # Tiny programs spend their time in the compiler, which is five times as fast without LLVM's optimisation.
    flags = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
    if version("jaxlib").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")  # later ones do not know it, and refuse to start
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])

# Tracing makes millions of objects that live long: looking through them all the time took an eighth of warm tests (docs/log.md).
gc.set_threshold(100_000, 20, 50)

# Every shape and dtype that the modules with arrays declare is checked while they are traced.
ARRAY_MODULES = [f"llmos_jax.models.{name}" for name in ("layers", "attention", "moe", "decoder", "generate")]
install_import_hook([*ARRAY_MODULES, "llmos_jax.train", "pallas_kernels"], "beartype.beartype")

# The same examples in every run: a failure can be repeated, and compiled programs are found again. A failing example is
# not made smaller: each smaller one would be compiled too, and the cases are drawn from small values anyway.
settings.register_profile(
    "llmos",
    deadline=None,
    derandomize=True,
    max_examples=50,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("llmos")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and PLATFORM == "cpu":
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU; set LLMOS_TEST_PLATFORM=cuda"))


@pytest.fixture(scope="session", autouse=True)
def llmos_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nothing is read from or written to the home of whoever runs the tests."""
    home = tmp_path_factory.mktemp("llmos-home")
    os.environ["LLMOS_HOME"] = str(home)
    return home


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the shape checks of the tests, as a user calls: for the errors that a function raises itself."""
    monkeypatch.setattr(jaxtyping_config, "jaxtyping_disable", True)


@pytest.fixture
def eight_devices() -> list:
    import jax

    if len(jax.devices()) < 8:
        pytest.skip("needs eight devices")
    return jax.devices()[:8]


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home whose cache of compiled programs is on, empty, and has told nothing yet."""
    from llmos_jax.compiler import cache

    monkeypatch.setenv("LLMOS_HOME", str(tmp_path))
    monkeypatch.setenv("LLMOS_CACHE_BYTES", "1000000000")
    monkeypatch.setattr(cache, "_said", set())
    return tmp_path
