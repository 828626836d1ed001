import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tokenizers

from gptjax.config import DataConfig, TokenizerConfig
from gptjax.data import corpus
from gptjax.data import prepare as preparing
from gptjax.data.prepare import prepare
from gptjax.data.shards import open_prepared
from gptjax.errors import UserError
from gptjax.text.tokenizer_training import train_tokenizer

BYTE, CHAR = TokenizerConfig(kind="byte"), TokenizerConfig(kind="char")


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def many(working_folder) -> DataConfig:
    """A folder of 120 short documents."""
    (working_folder / "many").mkdir()
    for i in range(120):
        (working_folder / "many" / f"{i:03}.txt").write_text(f"Document {i}: naïve 中文 text\n" * (1 + i % 3))
    return DataConfig(path=("many",), validation_fraction=0.2)


def quietly(data, tokenizer=BYTE, out_dir=None):
    """Prepared data, and the one line that was logged about it."""
    lines = []
    prepared = prepare(data, tokenizer, out_dir, progress=False, log=lines.append)
    (line,) = lines
    return prepared, line


def documents_of(prepared, split) -> list[str]:
    ids = prepared.tokens(split)[:].astype(int)
    ends = np.flatnonzero(ids == prepared.tokenizer.end_of_text_id)
    assert ends[-1] == len(ids) - 1, "every document is ended"
    return [
        prepared.tokenizer.decode(part[part != prepared.tokenizer.end_of_text_id]) for part in np.split(ids, ends)[:-1]
    ]


@pytest.mark.parametrize("kind", ["bpe", "byte", "char"])
def test_shards_hold_every_document_once_and_the_index_counts_them(many, kind):
    prepared, line = quietly(many, TokenizerConfig(kind=kind, vocab_size=300))
    found = {split: documents_of(prepared, split) for split in ("train", "validation")}
    originals = [path.read_text() for path in sorted(preparing.Path("many").iterdir())]
    assert sorted(found["train"] + found["validation"]) == sorted(originals)
    for split, texts in found.items():
        index = prepared.index.sources[0].splits[split]
        assert index.documents == len(texts) > 0
        assert index.bytes == sum(len(text.encode()) for text in texts)
        assert index.tokens == len(prepared.tokens(split))
    assert prepared.index.sources[0].split_rule == "hash"
    assert line.startswith("data: built data/many-")
    assert "split by hash (at least 100 documents)" in line


def test_pieces_and_batches_change_nothing(many, monkeypatch):
    whole, _ = quietly(many, TokenizerConfig(vocab_size=300), "whole")
    monkeypatch.setattr(preparing, "PIECE_CHARACTERS", 30)
    monkeypatch.setattr(preparing, "BATCH_CHARACTERS", 50)
    pieces, _ = quietly(many, whole.tokenizer, "pieces")
    assert pieces.index.sources == whole.index.sources


def test_few_documents_are_split_by_position_as_nanogpt_does(working_folder):
    text = "".join(f"line {i}\n" for i in range(500))
    (working_folder / "one.txt").write_text(text)
    prepared, line = quietly(DataConfig(path=("one.txt",), validation_fraction=0.1), TokenizerConfig(kind="char"))
    cut = int(len(text) * 0.9)
    assert documents_of(prepared, "train") == [text[:cut]]
    assert documents_of(prepared, "validation") == [text[cut:]]
    assert "split by position (fewer than 100 documents)" in line
    assert prepared.tokenizer.vocab_size == 16 + len(set(text)), "char knows the held-out characters too"


def test_nothing_changed_is_reused_and_anything_changed_is_not(many, working_folder):
    first, _ = quietly(many)
    again, line = quietly(many)
    assert line.startswith("data: reused")
    assert again.folder == first.folder
    others = [
        quietly(many, TokenizerConfig(kind="char"))[0].folder,
        quietly(DataConfig(path=("many",), validation_fraction=0.3))[0].folder,
        quietly(DataConfig(path=("many",), validation_fraction=0.2, split="position"))[0].folder,
    ]
    (working_folder / "many" / "000.txt").write_text("another text\n")
    others.append(quietly(many)[0].folder)
    assert len({first.folder, *others}) == 5


def test_a_named_folder_follows_its_sources(many, working_folder):
    quietly(many, out_dir="out")
    assert quietly(many, out_dir="out")[1].startswith("data: reused")
    (working_folder / "many" / "000.txt").write_text("something new\n")
    prepared, line = quietly(many, out_dir="out")
    assert line.startswith("data: built")
    assert "something new\n" in documents_of(prepared, "train") + documents_of(prepared, "validation")


def test_a_named_folder_of_other_things_is_not_replaced(many, working_folder):
    """Neither other data nor a stranger's file in the folder is lost."""
    quietly(many, out_dir="out")
    (working_folder / "other.txt").write_text("another text\n" * 50)
    with pytest.raises(UserError, match=r"holds data of many, not of other.txt"):
        quietly(DataConfig(path=("other.txt",)), out_dir="out")
    (working_folder / "many" / "000.txt").write_text("something new\n")
    (working_folder / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"also holds notes.txt"):
        quietly(many, out_dir="out")
    assert (working_folder / "out" / "notes.txt").read_text() == "mine"


