"""Text survives the way to ids and back, also when ids come one at a time."""

import sys

import numpy as np
import pytest

from sinkjax.train.tokenizer import ByteTokenizer, load_tokenizer

TEXT = "né 日本 🙂 end"


def test_bytes_round_trip_and_specials_have_no_text():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32
    assert ids.max() < tokenizer.bos_id == 256 and tokenizer.vocab_size == 257
    assert tokenizer.decode(np.concatenate([[256], ids, [257, 258]])) == TEXT
    assert tokenizer.encode_bytes(b"\xff\x00").tolist() == [255, 0]


def test_bytes_stream_never_cuts_a_character():
    decoder = ByteTokenizer().stream_decoder()
    parts = [decoder.push(int(i)) for i in ByteTokenizer().encode(TEXT)]
    assert "".join(parts) == TEXT
    assert set("".join(parts)) == set(TEXT) and "" in parts
    assert decoder.push(256) == "" and decoder.push(0xE6) == ""
    assert decoder.flush() == "\ufffd"


@pytest.fixture
def tokenizer_file(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.BPE()
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["sink tokens attend to the sink " * 7, TEXT], trainer)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_file_round_trip_stream_and_bos(tokenizer_file):
    tokenizer = load_tokenizer(str(tokenizer_file))
    assert tokenizer.bos_id == 1
    text = "the sink tokens " + TEXT
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and len(ids) < len(text.encode())
    assert 1 not in ids
    assert tokenizer.decode([1, *ids, tokenizer.vocab_size + 3]) == text
    decoder = tokenizer.stream_decoder()
    parts = [decoder.push(int(i)) for i in [1, *ids]]
    assert all("\ufffd" not in part for part in parts)
    assert "".join(parts) + decoder.flush() == text


def test_unknown_name_and_broken_file_are_named(tmp_path):
    pytest.importorskip("tokenizers")
    with pytest.raises(ValueError, match="tokenizer: expected 'bytes'.*no-such-file"):
        load_tokenizer("no-such-file")
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(ValueError, match="broken.json is not a tokenizer"):
        load_tokenizer(str(broken))


def test_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"sinkjax\[hf\]"):
        load_tokenizer("tokenizer.json")
