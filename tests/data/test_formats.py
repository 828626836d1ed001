"""Files to documents: parquet, compression, and texts too long to hold."""

import gzip
import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from gptjax.config import DataConfig, TokenizerConfig
from gptjax.data import formats, records
from gptjax.data.formats import Document, Problem, read
from gptjax.data.prepare import prepare
from gptjax.errors import UserError

TEXTS = ["first", "zweiter, größer", "第三", "fourth\nwith a line"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def texts(path) -> list[str]:
    return [item.text for item in read(path, "text", is_named=True)]


def write_parquet(path, column, name="text", rows_per_group=2):
    table = pyarrow.table({"id": list(range(len(column))), name: column})
    pyarrow.parquet.write_table(table, path, row_group_size=rows_per_group)
    return path


def zstandard(raw: bytes) -> bytes:
    return pyarrow.compress(raw, codec="zstd", asbytes=True)


COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard}


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compression_changes_nothing(tmp_path, suffix):
    for name, content in (("a.jsonl", LINES), ("a.txt", TEXTS[3].encode())):
        path = tmp_path / (name + suffix)
        path.write_bytes(COMPRESS[suffix](content))
        assert texts(path) == (TEXTS if name == "a.jsonl" else [TEXTS[3]])


def test_parquet_is_read_across_row_groups(tmp_path):
    """More rows than one batch and than one row group, in order; an empty text is left out, not a fault."""
    many = [f"row {i}" for i in range(700)]
    path = write_parquet(tmp_path / "a.parquet", [*many, "", *TEXTS], rows_per_group=150)
    items = list(read(path, "text", is_named=True))
    assert [item.text for item in items if isinstance(item, Document)] == many + TEXTS
    (empty,) = [item for item in items if isinstance(item, Problem)]
    assert empty.expected
    assert items[0].origin == f"{path}:1"


def test_a_folder_of_all_forms_is_prepared(tmp_path, monkeypatch):
    """Every form in one folder, under its name: as many documents as were written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mix").mkdir()
    for suffix, compress in COMPRESS.items():
        (tmp_path / "mix" / f"a.jsonl{suffix}").write_bytes(compress(LINES))
        (tmp_path / "mix" / f"b.txt{suffix}").write_bytes(compress(b"some text"))
    write_parquet(tmp_path / "mix" / "c.parquet", TEXTS)
    data = DataConfig(path=("mix",), validation_fraction=0.3, split="position")
    index = prepare(data, TokenizerConfig(kind="byte"), log=lambda line: None).index
    written = 3 * len(TEXTS) + 3 + len(TEXTS)
    documents = sum(split.documents for split in index.sources[0].splits.values())
    assert documents in (written, written + 1), "one document may have been cut where the held-out text starts"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(LINES * 100)[:-20], "cannot be read: "),
        ("a.txt.gz", b"no gzip", "cannot be read: Not a gzipped file"),
        ("a.jsonl.zst", zstandard(LINES)[:-8], "cannot be read: "),
        ("a.txt.zst", b"no zstandard", "cannot be read: "),
        ("a.parquet", b"no parquet", "is no parquet file"),
        ("a.parquet.gz", b"", "unpack it"),
        ("a.jsonl.gz", gzip.compress(b""), "is empty"),
    ],
    ids=range(7),
)
def test_broken_files_are_one_problem(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    *documents, problem = read(path, "text", is_named=True)
    assert all(isinstance(document, Document) for document in documents)
    assert message in problem.message
    assert str(path) in problem.message
    assert "\n" not in problem.message
    assert not problem.expected


def test_parquet_without_the_field_lists_the_fields(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", TEXTS, name="content")
    with pytest.raises(
        UserError, match=r"has no field 'text', but id, content \(--data.text-field NAME reads another\)$"
    ):
        prepare(DataConfig(path=(str(path),), prepared_dir=str(tmp_path)), TokenizerConfig(kind="byte"))
    assert [item.text for item in read(path, "content", is_named=True)] == TEXTS
    (problem, *_) = read(path, "id", is_named=True)
    assert "field 'id' is a int, not a text" in problem.message


def test_a_missing_text_is_called_null(tmp_path):
    """In both forms, not by the name of a type of Python's."""
    write_parquet(tmp_path / "a.parquet", ["one", None])
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": null}\n')
    for name in ("a.parquet", "a.jsonl"):
        _, problem = read(tmp_path / name, "text", is_named=True)
        assert problem.message == f"{tmp_path / name}:2: field 'text' is null, not a text"