def test_a_prepared_folder_is_a_source_with_its_own_tokenizer(many):
    made, _ = quietly(many, TokenizerConfig(kind="char"), "out")
    opened, line = quietly(DataConfig(path=("out",)), BYTE)
    assert opened.tokenizer.kind == "char"
    assert opened.index == made.index
    assert line.startswith("data: opened out")
    assert "not the configured one" in line
    with pytest.raises(UserError, match="out is prepared data, which stands alone, not among 2"):
        quietly(DataConfig(path=("many", "out")))


def test_a_given_tokenizer_is_used_as_it_is(many):
    tokenizer = train_tokenizer(["Document 中文"], TokenizerConfig(kind="bpe", vocab_size=300))
    assert quietly(many, tokenizer)[0].tokenizer.fingerprint == tokenizer.fingerprint


def test_bpe_sees_a_bounded_sample_of_the_training_text_alone(many, monkeypatch):
    seen = []
    monkeypatch.setattr(corpus, "SAMPLE_CHARACTERS_PER_TOKEN", 4)
    monkeypatch.setattr(
        preparing, "train_tokenizer", lambda texts, config: train_tokenizer(seen.extend(texts) or seen, config)
    )
    prepared, _ = quietly(many, TokenizerConfig(vocab_size=300))
    assert 0 < sum(len(text) for text in seen) < 2 * 4 * 300
    assert set(seen) <= set(documents_of(prepared, "train"))


def test_a_folder_with_other_things_is_left_alone(many, working_folder):
    (working_folder / "precious").mkdir()
    (working_folder / "precious" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match="precious exists and is no prepared data"):
        quietly(many, out_dir="precious")
    assert [p.name for p in (working_folder / "precious").iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="cannot be prepared in"):
        quietly(many, out_dir="precious/thesis.tex/below")


