"""A folder is as it was written, or what is wrong with it has a name."""

import json

import pytest

from sinkjax.checksums import damage, write_checksums


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "params" / "d").mkdir(parents=True)
    (tmp_path / "params" / "d" / "data").write_bytes(b"123456789")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "empty").write_bytes(b"")
    (tmp_path / "unfinished").write_bytes(b"may still change")
    write_checksums(tmp_path, ["params", "train"])
    return tmp_path


def test_the_record_names_every_file_of_the_parts(folder):
    # CBF43926 is the check value of CRC-32 (ISO-HDLC) in every catalogue.
    record = json.loads((folder / "checksums.json").read_text())
    assert record["size and crc32"] == {
        "params/d/data": [9, 0xCBF43926],
        "train/empty": [0, 0],
    }
    assert damage(folder) == ""
    (folder / "unfinished").unlink()
    assert damage(folder) == ""


def test_what_is_wrong_has_a_name(folder):
    data = folder / "params" / "d" / "data"
    data.write_bytes(b"123456788")
    assert damage(folder) == "params/d/data: expected CRC-32 cbf43926, got bcf309b0"
    data.write_bytes(b"12345678")
    assert damage(folder) == "params/d/data: expected 9 bytes, got 8"
    data.unlink()
    assert damage(folder) == "params/d/data: No such file or directory"
    assert damage(folder, part="train/") == ""
    # Every file is in exactly one share.
    assert [bool(damage(folder, share=(i, 3))) for i in range(3)] == [True, False, False]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("9", "8", 1),
        lambda text: text.replace("data", "date"),
        lambda text: text.replace("[", "{", 1),
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: '{"size and crc32": {"a": 3}, "crc32 of them": 0}',
        lambda text: "",
    ],
)
def test_a_damaged_record_vouches_for_nothing(folder, change):
    file = folder / "checksums.json"
    file.write_text(change(file.read_text()))
    assert damage(folder).startswith("checksums.json: expected ")
    file.unlink()
    assert damage(folder) == "checksums.json, which is written last: No such file or directory"
