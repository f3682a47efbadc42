"""Batches are pure functions of (corpus, seed, n), and rows are packed as promised."""

import numpy as np
import pytest

from sinkjax.train.config import DataConfig
from sinkjax.train.corpus import Documents, read_documents
from sinkjax.train.data import PackedRows, batches, iterate, load_data
from sinkjax.train.tokenizer import ByteTokenizer

T, BOS = 53, 256


@pytest.fixture(scope="module")
def documents():
    """Real text: some of the standard library, cut short so that documents of all sizes occur."""
    train, _ = read_documents((), ByteTokenizer(), max_bytes=60_000)
    rng = np.random.default_rng(5)
    tokens, offsets = [], [0]
    for i in range(len(train)):
        text = train[i]
        while len(text):
            size = int(rng.choice([1, 7, 31, T - 1, T, T + 1, 3 * T, 211]))
            tokens.append(text[:size])
            offsets.append(offsets[-1] + len(tokens[-1]))
            text = text[size:]
    return Documents(np.concatenate(tokens), np.asarray(offsets))


@pytest.mark.parametrize("sink_ids", [(), (257, 258, 259)])
def test_packing_invariants_on_real_text(documents, sink_ids):
    packed = PackedRows(documents, T, BOS, sink_ids)
    batch = packed.rows(np.arange(len(packed)))
    tokens, targets = batch["tokens"], batch["targets"]
    segments, positions, mask = batch["segment_ids"], batch["positions"], batch["loss_mask"]
    prefix = [*sink_ids, BOS]
    first = positions == 0
    # Every row, and every segment, starts with the sink tokens and BOS, and nothing else holds one.
    assert (tokens[:, : len(prefix)] == prefix).all() and (segments[:, 0] == 1).all()
    starts = first & (segments > 0)
    assert starts.sum() == (np.diff(segments, axis=1, prepend=0) > 0).sum()
    for place, token in enumerate(prefix):
        np.testing.assert_array_equal((tokens == token), (segments > 0) & (positions == place))
    # Positions count within segments, segments count from 1, padding is one block at the end.
    same = segments[:, 1:] == segments[:, :-1]
    np.testing.assert_array_equal(np.diff(positions, axis=1)[same & (segments[:, 1:] > 0)], 1)
    assert np.isin(np.diff(segments, axis=1)[segments[:, 1:] > 0], [0, 1]).all()
    assert (np.diff((segments == 0).astype(int), axis=1) >= 0).all()
    # A target is the next token of the same segment; the loss leaves out prefix and padding.
    np.testing.assert_array_equal(
        targets[:, :-1][same & (segments[:, 1:] > 0)], tokens[:, 1:][same & (segments[:, 1:] > 0)]
    )
    np.testing.assert_array_equal(mask, (segments > 0) & (positions >= len(prefix) - 1))
    assert (targets[mask == 1] < 256).all()
    # The packing is not wasteful: at most the last row has a gap in which a piece would fit.
    assert (segments == 0).mean() < 0.1


def test_every_token_of_every_document_is_a_target_once_and_in_order(documents):
    packed = PackedRows(documents, T, BOS, (257,))
    pieces = {}
    for row in range(len(packed)):
        batch = packed.rows(np.asarray([row]))
        for number, s in enumerate(range(packed.first[row], packed.first[row + 1]), start=1):
            chosen = (batch["segment_ids"][0] == number) & (batch["loss_mask"][0] == 1)
            assert packed.start[s] not in pieces
            pieces[packed.start[s]] = batch["targets"][0][chosen]
    text = np.concatenate([pieces[start] for start in sorted(pieces)])
    np.testing.assert_array_equal(text, documents.tokens)
    # No piece reaches into the next document.
    ends = np.asarray([start + len(pieces[start]) for start in sorted(pieces)])
    assert set(documents.offsets[1:]) <= set(ends)


def test_without_bos_only_the_first_token_of_a_document_is_no_target(documents):
    packed = PackedRows(documents, T, None)
    batch = packed.rows(np.arange(len(packed)))
    tokens, targets = batch["tokens"], batch["targets"]
    segments, mask = batch["segment_ids"], batch["loss_mask"]
    assert (tokens < 256).all() and (segments[:, 0] == 1).all()
    np.testing.assert_array_equal(mask, segments > 0)
    inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    np.testing.assert_array_equal(targets[:, :-1][inside], tokens[:, 1:][inside])
    assert (batch["positions"][:, 1:][inside] > 0).all()
    # Every pair of neighbours within a document is (token, target) once; a document of one has none.
    text, offsets = documents.tokens, documents.offsets
    last = np.zeros(len(text), bool)
    last[offsets[1:] - 1] = True
    want = sorted(zip(text[:-1][~last[:-1]].tolist(), text[1:][~last[:-1]].tolist(), strict=True))
    assert sorted(zip(tokens[mask == 1].tolist(), targets[mask == 1].tolist(), strict=True)) == want
    assert (segments == 0).mean() < 0.1
    with pytest.raises(ValueError, match="documents: expected some of 2 tokens or more"):
        PackedRows(Documents(np.zeros(3, np.uint8), np.arange(4)), T, None)


