"""From documents to prepared data: choose the split, train the tokenizer, write the shards."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from gptjax.config import DataConfig, TokenizerConfig
from gptjax.data.shards import (
    FORMAT_VERSION,
    INDEX_FILE,
    TOKENIZER_FILE,
    Index,
    PreparedData,
    ShardWriter,
    open_prepared,
    token_dtype,
)
from gptjax.data.sources import read_documents, source_fingerprint
from gptjax.data.splits import SPLITS, Part, Split, SplitName, choose_split, uniform_hash
from gptjax.errors import UserError
from gptjax.text.tokenizer import Tokenizer, split_text, train_tokenizer

PIECE_CHARACTERS = 2**16  # long documents are encoded in pieces, which spreads them over the cores
BATCH_CHARACTERS = 2**22  # of text encoded at once: its tokens take the library some 100 MB

# Training the tokenizer on more than about 1 KB for each of its tokens hardly shortens the text any more.
SAMPLE_CHARACTERS_PER_TOKEN = 1024
MAX_SAMPLE_CHARACTERS = 2**28


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig | Tokenizer,
    out_dir: str | os.PathLike | None = None,
    *,
    progress: bool = True,
    log: Callable[[str], None] = print,
) -> PreparedData:
    """Prepared data of `data.path`: opened where it exists and nothing changed, else made.

    A single prepared folder as `data.path` is opened as it is, with its own tokenizer. Whatever is made
    appears at once and whole: it is written beside its place and renamed. Memory holds the largest
    document and a few hundred MB. `bpe` is trained on a sample of the training text, 1 KB for each token
    of its vocabulary but at most 256 MB, chosen by hash; `char` on all text, as it must know all of it.

    Args:
        tokenizer: how to train one, or one to use as it is.
        out_dir: folder of the result. None: `data.prepared_dir`/NAME-FINGERPRINT, after the first source.
        progress: show a bar if standard error is a terminal.
        log: told in one line what was done.

    Raises:
        UserError: the sources are wrong (see `read_documents`), the split leaves a side empty, or `out_dir`
            holds something else.
    """
    if not data.path:
        raise UserError(f"there is no text: give --data.path {data.suggestion or 'FILE'}")
    prepared_paths = [path for path in data.path if (Path(path) / INDEX_FILE).is_file()]
    if prepared_paths:
        if len(data.path) > 1:
            raise UserError(
                f"data.path {prepared_paths[0]} is prepared data, which stands alone, not among {len(data.path)}"
            )
        prepared = open_prepared(prepared_paths[0])
        log(f"data: opened {describe(prepared)}; its own tokenizer is used, not the configured one")
        return prepared
    fingerprint = _fingerprint(data, tokenizer)
    folder = Path(out_dir) if out_dir else Path(data.prepared_dir, f"{_name(data)}-{fingerprint[:12]}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Whoever comes second waits, and finds the data made; a killed process holds no lock.
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if (folder / INDEX_FILE).is_file():
                prepared = open_prepared(folder)
                if prepared.index.fingerprint == fingerprint:
                    log(f"data: reused {describe(prepared)}")
                    return prepared
                _require_replaceable(prepared, data)
            elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise UserError(f"{folder} exists and is no prepared data; choose another folder")
            with _written_whole(folder) as partial:
                _build(partial, data, tokenizer, fingerprint, progress)
    except OSError as error:
        raise UserError(f"data cannot be prepared in {folder}: {error}") from error
    prepared = open_prepared(folder)
    log(f"data: built {describe(prepared)}")
    return prepared


def _require_replaceable(prepared: PreparedData, data: DataConfig) -> None:
    """Data is made anew over what was made of the same sources, and over nothing else."""
    if prepared.index.sources != data.path:
        raise UserError(
            f"{prepared.folder} holds data of {' '.join(prepared.index.sources)}, not of {' '.join(data.path)}; "
            "choose another folder, or remove it"
        )
    shards = {shard.file for split in prepared.index.splits.values() for shard in split.shards}
    strangers = {path.name for path in prepared.folder.iterdir()} - shards - {INDEX_FILE, TOKENIZER_FILE}
    if strangers:
        raise UserError(f"{prepared.folder} would be made anew, but also holds {min(strangers)}; choose another folder")


def describe(prepared: PreparedData) -> str:
    """One line: where, from what, how many tokens, and how they were split."""
    index = prepared.index
    sizes = ", ".join(f"{name} {index.splits[name].tokens:,} tokens" for name in SPLITS)
    skipped = "".join(f", skipped {count} {reason}" for reason, count in sorted(index.skipped.items()))
    return (
        f"{prepared.folder} from {' '.join(index.sources)}: {sizes} ({prepared.tokenizer.kind}, vocabulary "
        f"{prepared.tokenizer.vocab_size}), split by {index.split_rule} ({index.split_reason}){skipped}"
    )


def _fingerprint(data: DataConfig, tokenizer: TokenizerConfig | Tokenizer) -> str:
    trained = isinstance(tokenizer, Tokenizer)
    parts = {
        "format_version": FORMAT_VERSION,
        "sources": source_fingerprint(data),
        "tokenizer": tokenizer.fingerprint if trained else dataclasses.asdict(tokenizer),
        "validation_fraction": data.validation_fraction,
        "split": data.split,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _name(data: DataConfig) -> str:
    stem = Path(data.path[0].removesuffix("://")).stem
    return re.sub(r"[^\w-]+", "_", stem).strip("_") or "data"


@contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write in, which takes the place of `folder` when all went well; call it under the lock."""
    partial = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _build(
    folder: Path, data: DataConfig, tokenizer: TokenizerConfig | Tokenizer, fingerprint: str, progress: bool
) -> None:
    skipped: Counter[str] = Counter()
    split = choose_split(read_documents(data, skipped), data)

    def parts() -> Iterator[Part]:
        return split.parts(read_documents(data, Counter()))

    if isinstance(tokenizer, TokenizerConfig):
        tokenizer = train_tokenizer(_tokenizer_texts(parts(), split, tokenizer), tokenizer)
    tokenizer.save(folder / TOKENIZER_FILE)
    dtype = token_dtype(tokenizer.vocab_size)
    with ExitStack() as stack:
        writers = {name: stack.enter_context(ShardWriter(folder, name, dtype)) for name in SPLITS}
        advance = stack.enter_context(_progress_bar(split.characters, progress))
        for batch in _batches(parts()):
            for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
                writer = writers[piece.split]
                writer.write([*ids, tokenizer.end_of_text_id] if piece.ends_document else ids)
                writer.count(documents=int(piece.ends_document), utf8_bytes=len(piece.text.encode()))
            advance(sum(len(piece.text) for piece in batch))
        Index(
            format_version=FORMAT_VERSION,
            dtype=dtype,
            fingerprint=fingerprint,
            tokenizer_fingerprint=tokenizer.fingerprint,
            sources=data.path,
            split_rule=split.rule,
            split_reason=split.reason,
            skipped=dict(skipped),
            splits={name: writer.finish() for name, writer in writers.items()},
        ).save(folder)


