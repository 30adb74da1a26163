"""The script that fetches corpora: the Brown corpus as plain text, and folders that are whole or absent."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "fetch_corpus.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("fetch_corpus", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tagged_words_become_plain_text(script):
    tagged = (
        "\n\n\tThe/at 1/2/cd mile/nn ,/, he/pps said/vbd ,/, ``/`` won't/md* do/do ''/'' ./.\n"
        "(/( See/vb fig./nn 5/cd ./.\n)/)\n\n\n\tWhy/wrb ?/. ?/.\nIvan/np Allen/np Jr./np ./.\n"
    )
    assert script.brown_text(tagged) == (
        'The 1/2 mile, he said, "won\'t do". (See fig. 5.)\n\nWhy? Ivan Allen Jr.\n'
    )  # fmt: skip


def test_a_second_fetch_does_nothing_and_a_broken_one_is_not_complete(script, tmp_path, monkeypatch, capsys):
    def broken():
        yield "a.txt", "a"
        raise KeyboardInterrupt

    to = tmp_path / "corpora" / "mini"
    monkeypatch.setitem(script.CORPORA, "mini", broken)
    with pytest.raises(KeyboardInterrupt):
        script.fetch("mini", to)
    assert not to.exists()
    monkeypatch.setitem(script.CORPORA, "mini", lambda: iter([("a.txt", "a"), ("b/c.txt", "é")]))
    script.fetch("mini", to)
    assert sorted(str(path.relative_to(to)) for path in to.rglob("*.txt")) == ["a.txt", "b/c.txt"]
    assert "wrote 2 files, 3 bytes" in capsys.readouterr().out
    monkeypatch.setitem(script.CORPORA, "mini", broken)
    script.fetch("mini", to)
    assert "nothing to do" in capsys.readouterr().out


def test_the_standard_library_is_copied_without_its_tests(script):
    files = {name for name, _ in script.fetch_stdlib()}
    assert {"json/decoder.py", "os.py"} <= files
    assert not any(name.startswith(("test/", "site-packages/")) for name in files)
