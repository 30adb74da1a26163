"""Whatever a user gets wrong: one message on standard error that says what to do, exit code 2, and nothing lost."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from llmos_jax import opening
from llmos_jax.cli import main
from tests.end_to_end import runs
from tests.models import golden


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return runs.write_run(tmp_path_factory.mktemp("bad"))


@pytest.fixture(scope="module")
def trained(config) -> Path:
    """A workdir with checkpoints of steps 4, 8 and 12."""
    workdir = config.parent / "trained"
    assert main(["train", str(config), "--workdir", str(workdir)]) == 0
    return workdir


@pytest.fixture
def refused(capfd):
    """Runs a command that must be refused; gives the message."""

    def refused(*arguments) -> str:
        capfd.readouterr()
        assert main([str(a) for a in arguments]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert "Traceback" not in err
        place = f"llmos {arguments[0]}: "
        assert err.count(place) == 1
        return err[err.index(place) + len(place) :]

    return refused


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# The command line itself.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "run.py"], "--workdir"),
        (["train", "run.py", "--workdir", "w", "--stop-at", "0"], "must be at least 1"),
        (["generate", "model", "text", "--max-tokens", "many"], "invalid"),
        (["generate", "model", "text", "--temperature", "-1"], "must be 0 or more"),
        (["generate", "model", "text", "--temperature", "nan"], "must be 0 or more"),
        (["eval", "model", "--data", "x", "--format", "pdf"], "invalid choice: 'pdf'"),
    ],
)
def test_arguments_that_do_not_parse(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


# The configuration.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.stepz=10"], "did you mean 'train.steps'?"),
        (["optimizer.lr=1"], "there is no setting 'optimizer.lr'"),
        (["train.steps=ten"], "train.steps=ten: it takes a number"),
        (["train.steps=0"], "train.steps=0 must be at least 1"),
        (["mesh.tensor=3"], "mesh"),
        (["mesh.fsdp=1", "mesh.data=3"], "mesh"),
        (
            ["model.num_kv_heads=2", "mesh.tensor=4", "mesh.fsdp=2"],
            "mesh.tensor=4 does not divide model.num_kv_heads=2",
        ),
        (["train.batch_size=6"], "use a batch_size that is a multiple of 8"),
        (["train.seq_len=100"], "train.seq_len=100 is longer than model.max_seq_len=64"),
        (["data.sources.0.path=/nowhere/at/all"], "source '/nowhere/at/all' does not exist"),
        (["data.tokenizer="], "data.tokenizer is empty"),
        (["data.tokenizer=no-such-model"], "there is no model called no-such-model"),
        (["init_from=no-such-model"], "there is no model called no-such-model"),
        (["data.tokenizer_vocab_size=400"], "the tokenizer has"),
        (["data.tokenizer_vocab_size=100"], "a byte-level vocabulary of 100 is too small; use at least 257"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_settings_that_do_not_fit(refused, config, tmp_path, settings, message):
    said = refused("train", config, "--workdir", tmp_path / "w", "--set", *settings)
    assert message in said
    assert not (tmp_path / "w" / "metrics.jsonl").exists()
    assert not (tmp_path / "w" / "config.json").exists()


def test_a_refused_start_leaves_a_workdir_as_good_as_new(refused, config, tmp_path):
    """The tokenizer of the start that was refused is not that of the run which then begins."""
    train = ["train", config, "--workdir", tmp_path / "w"]
    refused(*train, "--set", "data.tokenizer_vocab_size=400")
    assert main([str(a) for a in [*train, "--stop-at", "1"]]) == 0
    assert opening.tokenizer_of(opening.find(str(tmp_path / "w"))).vocab_size == 312


def test_a_tokenizer_of_someone_else_is_left_alone(refused, config, tmp_path):
    (tmp_path / "w" / "tokenizer").mkdir(parents=True)
    (tmp_path / "w" / "tokenizer" / "tokenizer.json").write_text("mine")
    assert "is not from a run" in refused("train", config, "--workdir", tmp_path / "w")
    assert contents(tmp_path / "w") == {"tokenizer/tokenizer.json": b"mine"}


def test_a_configuration_that_is_not_there(refused, config, tmp_path):
    assert "there is no configuration" in refused("train", config.parent / "runn.py", "--workdir", tmp_path / "w")
    assert "run.py" in refused("config", config.parent / "runn.py")


def test_a_configuration_that_fails(refused, tmp_path):
    (tmp_path / "broken.py").write_text("def get_config():\n    return 1 / 0\n")
    assert "ZeroDivisionError" in refused("config", tmp_path / "broken.py")
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    assert "SyntaxError" in refused("train", tmp_path / "broken.py", "--workdir", tmp_path / "w")


# The corpus.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "has no text files"),
        (lambda path: path.write_text(""), "holds no text (1 blank documents)"),
        (lambda path: path.write_text("a"), "fewer than one row of train.seq_len=32"),
        (lambda path: path.write_bytes(b"good \xff\xfe bad" * 100), "is not UTF-8: byte 0xff at offset 5"),
    ],
    ids=["an empty folder", "an empty file", "too little", "not text"],
)
def test_a_corpus_that_is_none(refused, config, tmp_path, make, message):
    make(tmp_path / "text")
    settings = [f"data.sources.0.path={tmp_path / 'text'}", "data.eval_fraction=0"]
    assert message in refused("train", config, "--workdir", tmp_path / "w", "--set", *settings)


def test_text_to_measure_on_that_is_not_there(refused, trained):
    assert "does not exist" in refused("eval", trained, "--data", "/nowhere/at/all")


# Models.


@pytest.fixture
def model(trained, tmp_path) -> Path:
    folder = tmp_path / "model"
    assert main(["export", str(trained), "--to", str(folder)]) == 0
    return folder


def every_use(refused, model) -> Iterator[str]:
    """The messages of each command that opens a model."""
    yield refused("generate", model, "the cat")
    yield refused("eval", model, "--data", __file__)
    yield refused("export", model, "--to", f"{model}-exported")
    assert not Path(f"{model}-exported").exists()


def test_a_model_that_is_not_there(refused):
    for message in every_use(refused, "no-such-model"):
        assert "there is no model called no-such-model" in message
    for message in every_use(refused, "hf:nobody/nothing"):
        assert "hf:nobody/nothing is not pulled; run `llmos pull hf:nobody/nothing`" in message


def test_weights_cut_short(refused, model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    for message in every_use(refused, model):
        assert "model.safetensors is damaged or cut short" in message


def test_a_gguf_of_another_architecture(refused, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "rwkv7")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for message in every_use(refused, tmp_path / "other.gguf"):
        assert "rwkv7" in message
        assert "llama" in message


def test_a_tokenizer_of_another_model(refused, model):
    described = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(described | {"vocab_size": 300}))
    for message in every_use(refused, model):
        assert "the tokenizer has 312 tokens but the model embeds 300" in message


def test_a_model_without_a_tokenizer(refused, tmp_path):
    stored = golden.load("llama")
    folder = golden.write_folder(tmp_path / "bare", stored.config, stored.tensors)
    for message in every_use(refused, folder):
        assert "has no tokenizer" in message


def test_a_prompt_that_does_not_fit(refused, trained):
    assert "the model's context is 64; shorten it" in refused("generate", trained, "the cat sat on a mat. " * 40)
    assert "the prompt is empty" in refused("generate", trained, "")
    assert "has no chat template" in refused("generate", trained, "the cat", "--chat")


def test_a_pull_of_nothing(refused, tmp_path):
    assert "holds no" in refused("pull", tmp_path)
    assert "nowhere" in refused("pull", "/nowhere/at/all")


def test_an_export_to_a_folder_in_use(refused, trained, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "exists and is not empty; choose another folder" in refused("export", trained, "--to", tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"thesis.txt": b"years of work"}
    assert "thesis.txt" in refused("export", trained, "--to", tmp_path / "mine" / "thesis.txt")
    assert contents(tmp_path / "mine") == {"thesis.txt": b"years of work"}


# The workdir.


@pytest.fixture
def workdir(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "w"))


def test_another_configuration_on_a_workdir_in_use(refused, config, workdir):
    before = contents(workdir)
    said = refused("train", config, "--workdir", workdir, "--set", "optimizer.learning_rate=5", "model.num_layers=3")
    assert "optimizer.learning_rate: 0.01 then, 5.0 now" in said
    assert "model.num_layers: 2 then, 3 now" in said
    assert "train in a new --workdir" in said
    assert contents(workdir) == before


def test_a_workdir_that_cannot_be_written(refused, config, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "cannot be" in refused("train", config, "--workdir", tmp_path / "file")
    assert "cannot be" in refused("train", config, "--workdir", tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"
    assert "cannot be" in refused("train", config, "--workdir", "/proc/llmos")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_workdir_without_permission(refused, config, tmp_path):
    (tmp_path / "theirs").mkdir(mode=0o500)
    assert "Permission denied" in refused("train", config, "--workdir", tmp_path / "theirs" / "w")


def test_text_that_has_changed_since(refused, config, tmp_path):
    shutil.copytree(config.parent / "corpus", tmp_path / "corpus")
    train = ["train", config, "--workdir", tmp_path / "w", "--set", f"data.sources.0.path={tmp_path / 'corpus'}"]
    assert main([str(a) for a in [*train, "train.steps=4"]]) == 0
    (tmp_path / "corpus" / "00.txt").write_text("something else entirely. " * 30)
    assert "has changed since; restore it" in refused(*train, "train.steps=8")


# Checkpoints.


def damage(workdir: Path, step: int) -> None:
    """Flips a bit in the largest file."""
    file = max((workdir / "checkpoints" / str(step)).rglob("*"), key=lambda f: f.stat().st_size if f.is_file() else 0)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(config, workdir, capfd):
    damage(workdir, 12)
    assert main(["train", str(config), "--workdir", str(workdir)]) == 0
    said = capfd.readouterr().err
    assert "step 12/12  checkpoint damaged" in said
    assert "Traceback" not in said
    assert runs.events(workdir, "resumed")[-1]["step"] == 8
    assert (workdir / "checkpoints" / "12.damaged").is_dir()  # kept, for whoever wants to look
    assert runs.params(workdir)[0] == 12


def test_a_damaged_checkpoint_is_not_asked(workdir, trained, capfd):
    damage(workdir, 12)
    before = contents(workdir)
    assert main(["generate", str(workdir), "the cat", "--max-tokens", "4"]) == 0
    assert contents(workdir) == before


def test_damaged_checkpoints_and_no_other(refused, config, workdir):
    for step in (4, 8, 12):
        damage(workdir, step)
    assert "there is no whole checkpoint" in refused("generate", workdir, "the cat")
    kept = contents(workdir / "checkpoints")
    for _ in range(2):  # to repeat the command does not make it begin anew
        said = refused("train", config, "--workdir", workdir)
        assert "every checkpoint in" in said
        assert "is damaged (steps 4, 8, 12" in said
    assert sorted(contents(workdir / "checkpoints").values()) == sorted(kept.values())


def test_a_workdir_that_has_saved_nothing_yet(refused, trained, tmp_path):
    (tmp_path / "w").mkdir()
    shutil.copy(trained / "metrics.jsonl", tmp_path / "w")
    for message in every_use(refused, tmp_path / "w"):
        assert "without a checkpoint yet" in message


# A full disk.


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "llmos-test", str(folder)]
    if (
        os.geteuid()
        or not shutil.which("mount")
        or subprocess.run(command, capture_output=True, check=False).returncode
    ):
        pytest.skip("cannot mount a file system here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def check_full(code: int, said: str, workdir: Path) -> None:
    assert code == 2, said
    assert "Traceback" not in said
    (message,) = [line for line in said.splitlines() if line.startswith("llmos train:")]
    assert "a checkpoint could not be written" in message
    assert "run the same command again to go on" in message
    step, found = runs.params(workdir)
    assert step >= 4
    assert all(np.isfinite(value).all() for value in found.values())


def test_a_disk_that_fills_up(config, small_disk):
    workdir = small_disk / "w"
    train = ["train", config, "--workdir", workdir]
    code, _, said = runs.finish(runs.start(*train, "--stop-at", "4"))
    assert code == 0, said
    room = shutil.disk_usage(small_disk).free
    (small_disk / "ballast").write_bytes(bytes(max(room - 64 * 2**10, 0)))
    code, _, said = runs.finish(runs.start(*train))
    check_full(code, said, workdir)
    (small_disk / "ballast").unlink()
    code, _, said = runs.finish(runs.start(*train))
    assert code == 0, said
    assert runs.params(workdir)[0] == 12


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))  # of every file, as if the disk were full
from llmos_jax import opening
from llmos_jax.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_files_that_cannot_grow(config, workdir):
    """Where no file system can be mounted: the same, by a limit on the size of a file."""
    shutil.rmtree(workdir / "checkpoints" / "8")
    shutil.rmtree(workdir / "checkpoints" / "12")
    code = LIMITED.replace("LIMIT, LIMIT", f"{48 * 2**10}, {48 * 2**10}")
    command = [sys.executable, "-c", code, "train", str(config), "--workdir", str(workdir)]
    done = subprocess.run(command, env=runs.environment(1), capture_output=True, text=True, timeout=90, check=False)
    check_full(done.returncode, done.stderr, workdir)


# The server.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "no-such-model"], "no-such-model"),
        (["serve", "{model}", "--max-model-len", "100000"], "max_model_len=100000 is more than the model's context"),
        (["serve", "{model}", "--max-step-tokens", "8"], "max_step_tokens=8 is less than max_sequences=16"),
        (["serve", "{model}", "--adapter", "x"], "is not NAME=FOLDER"),
        (["serve", "{model}", "{model}"], "the same name"),
        (["serve", "{model}", "--tls-key", "key.pem"], "TLS needs both"),
        (["serve", "{model}", "--host", "0.0.0.0"], "key"),
        (["keys", "revoke", "nobody"], "nobody"),
        (["replay", "nothing"], "does not exist; name the server's database with --db"),
        (["bench", "serve", "--model", "m", "--prompt", "odd:1"], "odd"),
    ],
)
def test_a_server_that_cannot_start_says_why(arguments, message, trained, tmp_path, refused):
    database = ["--db", tmp_path / "serve.sqlite"] if arguments[0] != "bench" else []
    told = refused(*(str(trained) if text == "{model}" else text for text in arguments), *database)
    assert message in told
