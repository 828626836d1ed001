"""A trillion tokens, in files that take no disk: what is held does not grow with the data."""

import itertools
import sys
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from gptjax.config import TokenizerConfig
from gptjax.data.loader import RowStream, TokenRows, evaluation_rows
from gptjax.data.shards import (
    FORMAT_VERSION,
    MAX_MAPPED_SHARDS,
    MAX_SHARD_TOKENS,
    Index,
    PreparedData,
    Shard,
    SourceIndex,
    SplitIndex,
    open_prepared,
)
from gptjax.errors import UserError
from gptjax.evaluation import documents
from gptjax.evaluation.documents import split_documents
from gptjax.text.tokenizer_training import train_tokenizer

SHARDS = {"train": 7078, "validation": 373}
ROW = 2048
MARKED = 5000, 3 * ROW, [7, 8, 9]
"""Shard, place and ids of the only tokens that are not 0."""
FEW_BYTES = 4e6


def sparse(folder: Path, name: str, number: int) -> SplitIndex:
    shards = tuple(Shard(f"{name}-{i:05}.bin", MAX_SHARD_TOKENS, f"{i:064x}") for i in range(number))
    for shard in shards:
        with (folder / shard.file).open("wb") as file:
            file.truncate(2 * shard.tokens)
    return SplitIndex(1, number * MAX_SHARD_TOKENS, 1, shards)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    tokenizer = train_tokenizer([], TokenizerConfig(kind="byte"))
    tokenizer.save(folder / "tokenizer.json")
    source = SourceIndex(("x",), "hash", "", {}, {name: sparse(folder, name, n) for name, n in SHARDS.items()})
    Index(FORMAT_VERSION, "<u2", "f" * 64, tokenizer.fingerprint, (source,)).save(folder)
    shard, place, ids = MARKED
    with (folder / f"train-{shard:05}.bin").open("r+b") as file:
        file.seek(2 * place)
        file.write(np.array(ids, "<u2").tobytes())
    return folder


@pytest.fixture
def prepared(folder) -> PreparedData:
    return open_prepared(folder)


def held(folder: Path) -> tuple[int, int]:
    """Descriptors and mappings of files in the folder."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("only Linux says what a process holds")
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sum(str(folder) in _target(link) for link in links), sum(str(folder) in line for line in maps)


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:  # it was the one that listed the others
        return ""


def test_descriptors_and_mappings_are_few_however_many_shards_are_read(prepared):
    """By threads that all read at once, and all get the right tokens."""
    tokens = prepared.tokens("train")
    assert held(prepared.folder) == (0, 0), "opened, nothing is mapped"
    starts = [number * MAX_SHARD_TOKENS + MARKED[1] for number in range(4990, 5010)] * 20
    starts += [number * MAX_SHARD_TOKENS for number in range(0, SHARDS["train"], 16)]
    with ThreadPoolExecutor(8) as threads:
        found = [*threads.map(lambda start: tokens[start : start + 3].tolist(), starts)]
    marked = MARKED[0] * MAX_SHARD_TOKENS + MARKED[1]
    assert found == [MARKED[2] if start == marked else [0, 0, 0] for start in starts]
    descriptors, mappings = held(prepared.folder)
    assert 0 < mappings <= MAX_MAPPED_SHARDS
    assert descriptors <= (mappings if sys.version_info < (3, 13) else 0)


def test_all_that_a_few_shards_hold_stays_mapped(prepared):
    """Their rows are read without asking the system for anything."""
    tokens = prepared.tokens("train")
    first, again = (
        [tokens[number * MAX_SHARD_TOKENS : number * MAX_SHARD_TOKENS + 3] for number in range(MAX_MAPPED_SHARDS)]
        for _ in range(2)
    )
    assert all(np.shares_memory(one, other) for one, other in zip(first, again, strict=True))


def test_what_is_read_stays_while_it_is_used(prepared):
    tokens = prepared.tokens("train")
    start = MARKED[0] * MAX_SHARD_TOKENS + MARKED[1]
    view = tokens[start : start + 3]
    for number in range(MAX_MAPPED_SHARDS + 1):
        tokens[number * MAX_SHARD_TOKENS : number * MAX_SHARD_TOKENS + 1]
    assert view.tolist() == MARKED[2]


@pytest.fixture
def few_bytes() -> Iterator[None]:
    """What is allocated while a test runs is little."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < FEW_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("weights", [(), (1.0, 2.0, 7.0)], ids=["one source", "mixture"])
@pytest.mark.parametrize("epoch", [0, 0.6, 7.3])
def test_a_stream_begins_anywhere(prepared, epoch, weights, few_bytes):
    """At the first row, deep inside, and epochs later; the next rows are those of the stream that came by."""
    rows = TokenRows(prepared.tokens("train"), ROW)
    assert len(rows) > 4e8
    position = int(epoch * len(rows))
    taken = []
    for start, count in ((position, 6), (position + 4, 2)):
        stream = RowStream([Numbered(rows)] * max(1, len(weights)), 0, start, weights=weights, prefetch_rows=4)
        taken.append(stream.take(count))
        stream.close()
    np.testing.assert_array_equal(taken[0][4:], taken[1])
    assert len(np.unique(taken[0], axis=0)) == 6


class Numbered:
    """Rows that begin with their number."""

    def __init__(self, rows: TokenRows):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> np.ndarray:
        return np.concatenate([[number], self._rows[number]])


@pytest.mark.parametrize("limit", [0, 10**7])
def test_evaluation_lists_no_rows(prepared, limit, few_bytes):
    """Of a split of fifty billion tokens; a limited one is spread over all of it."""
    rows = TokenRows(prepared.tokens("validation"), ROW)
    batches = evaluation_rows(Numbered(rows), 4, limit)
    numbers = np.concatenate([next(batches)[0][:, 0] for _ in range(2)])
    count = limit or len(rows)
    assert numbers.tolist() == [number * len(rows) // count for number in range(8)]


def test_the_documents_of_a_split_come_one_by_one(prepared, few_bytes, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_TOKENS", 2**15)
    end = prepared.tokenizer.require_end_of_text()

    class Periodic:
        def __len__(self) -> int:
            return 10**12

        def __getitem__(self, key: slice) -> np.ndarray:
            places = np.arange(*key.indices(len(self)))
            return np.where(places % 1000 == 999, end, end + 1).astype("<u2")

    found = [*itertools.islice(split_documents(Periodic(), prepared.tokenizer), 3)]
    assert [(document.origin, len(document.token_ids)) for document in found] == [
        (f"document {number}", 999) for number in (1, 2, 3)
    ]


def test_a_shard_that_goes_while_it_is_used_is_named(folder, prepared):
    """In one line, also from a thread that reads ahead; there is nothing to be read by a mapping that ends early."""
    path = folder / "train-00003.bin"
    rows = TokenRows(prepared.tokens("train"), ROW)
    number = 3 * MAX_SHARD_TOKENS // ROW + 5

    class Here:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, row: int) -> np.ndarray:
            return rows[number]

    size = path.stat().st_size
    try:
        with path.open("r+b") as file:
            file.truncate(size - 1)
        with pytest.raises(UserError, match=rf"train-00003.bin has become shorter than {size} bytes"):
            RowStream([Here()], 0).take(1)
        path.unlink()
        with pytest.raises(UserError, match=r"train-00003.bin can no longer be read: No such file"):
            RowStream([Here()], 0).take(1)
    finally:
        with path.open("ab") as file:
            file.truncate(size)
