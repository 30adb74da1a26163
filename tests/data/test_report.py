"""What `llmos data` shows."""

import json

import pytest
from rich.console import Console

from llmos_jax.config import CleanConfig, DataConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig
from llmos_jax.data.pipeline import build_data
from llmos_jax.data.report import data_report, print_data_report


@pytest.fixture(scope="module")
def report(tmp_path_factory, tokenizer) -> dict:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"document [{i}] [bold]" + " word" * (i + 5))
    (folder / "copy.txt").write_text((folder / "3.txt").read_text())
    (folder / "short.txt").write_text("x")
    (folder / "picture.png").write_bytes(b"")
    config = RunConfig(
        name="demo",
        model=ModelConfig(vocab_size=257),
        train=TrainConfig(steps=10, batch_size=4, seq_len=100),
        data=DataConfig(
            sources=(SourceConfig(str(folder)),),
            eval_fraction=0.3,
            clean=CleanConfig(min_chars=5),
            cache_dir=str(folder / ".stores"),
        ),
    )
    return data_report(config, build_data(config, tokenizer), tokenizer, num_rows=2)


def test_the_report_is_json_and_its_numbers_add_up(report):
    assert json.loads(json.dumps(report)) == report
    (train,), (held_out,) = report["sources"], report["eval"]
    assert train["counts"] == held_out["counts"]
    assert (train["files"], train["files_left_out"]) == (32, 1)
    assert train["counts"]["documents"] == 32
    assert train["counts"]["exact_duplicate"] == train["counts"]["too_short"] == 1
    assert train["documents"] + held_out["documents"] == 30 == train["counts"]["kept"]
    assert train["tokens"] == train["bytes"] + train["documents"]  # a byte a token, and eos
    assert train["rows"] == train["tokens"] // 100
    assert train["share"] == 1
    assert train["epochs"] == 40 / train["rows"]
    assert report["tokens_of_run"] == 10 * 4 * 100


def test_rows_are_decoded_piece_by_piece(report):
    assert len(report["rows"]) == 2
    for pieces in report["rows"]:
        assert sum(piece["tokens"] for piece in pieces) == 100
        assert [piece["segment"] for piece in pieces] == list(range(1, len(pieces) + 1))
        assert all(piece["text"].startswith("document [") for piece in pieces[1:])


def test_the_report_prints_as_it_is(report):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_data_report(report, console)
    text = console.export_text()
    console.file.close()
    assert "Data of demo" in text
    assert "dropped: exact duplicate" in text
    assert "1 files of other kinds left out" in text
    assert "[bold]" in text  # square brackets of the text are not taken for markup
    assert "row 1:" in text
