"""Which files are read and which are held out."""

import os

import numpy as np
import pytest

from sinkjax.train.corpus import find_files, read_documents
from sinkjax.train.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()


@pytest.fixture
def folder(tmp_path):
    for i in range(23):
        (tmp_path / f"part-{i}.txt").write_text(f"<{i}>" * (i + 1))
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "other.md").write_text("deep text")
    (tmp_path / ".hidden").write_text("not read")
    return tmp_path


def _texts(documents):
    return {documents[i].tobytes().decode() for i in range(len(documents))}


def test_default_is_the_standard_library_without_tests():
    root, names = find_files()
    assert "ast.py" in names and "json/decoder.py" in names
    assert names == sorted(names) and len(names) > 300
    assert not any(
        name.startswith(("test/", "site-packages/", "idlelib/idle_test/")) for name in names
    )
    assert (root / names[0]).is_file()


def test_split_is_by_file_disjoint_complete_and_stable(folder):
    train, validation = read_documents([str(folder)], BYTES, validation_fraction=0.2)
    everything = {p.read_text() for p in folder.rglob("*.txt")} | {"deep text"}
    assert _texts(train) | _texts(validation) == everything - {""}
    assert not _texts(train) & _texts(validation)
    assert len(validation) == 5  # ceil(0.2 * 24)
    # A glob of the same files from another working directory splits them alike.
    again = read_documents([str(folder / "**" / "*.txt")], BYTES, validation_fraction=0.2)[1]
    assert _texts(again) <= _texts(validation) | {"deep text"}


def test_moving_the_folder_changes_nothing(folder, tmp_path_factory):
    moved = tmp_path_factory.mktemp("moved") / "corpus"
    os.rename(folder, moved)
    here = read_documents([str(moved)], BYTES)[0].tokens
    os.rename(moved, folder)
    np.testing.assert_array_equal(here, read_documents([str(folder)], BYTES)[0].tokens)


def test_max_bytes_takes_whole_files_until_it_is_reached(folder):
    train, validation = read_documents([str(folder)], BYTES, max_bytes=200)
    total = len(train.tokens) + len(validation.tokens)
    assert 200 <= total < 200 + 96  # the largest file has 23 * 4 bytes
    assert _texts(train) | _texts(validation) < {p.read_text() for p in folder.rglob("*.*")}


def test_a_single_file_is_split_at_its_end(folder):
    path = folder / "part-20.txt"
    train, validation = read_documents([str(path)], BYTES, validation_fraction=0.1)
    assert len(validation.tokens) == 9  # ceil(0.1 * 84)
    assert np.concatenate([train.tokens, validation.tokens]).tobytes() == path.read_bytes()


def test_nothing_to_read_names_the_path(folder):
    with pytest.raises(ValueError, match="data.files.*no-such-"):
        read_documents([str(folder / "no-such-*")], BYTES)
    with pytest.raises(ValueError, match="data.files.*empty.txt.*empty"):
        read_documents([str(folder / "empty.txt")], BYTES)


def test_unreadable_file_names_the_path(folder, monkeypatch):
    from pathlib import Path

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    # Permissions do not stop root, under which containers run their tests.
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"cannot read .*part-\d+.txt \(Permission denied\)"):
        read_documents([str(folder / "part-*.txt")], BYTES)
