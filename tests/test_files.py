"""Files that are there whole or not at all."""

import pytest

from llmos_jax import files


def test_a_file_is_there_whole_or_stays_as_it_was(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="half way"), files.draft_of(file) as draft:
        draft.write_bytes(b"ne")
        raise RuntimeError("half way")
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]
    with files.draft_of(file) as draft:
        draft.write_bytes(b"new")
        assert file.read_bytes() == b"old"
    assert file.read_bytes() == b"new" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("content", [b"", b"one line", b"two\nlines\n"])
def test_a_seal_tells_what_was_changed(tmp_path, content):
    file, magic = tmp_path / "a", b"kind-1"
    assert files.read_sealed(file, magic) is None
    whole = files.seal(magic, content) + content
    file.write_bytes(whole)
    assert files.read_sealed(file, magic) == content
    assert files.read_sealed(file, b"kind-2") is None
    for at in range(len(whole)):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert files.read_sealed(file, magic) is None, at
        file.write_bytes(whole[:at])
        assert files.read_sealed(file, magic) is None, at