def test_learned_sink_tokens_lead_without_bos(documents):
    """The last of them predicts the first token, as BOS would."""
    with_bos, without = (
        PackedRows(documents, T, BOS, (257,)),
        PackedRows(documents, T, None, (257, 258)),
    )
    one, other = (packed.rows(np.arange(len(packed))) for packed in (with_bos, without))
    renamed = np.where(one["tokens"] == BOS, 258, one["tokens"])
    np.testing.assert_array_equal(renamed, other["tokens"])
    for name in set(one) - {"tokens", "targets"}:
        np.testing.assert_array_equal(one[name], other[name])


def test_batch_n_is_a_function_of_seed_and_n(documents):
    packed = PackedRows(documents, T, BOS)
    one, again = batches(packed, 5, seed=3), batches(packed, 5, seed=3)
    late = again[37]  # without the ones before it
    walk = iterate(one)
    for _ in range(38):
        batch = next(walk)
    for name in batch:
        np.testing.assert_array_equal(batch[name], late[name])
        assert batch[name].dtype == np.int32 and batch[name].shape == (5, T)
    assert (batches(packed, 5, seed=4)[37]["tokens"] != late["tokens"]).any()
    assert (one[36]["tokens"] != late["tokens"]).any()


def test_an_epoch_visits_every_row_once_and_the_next_in_another_order(documents):
    packed = PackedRows(documents, T, BOS)
    dataset = batches(packed, 1, seed=0)
    epochs = [
        [dataset[i + e * len(packed)]["tokens"][0].tobytes() for i in range(len(packed))]
        for e in range(2)
    ]
    rows = sorted(packed.rows(np.asarray([i]))["tokens"][0].tobytes() for i in range(len(packed)))
    assert sorted(epochs[0]) == sorted(epochs[1]) == rows
    assert epochs[0] != epochs[1] and epochs[0] != rows


def test_processes_make_the_batch_that_one_would(documents):
    packed = PackedRows(documents, T, BOS)
    whole = batches(packed, 6, seed=1)[11]
    # The rows of a process need not follow one another, nor be its own alone.
    for local in ((0, 1), (4, 5), (0, 3, 4), (2,), range(6)):
        part = batches(packed, 6, seed=1, local=local)[11]
        for name in whole:
            np.testing.assert_array_equal(part[name], whole[name][list(local)])
    with pytest.raises(ValueError, match="local: expected rows from 0 to 5, got 3 to 6"):
        batches(packed, 6, seed=1, local=(3, 6))


def test_state_is_one_number(documents):
    dataset = batches(PackedRows(documents, T, BOS), 3, seed=2)
    walk = iterate(dataset)
    for _ in range(7):
        next(walk)
    assert walk.get_state() == {"next_index": 7}
    fresh = iterate(dataset)
    fresh.set_state({"next_index": 7})
    np.testing.assert_array_equal(next(fresh)["tokens"], dataset[7]["tokens"])


def test_toy_task_has_its_own_validation_rows():
    config = DataConfig(source="backcopy", batch_size=7, seed=5)
    train, validation = load_data(config, 17, 65)
    rows = {row.tobytes() for n in range(50) for row in train[n]["tokens"]}
    assert len(rows) == 350
    assert not rows & {row.tobytes() for n in range(50) for row in validation[n]["tokens"]}
    assert train[3]["is_trigger"].shape == (7, 17)


def test_vocabulary_and_length_are_checked(documents, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("some text")
    config = DataConfig(files=(str(file),))
    with pytest.raises(ValueError, match="vocab_size: expected at least 257.*2 learned.*got 258"):
        load_data(config, 17, 258, 2)
    train, _ = load_data(config, 17, 259, 2)
    assert train[0]["tokens"][0, :3].tolist() == [257, 258, 256]
    config = DataConfig(files=(str(file),), bos="none", validation_fraction=0.3)
    train, validation = load_data(config, 17, 257)
    assert train[0]["tokens"][0, :6].tolist() == [*b"some ", 0]
    assert validation[0]["targets"][0, :3].tolist() == [*b"xt", 0]
    with pytest.raises(ValueError, match="context_length: expected more than the 3"):
        PackedRows(documents, 3, BOS, (257, 258, 259))


def test_backcopy_refuses_learned_sink_tokens_that_its_rows_do_not_hold():
    with pytest.raises(ValueError, match="num_learned_sink_tokens: expected 0 .*got 2"):
        load_data(DataConfig(source="backcopy"), 32, 80, 2)