def test_suffixes_may_be_capitals(tmp_path):
    write_parquet(tmp_path / "A.PARQUET", TEXTS)
    assert texts(tmp_path / "A.PARQUET") == TEXTS
    for suffix, compress in (("GZ", gzip.compress), ("Zst", zstandard)):
        path = tmp_path / f"a.JSONL.{suffix}"
        path.write_bytes(compress(LINES))
        assert texts(path) == TEXTS
    (tmp_path / "b.PARQUET.GZ").write_bytes(b"")
    assert "unpack it" in next(read(tmp_path / "b.PARQUET.GZ", "text", is_named=True)).message


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(formats, "BLOCK_BYTES", 64)
    monkeypatch.setattr(formats, "MAX_PIECE_CHARACTERS", 100)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_long_texts_come_in_pieces(tmp_path, small_blocks, suffix):
    """Together they are the text, though blocks cut its characters; one is the first and one the last."""
    text = "\ufeff" + "".join(f"第{i}行 größer 😀\r\n" for i in range(200))
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](text.encode()))
    pieces = list(read(path, "text", is_named=True))
    assert "".join(piece.text for piece in pieces) == text[1:]
    assert len(pieces) > 20
    assert [piece.first for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize("position", [3, 63, 64, 65, 700])
def test_a_bad_byte_far_into_a_long_text_is_named_before_any_of_it_is_given(tmp_path, small_blocks, position):
    raw = bytearray(("ü" * 500).encode())
    raw[position] = 0xFF
    path = tmp_path / "a.txt"
    path.write_bytes(raw)
    (problem,) = read(path, "text", is_named=True)
    first_bad = position if position % 2 == 0 else position - 1  # the start of the character that it breaks
    assert problem.message == f"{path} is not UTF-8: byte {first_bad} is 0x{raw[first_bad]:02x}"


@pytest.mark.parametrize("split", ["hash", "position"])
def test_pieces_are_one_document(tmp_path, small_blocks, monkeypatch, split):
    """A document in pieces has one end, lies on one side of a split by hash, and has the tokens of the whole."""
    (texts := tmp_path / "texts").mkdir()
    for i in range(12):
        (texts / f"{i:02}.txt").write_text(f"document {i} says:\n" + f"{i} is a number\n" * 30, encoding="utf-8")
    data = DataConfig(path=(str(texts),), split=split, validation_fraction=0.4, prepared_dir=str(tmp_path / "out"))
    in_pieces = prepare(data, TokenizerConfig(vocab_size=300), str(tmp_path / "out" / "a"), log=lambda line: None)
    monkeypatch.setattr(formats, "BLOCK_BYTES", 2**20)
    whole = prepare(data, in_pieces.tokenizer, str(tmp_path / "out" / "b"), log=lambda line: None)
    ends = 0
    for name, index in in_pieces.index.sources[0].splits.items():
        tokens = in_pieces.tokens(name)
        assert (tokens[0 : len(tokens)] == in_pieces.tokenizer.end_of_text_id).sum() == index.documents
        ends += index.documents
    assert ends == 12 + (split == "position")  # which cuts one document in two
    if split == "position":  # the hash is of the first piece, so its sides differ from those of whole documents
        assert in_pieces.index.sources == whole.index.sources


LAYOUTS = {
    "a.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS),
    "a.json": "".join(json.dumps({"text": text}) + "\n" for text in TEXTS),
    "a.ndjson": "\ufeff" + "\r\n\r\n".join(json.dumps({"text": text}) for text in TEXTS),
    "array.json": json.dumps([{"text": text} for text in TEXTS]),
    "array.jsonl": json.dumps([{"text": text} for text in TEXTS], indent=1),
    "keyed.json": json.dumps({"version": "1.0", "data": [{"text": text} for text in TEXTS]}),
    "keyed.jsonl": json.dumps({"rows": [{"text": text} for text in TEXTS]}, indent=2),
}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_json_is_read_in_every_layout(tmp_path, name, suffix):
    """One object a line, an array, an array under a key: whatever the file is called, it is no text with braces."""
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(COMPRESS[suffix](LAYOUTS[name].encode()))
    assert texts(path) == TEXTS
    found = list(records.read_records(path))
    assert [record.values["text"] for record in found] == TEXTS
    assert all(record.origin.startswith(f"{path}:") for record in found)


def test_one_object_alone_is_one(tmp_path):
    """A line, or spread over lines; an array of objects in it that is part of a record does not make it a container."""
    for indent in (None, 1):
        path = tmp_path / "a.json"
        path.write_text(json.dumps({"text": "one", "data": [1, 2], "spans": [{"start": 0}]}, indent=indent))
        assert texts(path) == ["one"]
    path.write_text(json.dumps({"train": [{"text": "one"}], "data": [{"text": "two"}]}))
    (problem,) = read(path, "text", is_named=True)
    assert "arrays of objects under data and train" in problem.message


def test_numbers_of_any_length(tmp_path):
    """Python's limit of 4,300 digits is no fault of a file."""
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "one", "id": {"9" * 5000}, "x": -{"1" * 5000}.5e7}}\n')
    assert texts(path) == ["one"]


def test_bytes_of_parquet_that_are_not_utf8(tmp_path):
    """Many writers do not check: the row is named, and left out alone."""
    raw = [f"row {i}".encode() for i in range(300)]
    raw[40] = b"caf\xe9"
    column = pyarrow.array(raw, pyarrow.binary()).view(pyarrow.string())
    path = write_parquet(tmp_path / "a.parquet", column)
    items = list(read(path, "text", is_named=True))
    (problem,) = [item for item in items if isinstance(item, Problem)]
    assert problem.message == f"{path}:41 is not UTF-8: byte 3 is 0xe9 of field 'text'"
    assert [item.text for item in items if isinstance(item, Document)] == [f"row {i}" for i in range(300) if i != 40]
    assert [item.origin for item in items[39:42:2]] == [f"{path}:40", f"{path}:42"]
    assert sum(isinstance(item, records.Record) for item in records.read_records(path)) == 299


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.txt.gz"])
def test_pipes_and_links_to_nothing_are_told(tmp_path, name):
    """Nobody waits for a pipe that nobody writes to."""
    os.mkfifo(tmp_path / name)
    (tmp_path / f"link-{name}").symlink_to(tmp_path / "gone")
    for path, why in ((tmp_path / name, "a pipe or a device"), (tmp_path / f"link-{name}", "which does not exist")):
        (problem,) = read(path, "text", is_named=True)
        assert problem.is_file
        assert why in problem.message
