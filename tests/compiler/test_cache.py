"""Executables on disk: found again by what they are, distrusted when damaged, shared by processes, bounded."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llmos_jax.compiler import cache, identity, watch
from llmos_jax.compiler.program import Program
from llmos_jax.config import MeshConfig, UserError
from llmos_jax.sharding import replicated
from tests import tiny

WHOLE = PartitionSpec()


@pytest.fixture(autouse=True)
def home(empty_cache: Path) -> Path:
    return empty_cache


def update(factor, state, x):
    return {"w": state["w"] * factor + x}, jnp.sum(x)


def other(factor, state, x):
    return {"w": state["w"] - factor * x}, jnp.sum(x)


def program(mesh=None, spec=WHOLE, shape=(64,), dtype=jnp.float32, **changes) -> Program:
    mesh = mesh or tiny.mesh(data=1)
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    plain = Program("update", update, (2, MeshConfig()), ({"w": x}, x), mesh, (0,), None, ())
    return dataclasses.replace(plain, **({"static": (2,)} | changes))


def files(home: Path) -> list[Path]:
    return sorted((home / "executables").glob("*.executable"))


def run(executable, factor=2):
    w, x = jnp.arange(64.0), jnp.ones(64)
    new, total = executable({"w": w}, x)
    np.testing.assert_array_equal(new["w"], np.arange(64.0) * factor + 1)
    assert total == 64
    return w, x


# What a program is.


def changed_programs():
    leaf = program().args[1]
    return {
        "name": program(name="downdate"),
        "function": program(function=other),
        "static": program(static=(3,)),
        "static_type": program(static=(2.0,)),
        "more_static": program(static=(2, MeshConfig())),
        "static_function": program(static=(2, other)),
        "another_function": program(static=(2, update)),
        "static_inside": program(static=(2, MeshConfig(tensor=2))),
        "shape": program(shape=(128,)),
        "dtype": program(dtype=jnp.bfloat16),
        "structure": program(args=({"v": leaf}, leaf)),
        "donate": program(donate=()),
        "out_shardings": program(out_shardings=replicated(tiny.mesh(data=1))),
        "options": program(options=(("xla_cpu_enable_fast_math", True),)),
        "mesh_axes": program(tiny.mesh(data=8)),
        "mesh_names": program(tiny.mesh(tensor=8)),
        "spec": program(tiny.mesh(data=8), PartitionSpec("data")),
        "devices": program(jax.sharding.Mesh(tiny.mesh(data=8).devices[::-1], tiny.mesh(data=8).axis_names)),
    }


@pytest.mark.usefixtures("eight_devices")
def test_each_ingredient_makes_another_identity():
    programs = {"plain": program()} | changed_programs()
    found = {name: identity.identity(one) for name, one in programs.items()}
    assert len(set(found.values())) == len(found), found
    assert found["plain"] == identity.identity(program()), "the same program, described twice"


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.setenv("XLA_FLAGS", "--xla_anything"),
        lambda m: m.setenv("LIBTPU_INIT_ARGS", "--xla_anything"),
        lambda m: m.setattr(identity, "versions", lambda: {"jax": "0.0.1"}),
        lambda m: m.setattr(identity, "cpu_features", lambda: "another host"),
        lambda m: m.setattr(identity, "source_digest", lambda module: "another text"),
        lambda m: m.setattr(jax, "process_index", lambda: 1),
        lambda m: m.setattr(jax, "process_count", lambda: 2),
    ],
)
def test_the_surroundings_make_another_identity(monkeypatch, change):
    before = identity.identity(program())
    change(monkeypatch)
    assert identity.identity(program()) != before


def test_jax_settings_make_another_identity_but_not_where_jax_keeps_things():
    before = identity.identity(program())
    with jax.default_matmul_precision("highest"):
        assert identity.identity(program()) != before
    with jax.log_compiles():
        assert identity.identity(program()) == before


def test_every_source_file_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "TOP", tmp_path)
    names = ["llmos_jax/a.py", "llmos_jax/deep/er/b.py", "pallas_kernels/c.py", "pallas_kernels/tuned/chip.json"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    digest = identity.source_digest.__wrapped__
    seen = [digest("math")]
    for name in names:
        (tmp_path / name).write_text("2")
        seen.append(digest("math"))
    (tmp_path / names[0]).rename(tmp_path / "llmos_jax/z.py")
    assert len({*seen, digest("math")}) == len(names) + 2
    assert digest(__name__) != digest("math"), "a function of another package brings its module's text"


def test_an_object_without_a_lasting_description_is_refused():
    with pytest.raises(ValueError, match="names an object by its address"):
        identity.identity(program(static=(object(),)))


# What comes back.


def test_what_was_compiled_is_loaded_and_is_the_same(home):
    built = program().compile()
    with watch.CompileWatch() as compiled:
        loaded = program().compile()
    assert (built.from_cache, loaded.from_cache, compiled.names) == (False, True, [])
    assert loaded.memory == built.memory
    assert loaded.peak_bytes == pytest.approx(2 * 64 * 4 + 4, abs=64)  # w that becomes the result, x, the sum
    assert loaded.hlo == built.hlo and "f32[64]" in loaded.hlo
    for executable in (built, loaded):
        w, x = run(executable)
        assert w.is_deleted() and not x.is_deleted(), "donation is part of what is stored"
    with pytest.raises(TypeError, match="differ from the types"):
        loaded({"w": jnp.ones(32)}, jnp.ones(32))
    assert len(files(home)) == 1 and files(home)[0].stat().st_mode & 0o077 == 0


@pytest.mark.usefixtures("eight_devices")
@pytest.mark.parametrize("first", [0, 4])
def test_programs_of_several_devices_come_back_on_theirs(first):
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[first : first + 4])
    place = NamedSharding(mesh, PartitionSpec("data"))
    built, loaded = (program(mesh, PartitionSpec("data")).compile() for _ in range(2))
    assert loaded.from_cache and not built.from_cache
    w, x = jax.device_put((np.arange(64, dtype=np.float32), np.ones(64, np.float32)), place)
    new, total = loaded({"w": w}, x)
    np.testing.assert_array_equal(new["w"], np.arange(64) * 2 + 1)
    assert total == 64 and new["w"].devices() == set(mesh.devices.flat)


def rewritten(change):
    return lambda file: file.write_bytes(change(bytearray(file.read_bytes())))


def flipped(where: float):
    def flip(content: bytearray) -> bytearray:
        content[int(where * (len(content) - 1))] ^= 0x10
        return content

    return rewritten(flip)


DAMAGE = {
    "seal": flipped(0.0),
    "header": rewritten(lambda content: content.replace(b'"program": "update"', b'"program": "upbeat"')),
    "middle": flipped(0.5),
    "end": flipped(1.0),
    "cut": rewritten(lambda content: content[: len(content) // 2]),
    "empty": rewritten(lambda content: b""),
    "foreign": rewritten(lambda content: b"a file of somebody else"),
    "format": rewritten(lambda content: content.replace(cache.MAGIC, b"llmos-executable-0", 1)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_said_and_mended(home, capfd, kind):
    program().compile()
    [file] = files(home)
    before = file.read_bytes()
    DAMAGE[kind](file)
    assert file.read_bytes() != before
    rebuilt = program().compile()
    assert not rebuilt.from_cache
    run(rebuilt)
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "is removed and compiled again" in said
    again = program().compile()
    assert again.from_cache
    run(again)


def test_an_entry_under_another_name_is_not_taken(home):
    program().compile()
    [file] = files(home)
    file.rename(file.with_stem(identity.identity(program(static=(3,)))))
    tripled = program(static=(3,)).compile()
    assert not tripled.from_cache
    run(tripled, factor=3)


def test_an_executable_that_the_runtime_refuses_is_rebuilt(home, monkeypatch, capfd):
    program().compile()

    def refuse(*_, **__):
        raise RuntimeError("built for another runtime\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(cache.serialize_executable, "deserialize_and_load", refuse)
        run(program().compile())
    assert "(built for another runtime)" in capfd.readouterr().err
    assert program().compile().from_cache


# Where there can be no cache, things are compiled.


def test_a_folder_that_others_can_write_is_not_trusted(home, capfd):
    program().compile()
    (home / "executables").chmod(0o777)
    executable = program(static=(3,)).compile()
    assert not program().compile().from_cache and not executable.from_cache
    assert len(files(home)) == 1
    assert capfd.readouterr().err.count("others may write") == 1


def test_what_cannot_be_stored_still_runs(home, monkeypatch, capfd):
    def fail(*_):
        raise ValueError("Compilation does not support serialization")

    monkeypatch.setattr(cache.serialize_executable, "serialize", fail)
    run(program().compile())
    assert files(home) == [] and "the update program is not cached" in capfd.readouterr().err


def test_a_home_that_cannot_be_made_only_costs_time(home, monkeypatch, capfd):
    (home / "file").touch()
    monkeypatch.setenv("LLMOS_HOME", str(home / "file" / "inside"))
    run(program().compile())
    assert "are not cached" in capfd.readouterr().err


def test_of_described_devices_what_the_compiler_said_is_kept(home, monkeypatch):
    here = tiny.mesh(data=1)
    assert cache.can_load(here)
    twin = SimpleNamespace(platform="cpu", device_kind="cpu", id=0)
    absent = SimpleNamespace(platform="tpu", device_kind="TPU v5p", id=0)
    for described in (twin, absent):
        assert not cache.can_load(SimpleNamespace(devices=np.array([described])))
    monkeypatch.setattr(cache, "can_load", lambda mesh: False)
    first, second = program().compile(), program().compile()
    assert second.from_cache and second.compiled is None
    assert (second.memory, second.hlo) == (first.memory, first.hlo)


def test_the_size_limit_is_checked(home, monkeypatch):
    monkeypatch.setenv("LLMOS_CACHE_BYTES", "0")
    program().compile()
    assert not (home / "executables").exists()
    monkeypatch.setenv("LLMOS_CACHE_BYTES", "10g")
    with pytest.raises(UserError, match="LLMOS_CACHE_BYTES=10g is not a number of bytes"):
        program().compile()


# Bounded.


def test_the_longest_unused_go_first(home, monkeypatch):
    for day, factor in enumerate((2, 3, 4)):
        program(static=(factor,)).compile()
        newest = max(files(home), key=lambda file: file.stat().st_mtime)
        os.utime(newest, (day + 1, day + 1))
    assert program(static=(2,)).compile().from_cache  # used now, so 3 is the oldest
    size = sum(file.stat().st_size for file in files(home))
    monkeypatch.setenv("LLMOS_CACHE_BYTES", str(size + 100))
    program(static=(5,)).compile()
    left = {file.stem for file in files(home)}
    assert left == {identity.identity(program(static=(factor,))) for factor in (2, 4, 5)}


def test_pruning_by_age_and_of_strangers(home):
    old, new = program(static=(2,)), program(static=(3,))
    old.compile(), new.compile()
    stranger = home / "executables" / "notes.executable"
    stranger.write_text("hello")
    draft = home / "executables" / ".x.1.tmp"
    draft.touch()
    os.utime(draft, (1, 1))
    two_days_ago = time.time() - 2 * 86_400
    os.utime(home / "executables" / f"{identity.identity(old)}.executable", (two_days_ago, two_days_ago))
    removed = {entry.file.stem for entry in cache.prune(unused_for=86_400.0)}
    assert removed == {identity.identity(old), "notes"} and not draft.exists()
    [entry] = cache.entries()
    assert entry.header["program"] == "update" and entry.header["target"] == "cpu:1"
    assert [entry.file for entry in cache.prune(limit=0)] == [entry.file] and files(home) == []


# Several processes.

BOTH = """
import sys, time
import jax, jax.numpy as jnp
from llmos_jax.compiler.program import Program
from llmos_jax.config import MeshConfig
from llmos_jax.sharding import make_mesh, replicated
import slow

