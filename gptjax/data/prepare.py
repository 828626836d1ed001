"""From documents to prepared data: choose the split, train the tokenizer, write the shards."""

import dataclasses
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from gptjax.config import DataConfig, TokenizerConfig
from gptjax.data.corpus import PIECE_CHARACTERS, Source, open_sources, tokenizer_texts
from gptjax.data.folders import NO_CONTENT, is_empty, locked, written_whole
from gptjax.data.formats import MAX_PIECE_CHARACTERS
from gptjax.data.shards import (
    FORMAT_VERSION,
    INDEX_FILE,
    Index,
    PreparedData,
    ShardWriter,
    SourceIndex,
    open_prepared,
    token_dtype,
)
from gptjax.data.sources import source_fingerprint
from gptjax.data.splits import SPLITS, Part, SplitName
from gptjax.errors import UserError
from gptjax.text.files import load_tokenizer
from gptjax.text.special_tokens import FILES
from gptjax.text.splitting import split_text
from gptjax.text.tokenizer import TOKENIZER_FILE, Tokenizer
from gptjax.text.tokenizer_training import train_tokenizer

MOST_STEM_BYTES = 64  # of the folder's name, from the first source
BATCH_CHARACTERS = 2**22  # of text encoded at once: its tokens take the library some 100 MB


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
    appears at once and whole: it is written apart, and then moved. Memory holds a few hundred MB,
    however large the text; what a tokenizer is trained on is `tokenizer_texts`.

    Args:
        tokenizer: how to get one, or one to use as it is.
        out_dir: folder of the result. None: `data.prepared_dir`/NAME-FINGERPRINT, after the first source.
        progress: show a bar if standard error is a terminal.
        log: told in one line what was done.

    Raises:
        UserError: the sources or their weights are wrong (see `read_documents`), the split leaves a side empty,
            the tokenizer loses text, or `out_dir` holds something else.
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
        _require_weights(data, [" ".join(source.paths) for source in prepared.index.sources])
        log(f"data: opened {describe(prepared)}; its own tokenizer is used, not the configured one")
        return prepared
    _require_weights(data, data.path)
    if isinstance(tokenizer, TokenizerConfig) and tokenizer.path:
        tokenizer = load_tokenizer(tokenizer.path)
    fingerprint = _fingerprint(data, tokenizer)
    folder = Path(out_dir) if out_dir else Path(data.prepared_dir, f"{_name(data)}-{fingerprint[:12]}")
    try:
        with locked(folder):
            if (folder / INDEX_FILE).is_file():
                prepared = open_prepared(folder)
                if prepared.index.fingerprint == fingerprint:
                    log(f"data: reused {describe(prepared)}")
                    return prepared
                _require_replaceable(prepared, data)
            elif not is_empty(folder):
                raise UserError(f"{folder} exists and is no prepared data; choose another folder")
            with written_whole(folder, INDEX_FILE) as partial:
                _build(partial, data, tokenizer, fingerprint, progress)
    except OSError as error:
        raise UserError(f"data cannot be prepared in {folder}: {error}") from error
    prepared = open_prepared(folder)
    log(f"data: built {describe(prepared)}")
    return prepared


def _require_weights(data: DataConfig, sources: Sequence[str]) -> None:
    if data.weights and len(data.weights) != len(sources):
        raise UserError(
            f"data.weights has {len(data.weights)} numbers for {len(sources)} sources, which are {', '.join(sources)}; "
            "give one for each"
        )


def _require_replaceable(prepared: PreparedData, data: DataConfig) -> None:
    """Data is made anew over what was made of the same sources, and over nothing else."""
    index = prepared.index
    if index.paths != data.path:
        raise UserError(
            f"{prepared.folder} holds data of {' '.join(index.paths)}, not of {' '.join(data.path)}; "
            "choose another folder, or remove it"
        )
    known = {shard.file for shard in index.shards} | {INDEX_FILE, TOKENIZER_FILE, *FILES}
    strangers = {path.name for path in prepared.folder.iterdir()} - known - NO_CONTENT
    if strangers:
        raise UserError(f"{prepared.folder} would be made anew, but also holds {min(strangers)}; choose another folder")


def describe(prepared: PreparedData) -> str:
    """One line: where, from what, how many tokens, and how they were split."""
    index = prepared.index
    sizes = ", ".join(f"{name} {len(prepared.tokens(name)):,} tokens" for name in SPLITS)
    rules = " and ".join(dict.fromkeys(f"{s.split_rule} ({s.split_reason})" for s in index.sources))
    skipped = sum((Counter(source.skipped) for source in index.sources), Counter())
    left_out = "".join(f", skipped {count} {reason}" for reason, count in sorted(skipped.items()))
    return (
        f"{prepared.folder} from {' '.join(index.paths)}: {sizes} ({prepared.tokenizer.kind}, vocabulary "
        f"{prepared.tokenizer.vocab_size}), split by {rules}{left_out}"
    )