def _tokenizer_texts(parts: Iterable[Part], split: Split, config: TokenizerConfig) -> Iterator[str]:
    if config.kind == "byte":
        return
    wanted = min(config.vocab_size * SAMPLE_CHARACTERS_PER_TOKEN, MAX_SAMPLE_CHARACTERS)
    share = wanted / split.train_characters
    for part in parts:
        if config.kind == "char":
            yield part.text
        elif part.split == "train":
            for text in split_text(part.text, PIECE_CHARACTERS):
                if share >= 1 or uniform_hash(text, "tokenizer") < share:
                    yield text


@dataclasses.dataclass(frozen=True, slots=True)
class _Piece:
    split: SplitName
    text: str
    ends_document: bool


def _batches(parts: Iterable[Part]) -> Iterator[list[_Piece]]:
    batch, characters = [], 0
    for part in parts:
        left = len(part.text)
        for text in split_text(part.text, PIECE_CHARACTERS):
            left -= len(text)
            batch.append(_Piece(part.split, text, ends_document=left == 0))
            characters += len(text)
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


@contextmanager
def _progress_bar(total: int, shown: bool) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn("tokenizing"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not (shown and sys.stderr.isatty())) as bar:
        task = bar.add_task("tokenizing", total=total)
        yield lambda characters: bar.advance(task, characters)
