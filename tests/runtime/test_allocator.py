"""How malloc serves a process is decided before it starts: the command starts itself anew, once, as the same process."""

import os
import subprocess
import sys

import pytest

from llmos_jax import cli
from llmos_jax.runtime import allocator

linux = pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
CODE = "import os, sys; from llmos_jax.runtime import allocator; print(os.getpid(), flush=True); allocator.restart()"
CODE += "; print(os.environ['GLIBC_TUNABLES'], sys.argv[1:], sys.stdin.read())"


@linux
def test_a_command_starts_again_once_as_the_same_process(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    command = [sys.executable, "-c", CODE, "a b", "ü"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        said = process.communicate("asked", timeout=60)[0].splitlines()
    assert said[:2] == [str(process.pid)] * 2
    assert "glibc.malloc.hugetlb=1" in said[2] and said[2].endswith("['a b', 'ü'] asked")


def test_what_a_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    assert allocator.environment() == {}


@linux
@pytest.mark.parametrize(("command", "computes"), [("generate", True), ("models", False)])
def test_only_commands_that_compute_start_again(monkeypatch, tmp_path, command, computes):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setenv("LLMOS_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["llmos", command, *(["nothing", "asked"] if computes else [])])

    def exec_(program, arguments, environment):
        assert program == sys.executable and "hugetlb=1" in environment["GLIBC_TUNABLES"]
        raise SystemExit(99)

    monkeypatch.setattr(os, "execve", exec_)
    if computes:
        with pytest.raises(SystemExit, match="99"):
            cli.main()
    else:
        assert cli.main() == 0