def _fingerprint(data: DataConfig, tokenizer: TokenizerConfig | Tokenizer) -> str:
    trained = isinstance(tokenizer, Tokenizer)
    parts = {
        "format_version": FORMAT_VERSION,
        "sources": source_fingerprint(data),
        "tokenizer": tokenizer.fingerprint if trained else dataclasses.asdict(tokenizer),
        "validation_fraction": data.validation_fraction,
        "split": data.split,
        "apart": bool(data.weights),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _name(data: DataConfig) -> str:
    stem = Path(data.path[0].removesuffix("://")).stem
    name = re.sub(r"[^\w-]+", "_", stem).strip("_")
    return name.encode()[:MOST_STEM_BYTES].decode(errors="ignore") or "data"  # not half a character


def _build(
    folder: Path, data: DataConfig, tokenizer: TokenizerConfig | Tokenizer, fingerprint: str, progress: bool
) -> None:
    sources = open_sources(data)
    imported = isinstance(tokenizer, Tokenizer)
    if not imported:
        tokenizer = train_tokenizer(tokenizer_texts(sources, tokenizer), tokenizer)
    tokenizer.save(folder / TOKENIZER_FILE)
    dtype = token_dtype(tokenizer.vocab_size)
    with _progress_bar(sum(source.split.characters for source in sources), progress) as advance:
        indices = tuple(
            _write_source(folder, f"{number}-" if data.weights else "", source, tokenizer, dtype, imported, advance)
            for number, source in enumerate(sources)
        )
    Index(FORMAT_VERSION, dtype, fingerprint, tokenizer.fingerprint, indices).save(folder)


def _write_source(
    folder: Path,
    prefix: str,
    source: Source,
    tokenizer: Tokenizer,
    dtype: str,
    check_lossless: bool,
    advance: Callable[[int], None],
) -> SourceIndex:
    skipped = Counter(source.skipped)
    with ExitStack() as stack:
        writers = {name: stack.enter_context(ShardWriter(folder, prefix + name, dtype)) for name in SPLITS}
        can_skip = source.data.on_error == "skip"
        write_parts(source.parts(), tokenizer, writers, check_lossless, advance, skipped if can_skip else None)
        splits = {name: writer.finish() for name, writer in writers.items()}
    return SourceIndex(source.data.path, source.split.rule, source.split.reason, dict(skipped), splits)


def write_parts(
    parts: Iterable[Part],
    tokenizer: Tokenizer,
    writers: Mapping[SplitName, ShardWriter],
    check_lossless: bool = False,
    advance: Callable[[int], None] = lambda characters: None,
    skipped: Counter[str] | None = None,
) -> None:
    """Encode documents on all cores, and write each to its split: what the tokenizer puts before a text (a BOS token,
    with some), the document, and an end-of-text token.

    Args:
        check_lossless: compare what every text became with its bytes.
        advance: told the characters done so far, a batch at a time.
        skipped: counts what cannot be encoded, which is left out then. None: it stops.

    Raises:
        UserError: the tokenizer cannot encode a text, with its place, or has no token that ends it.
    """
    end, begins = tokenizer.require_end_of_text(), dict.fromkeys(writers, True)
    # Where every text gets a prefix, a cut would put one into the middle of a document.
    for batch in _batches(parts, MAX_PIECE_CHARACTERS if tokenizer.prefix else PIECE_CHARACTERS):
        for piece, ids in zip(batch, _encode(batch, tokenizer, check_lossless, skipped), strict=True):
            writer = writers[piece.split]
            if ids is None and begins[piece.split] and piece.last:  # nothing is left of the document
                continue
            writer.write([*tokenizer.opening * begins[piece.split], *(ids or ()), *[end] * piece.last])
            begins[piece.split] = piece.last
            writer.count(documents=int(piece.last), utf8_bytes=len(piece.text.encode()))
        advance(sum(len(piece.text) for piece in batch))


def _encode(
    batch: Sequence[Part], tokenizer: Tokenizer, check_lossless: bool, skipped: Counter[str] | None
) -> list[list[int] | None]:
    """The ids of each piece; None for what cannot be encoded and is skipped."""

    def checked(pieces: Sequence[Part]) -> list[list[int] | None]:
        found = tokenizer.encode_batch([piece.text for piece in pieces])
        if check_lossless:
            for piece, ids in zip(pieces, found, strict=True):
                tokenizer.require_lossless(piece.text, ids)
        return found

    try:
        return checked(batch)
    except UserError as error:
        if len(batch) > 1:  # it is one of them
            halves = batch[: len(batch) // 2], batch[len(batch) // 2 :]
            return [ids for half in halves for ids in _encode(half, tokenizer, check_lossless, skipped)]
        if skipped is None:
            raise UserError(f"{batch[0].origin}: {error} (--data.on-error skip leaves such out)") from None
        skipped["texts that cannot be encoded"] += 1
        return [None]


def _batches(parts: Iterable[Part], piece_characters: int) -> Iterator[list[Part]]:
    """The parts in batches, cut into pieces of which only the last ends what its part ends."""
    batch, characters = [], 0
    for part in parts:
        left = len(part.text)
        for text in split_text(part.text, piece_characters):
            left -= len(text)
            batch.append(part._replace(text=text, last=part.last and left == 0))
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