def test_an_error_on_the_way_leaves_nothing_and_keeps_what_was(many, working_folder):
    before, _ = quietly(many, out_dir="out")
    (working_folder / "many" / "119.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"119.txt is not UTF-8"):
        quietly(many, out_dir="out")
    assert open_prepared("out", verify=True).index == before.index
    assert sorted(p.name for p in working_folder.iterdir()) == ["many", "out"]


def test_a_refusal_leaves_no_folder_and_no_lock(many, working_folder):
    """What was there stays; what it made itself goes, however deep."""
    (working_folder / "many" / "119.txt").write_bytes(b"\xff")
    (working_folder / "old").mkdir()
    for out_dir in (None, "a/b/c", "old/c"):
        with pytest.raises(UserError, match=r"119.txt is not UTF-8"):
            quietly(many, out_dir=out_dir)
    assert sorted(p.name for p in working_folder.rglob("*") if p.parent.name != "many") == ["many", "old"]


def test_one_at_a_time_though_the_lock_is_removed(many, working_folder, monkeypatch):
    """Four at once, of which the first is refused and takes lock and folder away: none builds beside another, one
    builds, and the others find what it made."""
    inside, most, builds = [], [], []
    build, guard = preparing._build, threading.Lock()

    def watched(*arguments):
        with guard:
            inside.append(1)
            most.append(len(inside))
            builds.append(1)
            first = len(builds) == 1
        try:
            time.sleep(0.2)
            if first:
                raise UserError("refused")
            build(*arguments)
        finally:
            with guard:
                inside.pop()

    monkeypatch.setattr(preparing, "_build", watched)
    outcomes = []

    def one():
        try:
            outcomes.append(quietly(many, out_dir="new/out")[1].split()[1])
        except UserError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["built", "refused", "reused", "reused"]
    assert max(most) == 1
    assert [p.name for p in (working_folder / "new").iterdir()] == ["out"]


def test_a_killed_prepare_leaves_nothing_that_looks_finished(many, working_folder):
    """Killed with everything but the index written; the next one clears up and finishes."""
    code = (
        "import os, signal; from gptjax.config import *; from gptjax.data import prepare as p;"
        "p.Index.save = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        "p.prepare(DataConfig(path=('many',), validation_fraction=0.2), TokenizerConfig(kind='byte'), 'out')"
    )
    environment = os.environ | {"PYTHONPATH": str(preparing.Path(preparing.__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", code], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert (working_folder / ".out.partial" / "train-00000.bin").stat().st_size > 0
    assert not (working_folder / "out").exists()
    prepared, line = quietly(many, out_dir="out")
    assert line.startswith("data: built")
    assert open_prepared(prepared.folder, verify=True).index.sources[0].splits["train"].documents > 0
    assert not (working_folder / ".out.partial").exists()


def test_skipped_files_are_in_index_and_line(many, working_folder):
    (working_folder / "many" / "bad.txt").write_bytes(b"\xff")
    data = DataConfig(path=("many",), validation_fraction=0.2, on_error="skip")
    prepared, line = quietly(data)
    assert prepared.index.sources[0].skipped == {"undecodable files": 1}
    assert line.endswith("skipped 1 undecodable files")


@pytest.fixture
def two_sources(working_folder) -> DataConfig:
    """A mixture of a folder of documents and of one text."""
    (working_folder / "docs").mkdir()
    for i in range(120):
        (working_folder / "docs" / f"{i}.txt").write_text(f"document {i} of many\n")
    (working_folder / "one.txt").write_text("".join(f"line {i} of one\n" for i in range(300)))
    return DataConfig(path=("docs", "one.txt"), weights=(1.0, 3.0), validation_fraction=0.2)


def test_a_mixture_is_split_and_stored_by_source(two_sources):
    """Each source has its own split and shards, and their concatenation is what there is without a mixture."""
    prepared, line = quietly(two_sources)
    docs, one = prepared.index.sources
    assert (docs.paths, one.paths) == (("docs",), ("one.txt",))
    assert (docs.split_rule, one.split_rule) == ("hash", "position")
    assert "hash (at least 100 documents) and position (fewer than 100 documents)" in line
    apart = prepared.tokens_by_source("train")
    assert [len(tokens) for tokens in apart] == [source.splits["train"].tokens for source in prepared.index.sources]
    together = prepared.tokens("train")
    np.testing.assert_array_equal(together[0 : len(together)], np.concatenate([tokens[:] for tokens in apart]))
    assert "document" in prepared.tokenizer.decode(apart[0][:100])
    assert "document" not in prepared.tokenizer.decode(apart[1][:])


def test_other_weights_need_no_new_preparation(two_sources):
    first, _ = quietly(two_sources)
    again, line = quietly(dataclasses.replace(two_sources, weights=(5.0, 0.5)))
    assert line.startswith("data: reused")
    alone, _ = quietly(dataclasses.replace(two_sources, weights=()))
    assert again.folder == first.folder != alone.folder
    assert len(alone.index.sources) == 1


def test_weights_are_one_for_each_source(two_sources):
    with pytest.raises(UserError, match=r"has 1 numbers for 2 sources, which are docs, one\.txt"):
        quietly(dataclasses.replace(two_sources, weights=(1.0,)))
    prepared, _ = quietly(two_sources)
    with pytest.raises(UserError, match="has 3 numbers for 2 sources"):
        quietly(DataConfig(path=(str(prepared.folder),), weights=(1.0, 1.0, 1.0)))


def test_a_tokenizer_file_is_used_as_it_is(many, working_folder):
    """Its fingerprint decides, not its place; and text that it would lose is refused, with nothing left behind."""
    tokenizer = train_tokenizer(["Document 12 naïve 中文"], TokenizerConfig(kind="char"))
    for name in ("here", "there"):
        (working_folder / name).mkdir()
        tokenizer.save(working_folder / name / "tokenizer.json")
    with pytest.raises(UserError, match="never seen"):
        quietly(many, TokenizerConfig(path="here"))
    assert not (working_folder / "data").is_dir() or not [*(working_folder / "data").glob("many*")]
    tokenizer = train_tokenizer(["Document 12 naïve 中文"], TokenizerConfig(vocab_size=300))
    for name in ("here", "there"):
        tokenizer.save(working_folder / name / "tokenizer.json")
    first, _ = quietly(many, TokenizerConfig(path="here"))
    again, line = quietly(many, TokenizerConfig(path="there/tokenizer.json"))
    assert first.tokenizer.fingerprint == tokenizer.fingerprint
    assert line.startswith("data: reused")
    assert again.folder == first.folder
    lower = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    lower.normalizer = tokenizers.normalizers.Lowercase()
    lower.save(str(working_folder / "lower.json"))
    with pytest.raises(UserError, match="cannot encode this text without loss: 'Document"):
        quietly(many, TokenizerConfig(path="lower.json"))


@pytest.mark.parametrize("piece_characters", [2**16, 8])
def test_texts_that_cannot_be_encoded_are_told_by_place_or_left_out(
    many, working_folder, monkeypatch, piece_characters
):
    """Whole documents, or of long ones the piece; all else is what it is without them."""
    monkeypatch.setattr(preparing, "PIECE_CHARACTERS", piece_characters)
    known = train_tokenizer((path.read_text() for path in sorted((working_folder / "many").iterdir())), CHAR)
    before, _ = quietly(many, known)
    for name in ("005", "050x"):
        (working_folder / "many" / f"{name}.txt").write_text("ß")
    with pytest.raises(UserError, match=r"^many/005.txt: .*never seen 'ß'.* \(--data.on-error skip leaves such out\)$"):
        quietly(many, known)
    prepared, line = quietly(dataclasses.replace(many, on_error="skip"), known)
    assert "skipped 2 texts that cannot be encoded" in line
    for split in ("train", "validation"):
        left = [text for text in documents_of(before, split) if not text.startswith("Document 5:")]
        assert documents_of(prepared, split) == left


def test_missing_text_is_asked_for():
    with pytest.raises(UserError, match=r"there is no text: give --data\.path poems\.txt"):
        quietly(DataConfig(path=(), suggestion="poems.txt"))