mesh = make_mesh(MeshConfig(), jax.devices()[:1])
x = jax.ShapeDtypeStruct((4,), jnp.float32, sharding=replicated(mesh))
print("ready", flush=True)
sys.stdin.readline()
executable = Program("slow", slow.slow, (), (x,), mesh).compile()
print(executable.from_cache, float(executable(jnp.ones(4))[0]))
"""


def test_of_two_processes_at_once_one_compiles(home):
    (home / "slow.py").write_text(
        "import time\nfrom pathlib import Path\n\ndef slow(x):\n    time.sleep(1.5)\n"
        "    with Path(__file__).with_name('traced').open('a') as file:\n        file.write('x')\n    return 3 * x\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(home)])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    both = [subprocess.Popen([sys.executable, "-c", BOTH], **pipes) for _ in range(2)]
    try:
        assert [one.stdout.readline() for one in both] == ["ready\n"] * 2
        for one in both:
            one.stdin.write("go\n")
            one.stdin.flush()
        answers = sorted(one.communicate(timeout=50)[0].strip() for one in both)
    finally:
        for one in both:
            one.kill()
            one.wait()
    assert answers == ["False 3.0", "True 3.0"]
    assert (home / "traced").read_text() == "x"


THREADS = """
import sys, threading
import jax, jax.numpy as jnp
from llmos_jax.compiler.program import Program
from llmos_jax.config import MeshConfig
from llmos_jax.sharding import make_mesh, replicated
import traced

