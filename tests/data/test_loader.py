import hashlib
from fractions import Fraction

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.data.loader import RowStream, Share, TokenRows, _Mixture, evaluation_rows
from gptjax.errors import UserError

CONTEXT = 3


def made_rows(count: int) -> TokenRows:
    """Rows whose first token says which row it is: row i starts with 3i."""
    return TokenRows(np.arange(count * CONTEXT + 1, dtype="<u2"), CONTEXT)


def order(rows: TokenRows, count: int, seed: int = 0, position: int = 0, **options) -> list[int]:
    stream = RowStream([rows], seed, position, **options)
    try:
        return [int(row[0]) // CONTEXT for row in stream.take(count)]
    finally:
        stream.close()


@given(length=st.integers(2, 60), context_length=st.integers(1, 12))
@settings(deadline=None)
def test_every_token_but_the_first_is_a_label_once(length, context_length):
    if length <= context_length:
        with pytest.raises(UserError, match=rf"{length} tokens are too few .*sequence_length {length - 1} or less"):
            TokenRows(np.arange(length), context_length)
        return
    rows = TokenRows(np.arange(length), context_length)
    stacked = np.stack([rows[i] for i in range(len(rows))])
    assert stacked.shape[1] == context_length + 1
    assert stacked.dtype == np.int32
    np.testing.assert_array_equal(stacked[:, 1:].ravel(), np.arange(1, len(rows) * context_length + 1))
    np.testing.assert_array_equal(stacked[:, :-1].ravel(), np.arange(len(rows) * context_length))
    assert length - 1 - len(rows) * context_length < context_length, "less than a row is left out"


def test_rows_outside_are_refused():
    with pytest.raises(IndexError):
        made_rows(4)[4]
    with pytest.raises(IndexError):
        made_rows(4)[-1]


def test_every_epoch_has_every_row_once_though_batches_straddle_it():
    rows = made_rows(10)
    stream = RowStream([rows], seed=0)
    drawn = []
    for _ in range(10):
        drawn.extend(stream.take(4)[:, 0] // CONTEXT)
    stream.close()
    assert stream.position == 40
    orders = [tuple(drawn[i : i + 10]) for i in range(0, 40, 10)]
    assert all(sorted(each) == list(range(10)) for each in orders)
    assert len(set(orders)) == 4, "another order each epoch"
    assert tuple(range(10)) not in orders


def test_seeds_decide_the_order():
    rows = made_rows(50)
    assert order(rows, 50, seed=1) == order(rows, 50, seed=1)
    assert order(rows, 50, seed=1) != order(rows, 50, seed=2)


@pytest.mark.parametrize("position", [0, 1, 9, 10, 11, 25])
def test_a_stream_continues_from_any_position(position):
    rows = made_rows(10)
    assert order(rows, 30 - position, position=position) == order(rows, 30)[position:]


def test_position_counts_what_was_taken_not_what_was_read_ahead():
    rows = made_rows(10)
    stream = RowStream([rows], seed=3, num_threads=8, prefetch_rows=64)
    first = stream.take(7)
    position = stream.position
    stream.close()
    assert position == 7
    resumed = RowStream([rows], seed=3, position=position)
    rest = resumed.take(6)
    resumed.close()
    assert [int(r[0]) // CONTEXT for r in (*first, *rest)] == order(rows, 13, seed=3)


@pytest.mark.parametrize("options", [{"num_threads": 0}, {"num_threads": 1}, {"num_threads": 16, "prefetch_rows": 500}])
def test_threads_do_not_change_the_order(options):
    rows = made_rows(10)
    assert order(rows, 35, **options) == order(rows, 35)


@given(sizes=st.lists(st.integers(1, 9), max_size=5))
@settings(deadline=None, max_examples=20)
def test_the_sizes_of_batches_do_not_change_the_order(sizes):
    rows = made_rows(10)
    stream = RowStream([rows], 0, num_threads=0)
    taken = [row for size in sizes for row in stream.take(size)]
    stream.close()
    assert [int(row[0]) // CONTEXT for row in taken] == (order(rows, sum(sizes), num_threads=0) if sizes else [])


@pytest.mark.parametrize(("limit", "expected"), [(0, range(10)), (99, range(10)), (5, range(0, 10, 2)), (3, (0, 3, 6))])
def test_evaluation_reads_evenly_spaced_rows_in_batches_of_one_shape(limit, expected):
    """Of a mixture the first rows are all of one source, so that a limited evaluation must not take just those."""
    batches = list(evaluation_rows(made_rows(10), 4, limit))
    assert {(batch.shape, batch.dtype) for batch, _ in batches} == {((4, CONTEXT + 1), np.dtype(np.int32))}
    counted = [int(row[0]) // CONTEXT for batch, valid in batches for row in batch[:valid]]
    assert counted == list(expected)
    last, valid = batches[-1]
    assert (last[valid:] == last[valid - 1]).all()


SIZES, WEIGHTS = (4, 30, 9), (1.0, 6.0, 3.0)


def made_sources() -> list[TokenRows]:
    """Token 1000 s + 3 i begins row i of source s."""
    return [
        TokenRows(np.arange(size * CONTEXT + 1, dtype="<u2") + 1000 * number, CONTEXT)
        for number, size in enumerate(SIZES)
    ]


def mixed(count: int, position: int = 0, seed: int = 0, weights=WEIGHTS) -> list[tuple[int, int]]:
    """The source and the row within it of each row drawn."""
    stream = RowStream(made_sources(), seed, position, weights=weights)
    try:
        return [(int(row[0]) // 1000, int(row[0]) % 1000 // CONTEXT) for row in stream.take(count)]
    finally:
        stream.close()


def test_a_mixture_has_its_proportions_in_every_window():
    """Any hundred rows in a row have each source as often as its weight says, give or take two."""
    drawn = np.array([source for source, _ in mixed(700)])
    for start in range(0, 600, 50):
        counts = np.bincount(drawn[start : start + 100], minlength=3)
        np.testing.assert_allclose(counts, [10, 60, 30], atol=2)


def test_no_weight_is_rounded():
    counts = np.bincount([source for source, _ in mixed(3009, weights=(1.0, 1.0, 1.009))], minlength=3)
    np.testing.assert_allclose(counts, [1000, 1000, 1009], atol=2)


written = st.integers(1, 1000).map(lambda hundredths: hundredths / 100) | st.integers(1, 9).map(float)


@given(st.lists(written, min_size=2, max_size=6))
@settings(deadline=None)
def test_shares_of_a_mixture_are_exact(weights):
    """After n rows every source has n · w / Σ w of them, but for a row or two: no share is off by a part of itself; and
    each gives its own rows in their order, none left out."""
    mixture, seen = _Mixture([range(10**9)] * len(weights), weights), [0] * len(weights)
    for index in range(300):
        number, row = mixture.place(index)
        assert row == seen[number]
        seen[number] += 1
    total = sum(Fraction(str(weight)) for weight in weights)
    for index in (299, 10**6, 10**12):
        number, row = mixture.place(index)
        assert abs(row - Fraction(str(weights[number])) / total * index) < len(weights)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5))
@settings(deadline=None)
def test_runs_whose_weights_were_exact_go_on_in_their_order(weights):
    """Grain's mixture, in which older runs began, keeps a weight that is a whole multiple of the smallest."""
    weights = [1.0, *map(float, weights)]
    before = grain.MapDataset.mix([grain.MapDataset.source([n]).repeat() for n in range(len(weights))], weights)
    mixture = _Mixture([range(10**9)] * len(weights), weights)
    assert [mixture.place(index)[0] for index in range(200)] == [before[index] for index in range(200)]


def test_every_source_of_a_mixture_has_its_epochs():
    """Within a source no row comes again before all have come, and not in the same order."""
    drawn = mixed(600)
    for number, size in enumerate(SIZES):
        rows = [row for source, row in drawn if source == number]
        epochs = [tuple(rows[i : i + size]) for i in range(0, len(rows) - size + 1, size)]
        assert len(epochs) > 5
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len(set(epochs)) > 1


@pytest.mark.parametrize("position", [1, 33, 250])
def test_a_mixture_continues_from_any_position(position):
    assert mixed(300 - position, position) == mixed(300)[position:]
    assert mixed(50, seed=1) != mixed(50)
    assert mixed(50, weights=(1.0, 1.0, 1.0)) != mixed(50)


def pieces(num_pieces: int, batch_size: int, readers: int = 1) -> list[Share]:
    """Shares of processes of which each `readers` need the same contiguous piece, as where `tensor` spans them."""
    return [Share(rows, batch_size) for rows in np.split(np.arange(batch_size), num_pieces) for _ in range(readers)]


BATCH = 8
SHARES = {
    "1 process": pieces(1, BATCH),
    "2 processes": pieces(2, BATCH),
    "4 processes": pieces(4, BATCH),
    "2 processes with the same rows": pieces(1, BATCH, readers=2),
    "4 processes, each two with the same rows": pieces(2, BATCH, readers=2),
    "2 processes that overlap": [Share(np.arange(6), BATCH), Share(np.arange(2, BATCH), BATCH)],
    "2 processes with every other row": [Share(np.arange(0, BATCH, 2), BATCH), Share(np.arange(1, BATCH, 2), BATCH)],
}


def put_together(shares: list[Share], taken: list[np.ndarray]) -> np.ndarray:
    """The global batches [batches, B, T+1] of what each process read; where two read the same row they must agree."""
    whole = np.full((len(taken[0]) // len(shares[0].rows), BATCH, CONTEXT + 1), -1, np.int32)
    for share, rows in zip(shares, taken, strict=True):
        part = rows.reshape(len(whole), len(share.rows), CONTEXT + 1)
        known = whole[:, share.rows]
        assert ((known == part) | (known == -1)).all()
        whole[:, share.rows] = part
    assert (whole >= 0).all(), "every row has a reader"
    return whole


def sha256(batch: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(batch).tobytes()).hexdigest()


@pytest.mark.parametrize("mixture", [False, True], ids=["one source", "mixture"])
@pytest.mark.parametrize("position", [0, 17 * BATCH])
@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
def test_the_global_batch_does_not_depend_on_the_processes(shares, position, mixture):
    """Batch by batch the same bytes as alone, also of two accumulated at once, and past the end of an epoch.

    Alone no share is cut: the stream of a single process is the reference.
    """
    sources, weights = (made_sources(), WEIGHTS) if mixture else ([made_rows(30)], ())
    sizes = [BATCH, BATCH, 2 * BATCH, BATCH]
    alone = RowStream(sources, 5, position, weights=weights)
    streams = [RowStream(sources, 5, position, weights=weights, share=share) for share in shares]
    for size in sizes:
        expected = alone.take(size)
        found = put_together(shares, [stream.take(size) for stream in streams])
        assert sha256(found) == sha256(expected)
    assert {stream.position for stream in streams} == {alone.position} == {position + sum(sizes)}
    for stream in (alone, *streams):
        stream.close()


@pytest.mark.parametrize("limit", [0, 13])
@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
def test_processes_evaluate_the_same_rows_as_one(shares, limit):
    rows = made_rows(21)
    alone = list(evaluation_rows(rows, BATCH, limit))
    parts = [list(evaluation_rows(rows, BATCH, limit, share)) for share in shares]
    assert [len(part) for part in parts] == [len(alone)] * len(shares)
    for (batch, valid), *found in zip(alone, *parts, strict=True):
        assert {number for _, number in found} == {valid}
        assert sha256(put_together(shares, [part for part, _ in found])) == sha256(batch)
