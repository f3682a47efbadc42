"""Files are whole or not there, and an error names the path."""

import errno
import os
import stat
import subprocess
import sys

import pytest

from sinkjax import files
from sinkjax.files import open_whole, write_whole


def test_the_folder_is_made_and_the_content_is_as_given(tmp_path):
    path = tmp_path / "new" / "deep" / "page.html"
    assert write_whole(path, "né\r\n→\n") == path
    assert path.read_bytes() == "né\r\n→\n".encode()
    assert write_whole(str(path), b"\x00\xff") == path
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(path.parent) == ["page.html"]
    # As any other new file: not private, as temporary files often are.
    other = tmp_path / "other"
    other.write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path):
    path = write_whole(tmp_path / "config.json", "old")
    with open_whole(path) as file:
        file.write(b"ne")
        assert path.read_text() == "old"
        file.write(b"w")
    assert path.read_text() == "new"


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, name):
    path = write_whole(tmp_path / "config.json", "old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, name, full)
    with pytest.raises(OSError, match="No space left.*config.json") as error:
        write_whole(path, "new")
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(path))
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), ValueError("no"), OSError("5 of 9")])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    path = write_whole(tmp_path / "stream.npz", "old")
    with pytest.raises(type(failure)) as error:
        with open_whole(path) as file:
            file.write(b"half")
            raise failure
    if isinstance(failure, OSError):  # one without a number keeps its words and gets the path
        assert str(error.value) == f"{path}: 5 of 9"
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["stream.npz"]


def test_a_full_disk(tmp_path):
    """A real write error (RLIMIT_FSIZE), in the middle of the content."""
    path = write_whole(tmp_path / "a", "old")
    program = f"""
import resource, signal, sys
sys.path[:0] = {[p for p in sys.path if p]!r}
from sinkjax.files import write_whole
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_whole({str(path)!r}, b"x" * 100_000)
except OSError as error:
    print("refused", error.filename)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == f"refused {path}"
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a"]


def test_a_path_that_cannot_be_is_named(tmp_path):
    taken = tmp_path / "taken"
    write_whole(taken / "old", "old")
    with pytest.raises(IsADirectoryError, match="taken") as error:
        write_whole(taken, "new")
    assert error.value.filename == str(taken)
    below = taken / "old" / "below.json"
    with pytest.raises(OSError, match="below.json") as error:
        write_whole(below, "new")
    assert error.value.filename == str(below)
    assert (taken / "old").read_text() == "old"
    assert os.listdir(tmp_path) == ["taken"] and os.listdir(taken) == ["old"]