mesh = make_mesh(MeshConfig(), jax.devices()[:1])
x = jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=replicated(mesh))
quick, late = (Program(f.__name__, f, (), (x,), mesh) for f in (traced.quick, traced.late))

def compile_quick():
    executables["quick"] = quick.compile()
    traced.quick_is_compiled.set()

executables = {}
if sys.argv[1] == "fill":  # jax's cache, by a user of the same functions
    for event in (traced.late_began, traced.quick_is_compiled):
        event.set()
    for program in (quick, late):
        program.lower().compile()
else:
    thread = threading.Thread(target=compile_quick)
    thread.start()
    if sys.argv[1] == "compile":  # else nothing is traced
        assert traced.quick_began.wait(60)
    executables["late"] = late.compile()
    thread.join()
for name, executable in sorted(executables.items()):
    print(name, executable.from_cache, float(executable(jnp.ones((32, 32)))[0, 0]))
"""

TRACED = """
import threading
import jax.numpy as jnp
quick_began, late_began, quick_is_compiled = (threading.Event() for _ in range(3))

def quick(x):
    quick_began.set()
    assert late_began.wait(60)
    return 2 * x

def late(x):
    late_began.set()
    assert quick_is_compiled.wait(60)
    return jnp.cumsum(jnp.sort(x, axis=0) @ x, axis=1)
