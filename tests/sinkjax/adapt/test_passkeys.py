"""Passkey rows: what lies where, which targets count, and that a row is a pure function."""

import dataclasses

import numpy as np
import pytest

from sinkjax.adapt import Passkeys, text_passkeys, toy_passkeys
from sinkjax.train import ByteTokenizer
from sinkjax.train.data import Rows

TASK = Passkeys(
    haystack=np.arange(100, 137),
    length=61,
    words=((10,), (11, 12), (13,)),
    intro=((1, 20), (1, 21), (1, 22)),
    answer=((3, 20), (3, 21), (3, 22)),
    question=(2, 4),
    prefix=(0,),
    outro=(5,),
    words_per_passkey=2,
    depths=(0.2, 0.7),
)


def parts(task, index):
    """(haystack with the passkeys cut out, passkeys by place, answer) of a row, read off its ids."""
    batch = task.rows(np.array([index]))
    end = int(batch["segment_ids"][0].sum())
    ids = [*batch["tokens"][0, :end].tolist(), int(batch["targets"][0, end - 1])]
    assert ids[0] == 0
    asked = ids.index(2)
    body, found, hay = ids[1:asked], {}, []
    while body:
        if body[0] == 1:
            close = body.index(5)
            found[body[1]] = (len(hay), body[2:close])
            body = body[close + 1 :]
        else:
            hay.append(body.pop(0))
    return hay, found, ids[asked:]


def test_a_row_is_a_haystack_with_passkeys_and_their_answer():
    depths = []
    for index in range(20):
        hay, found, tail = parts(TASK, index)
        assert set(found) == {20, 21, 22}
        want = [2, 4]
        for name in (20, 21, 22):
            place, key = found[name]
            depths.append(place / len(hay))
            want += [3, name, *key]
            assert len([i for i in key if i != 12]) == 2  # two words, one of them of two ids
        assert tail == want
        steps = np.diff(hay)  # a piece of the haystack, going round at its end
        assert set(steps) <= {1, -36} and all(100 <= i < 137 for i in hay)
    assert 0.17 < min(depths) < 0.3 and 0.6 < max(depths) < 0.73


def test_only_passkeys_of_the_answer_count():
    assert isinstance(TASK, Rows)
    batch = TASK.rows(np.arange(7))
    assert all(x.shape == (7, 61) and x.dtype == np.int32 for x in batch.values())
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    np.testing.assert_array_equal(batch["positions"][3], np.arange(61))
    for row in range(7):
        asked = batch["tokens"][row].tolist().index(4)
        words = np.isin(batch["targets"][row], (10, 11, 12, 13)) & (np.arange(61) >= asked)
        np.testing.assert_array_equal(batch["loss_mask"][row], words)
        assert words[-1]


def test_a_row_is_a_function_of_seed_and_index():
    batch = TASK.rows(np.array([5, 3]))
    alone = TASK.rows(np.array([3]))
    np.testing.assert_array_equal(batch["tokens"][1], alone["tokens"][0])
    other = dataclasses.replace(TASK, seed=1).rows(np.array([5, 3]))["tokens"]
    assert (batch["tokens"] != other).any(axis=1).all()


def test_short_rows_are_padded():
    task = dataclasses.replace(TASK, min_length=45)
    batch = task.rows(np.arange(60))
    lengths = batch["segment_ids"].sum(axis=1)
    assert lengths.min() < 48 and lengths.max() > 58 and len(set(lengths.tolist())) > 12
    beyond = np.arange(61) >= lengths[:, None]
    for name in ("tokens", "targets", "positions", "loss_mask"):
        assert not batch[name][beyond].any()
    assert batch["loss_mask"][np.arange(60), lengths - 1].all()
    assert len(parts(task, int(lengths.argmin()))[0]) >= 1


def test_text():
    tokenizer = ByteTokenizer()
    task = text_passkeys(tokenizer, "It rains. " * 9, 700, num_passkeys=2, words_per_passkey=3)
    batch = task.rows(np.array([4]))
    text = tokenizer.decode([*batch["tokens"][0], batch["targets"][0, -1]])
    assert batch["tokens"][0, 0] == tokenizer.bos_id
    key = text.split("Note well: the second passkey of the vault is ")[1].split(".")[0]
    assert len(key.split(" ")) == 3
    assert text.endswith(f"\nThe second passkey of the vault is {key}")
    counted = tokenizer.decode(batch["targets"][0][batch["loss_mask"][0] == 1])
    assert counted.count(" ") == 6 and counted.endswith(f" {key}")
    with pytest.raises(ValueError, match="num_passkeys: expected 1 to 10, got 11"):
        text_passkeys(tokenizer, "x", 700, num_passkeys=11)


def test_toy():
    task = toy_passkeys(40, num_passkeys=2, num_words=3, num_fillers=5, words_per_passkey=2)
    tokens = task.rows(np.arange(9))["tokens"]
    assert tokens.max() == 13 and (tokens[:, 0] == 0).all()  # 14 ids
    asked = tokens[0].tolist().index(2)
    assert tokens[0, asked + 1 : asked + 3].tolist() == [3, 4]
    place = tokens[0].tolist().index(4)
    assert tokens[0, place - 1] == 1
    np.testing.assert_array_equal(
        tokens[0, place + 1 : place + 3], tokens[0, asked + 3 : asked + 5]
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"haystack": np.zeros((2, 3), int)}, r"haystack: expected ids \[n\], got shape \(2, 3\)"),
        ({"answer": ((3,),)}, "intro, answer: .* got 3 and 1"),
        ({"words": ((1,), ())}, "words: expected ids"),
        ({"words_per_passkey": 0}, "words_per_passkey: .* got 0"),
        ({"depths": (0.5, 0.2)}, "depths: "),
        # 1 + 2 + 3 · (2 + 2 + 1) + 6 · 4 ids besides the haystack, the last only a target
        ({"length": 41}, "length: expected from 42 tokens .* got 41"),
        ({"min_length": 62}, "min_length: .* to length=61, got 62"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TASK, **changes)
    dataclasses.replace(TASK, length=42)
