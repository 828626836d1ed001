import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import TokenizerConfig
from gptjax.data.shards import (
    FORMAT_VERSION,
    Index,
    PreparedData,
    Shard,
    ShardWriter,
    SourceIndex,
    TokenArray,
    open_prepared,
    token_dtype,
)
from gptjax.errors import UserError
from gptjax.text.tokenizer_training import train_tokenizer


def in_memory(shards: list[np.ndarray], vocab_size: int) -> TokenArray:
    named = [Shard(str(number), len(shard), "") for number, shard in enumerate(shards)]
    return TokenArray(named, lambda shard: shards[int(shard.file)], vocab_size)


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    start=st.integers(-2, 32),
    stop=st.one_of(st.none(), st.integers(-2, 32)),
)
@settings(deadline=None)
def test_slices_across_shards_equal_slices_of_the_whole(lengths, start, stop):
    whole = np.arange(sum(lengths), dtype="<u2")
    shards = np.split(whole, np.cumsum(lengths)[:-1])
    tokens = in_memory(shards, 2**16)
    assert len(tokens) == len(whole)
    np.testing.assert_array_equal(tokens[start:stop], whole[start:stop])
    assert tokens[start:stop].dtype == whole.dtype


def test_a_slice_within_one_shard_is_not_copied():
    shard = np.arange(10, dtype="<u2")
    assert np.shares_memory(in_memory([np.zeros(3, "<u2"), shard], 2**16)[4:8], shard)
    with pytest.raises(ValueError, match="step 1, not 2"):
        in_memory([shard], 2**16)[::2]


@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6), data=st.data())
@settings(deadline=None)
def test_an_id_beyond_the_vocabulary_is_refused_where_it_is_read(lengths, data):
    """Exactly the slices that hold it fail, and say in which file and where it stands: a model would clamp it."""
    whole = np.zeros(sum(lengths), "<u2")
    bad = data.draw(st.integers(0, len(whole) - 1))
    whole[bad] = 300
    starts = [0, *np.cumsum(lengths)[:-1].tolist()]
    tokens = in_memory([whole[start : start + n] for start, n in zip(starts, lengths, strict=True)], 300)
    first, last = sorted([data.draw(st.integers(0, len(whole))), data.draw(st.integers(0, len(whole)))])
    if not first <= bad < last:
        tokens[first:last]
        return
    place = bad - max(start for start in starts if start <= bad)
    with pytest.raises(UserError, match=rf"its token {place} is 300, but there are only 300 tokens"):
        tokens[first:last]


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_a_writer_cuts_shards_and_hashes_what_lies_on_disk(tmp_path, dtype):
    with ShardWriter(tmp_path, "train", dtype, max_shard_tokens=4) as writer:
        for ids in ([1, 2, 3], [], [4, 5, 6, 7, 8, 9], [10, 11, 12]):
            writer.write(ids)
        writer.count(documents=2, utf8_bytes=30)
        split = writer.finish()
    assert (split.documents, split.tokens, split.bytes) == (2, 12, 30)
    assert [s.file for s in split.shards] == ["train-00000.bin", "train-00001.bin", "train-00002.bin"]
    assert [s.tokens for s in split.shards] == [4, 4, 4]
    raws = [(tmp_path / s.file).read_bytes() for s in split.shards]
    np.testing.assert_array_equal(np.frombuffer(b"".join(raws), dtype), np.arange(1, 13))
    assert [s.sha256 for s in split.shards] == [hashlib.sha256(raw).hexdigest() for raw in raws]


def test_the_smallest_type_that_holds_every_id():
    assert [token_dtype(size) for size in (272, 2**16, 2**16 + 1)] == ["<u2", "<u2", "<u4"]


@pytest.fixture
def prepared(tmp_path) -> PreparedData:
    """Two splits of hand-written ids, opened from disk."""
    tokenizer = train_tokenizer([], TokenizerConfig(kind="byte"))
    tokenizer.save(tmp_path / "tokenizer.json")
    splits = {}
    for name, ids in (("train", range(20, 31)), ("validation", range(5))):
        with ShardWriter(tmp_path, name, "<u2", max_shard_tokens=4) as writer:
            writer.write([*ids])
            splits[name] = writer.finish()
    source = SourceIndex(("x",), "hash", "why", {"empty files": 2}, splits)
    Index(FORMAT_VERSION, "<u2", "f" * 64, tokenizer.fingerprint, (source,)).save(tmp_path)
    return open_prepared(tmp_path, verify=True)


def test_what_was_written_is_opened(prepared):
    np.testing.assert_array_equal(prepared.tokens("train")[:], np.arange(20, 31))
    np.testing.assert_array_equal(prepared.tokens("validation")[2:9], [2, 3, 4])
    assert prepared.tokenizer.kind == "byte"
    assert Index.load(prepared.folder) == prepared.index
    assert prepared.index.sources[0].skipped == {"empty files": 2}


def test_a_shard_cut_short_or_gone_is_named(prepared):
    path = prepared.folder / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train-00001.bin has 7 bytes, but index.json says 8 bytes"):
        open_prepared(prepared.folder)
    path.unlink()
    with pytest.raises(UserError, match=r"train-00001.bin is missing"):
        open_prepared(prepared.folder)


def test_a_flipped_byte_is_found_on_request(prepared):
    path = prepared.folder / "validation-00000.bin"
    raw = bytearray(path.read_bytes())
    raw[3] ^= 1
    path.write_bytes(raw)
    open_prepared(prepared.folder)
    with pytest.raises(UserError, match=r"validation-00000.bin was changed"):
        open_prepared(prepared.folder, verify=True)


def test_another_tokenizer_beside_the_shards_is_refused(prepared):
    train_tokenizer(["abc"], TokenizerConfig(kind="char")).save(prepared.folder / "tokenizer.json")
    with pytest.raises(UserError, match="is not the tokenizer that wrote the shards"):
        open_prepared(prepared.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values | {"format_version": 99}, "has format 99, this gptjax reads 2"),
        (lambda values: {"a": 1}, "is no index of prepared data"),
        (lambda values: [], "is no index of prepared data"),
        (lambda values: values | {"surplus": 1}, "is no index of prepared data"),
    ],
)
def test_a_foreign_index_is_refused(prepared, change, message):
    path = prepared.folder / "index.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=message):
        open_prepared(prepared.folder)


def test_a_folder_without_index_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no prepared data"):
        open_prepared(tmp_path)