"""


def test_threads_that_compile_at_once_all_store_what_runs_elsewhere(home):
    """One begins while another is at it and ends after it, and jax's own cache on disk has the program already."""
    (home / "traced.py").write_text(TRACED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(home)])}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(home / "jax"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    told = []
    for mode in ("fill", "compile", "load"):
        command = [sys.executable, "-c", THREADS, mode]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, f"{mode}: {done.stderr[-2000:]}"
        told.append(done.stdout.split("\n")[:-1])
    assert list((home / "jax").glob("jit_late*")), "jax's cache was not filled, so nothing is tested"
    assert told == [[], ["late False 32.0", "quick False 2.0"], ["late True 32.0", "quick True 2.0"]]


def test_a_lock_that_is_never_released_is_not_waited_for_for_ever(home, monkeypatch):
    import fcntl

    monkeypatch.setattr(cache, "LONGEST_WAIT", 0.2)
    (home / "executables").mkdir(mode=0o700)
    lock = home / "executables" / f".{identity.identity(program())}.lock"
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        started = time.monotonic()
        run(program().compile())
        assert time.monotonic() - started >= 0.2
    assert program().compile().from_cache
    assert lock.exists(), "it belongs to whoever holds it"


# Compilations that should not be.


def test_a_watch_hears_each_compilation_between_start_and_stop(monkeypatch):
    def compile_something(size: int) -> None:
        jax.jit(jnp.sin).lower(jax.ShapeDtypeStruct((size,), jnp.float32)).compile()

    heard = []
    watcher = watch.CompileWatch(lambda name, seconds: heard.append((name, seconds)))
    compile_something(3)
    with watcher:
        compile_something(5)
        with watcher.pause():
            compile_something(7)
        compile_something(9)
        monkeypatch.setattr(watch, "strict", True)
        with pytest.raises(watch.Recompiled, match=r"sin.* was compiled after warm-up"):
            compile_something(11)
    compile_something(13)
    assert watcher.count == len(heard) == 3 and all("sin" in name and seconds > 0 for name, seconds in heard)
