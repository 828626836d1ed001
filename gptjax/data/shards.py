"""Prepared data on disk: memory-mapped token shards, their `index.json`, and `tokenizer.json`.

Shards are plain little-endian uint16 or uint32 ids, one after the other, an end-of-text token after
each document.
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import mmap
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from gptjax.data.splits import SPLITS, SplitName
from gptjax.errors import UserError
from gptjax.text.tokenizer import TOKENIZER_FILE, Tokenizer

FORMAT_VERSION = 2
INDEX_FILE = "index.json"
MAX_SHARD_TOKENS = 2**27
MAX_MAPPED_SHARDS = 128
"""How many shards are mapped at a time: half the descriptors that macOS gives a process, an eighth of Linux's."""
# Before Python 3.13 every mapping keeps a descriptor.
_NO_DESCRIPTOR = {"trackfd": False} if sys.version_info >= (3, 13) else {}


@dataclass(frozen=True)
class Shard:
    """One file of token ids."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class SplitIndex:
    """What a split holds: its documents, tokens (one end-of-text for each document), and their text's UTF-8 bytes."""

    documents: int
    tokens: int
    bytes: int
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class SourceIndex:
    """What a source of the data holds, and how it was split."""

    paths: tuple[str, ...]
    split_rule: str
    split_reason: str
    skipped: dict[str, int]
    """Files and lines left out, by reason."""
    splits: dict[SplitName, SplitIndex]


@dataclass(frozen=True)
class Index:
    """What `index.json` says: where the tokens come from, and how many they are."""

    format_version: int
    dtype: str
    """NumPy's name of the shards' type: "<u2" or "<u4"."""
    fingerprint: str
    """sha256 of the sources and of every setting that decides the tokens."""
    tokenizer_fingerprint: str
    sources: tuple[SourceIndex, ...]
    """One, or with `data.weights` one for each entry of `data.path`."""

    @property
    def paths(self) -> tuple[str, ...]:
        """What all sources were read from."""
        return tuple(path for source in self.sources for path in source.paths)

    @property
    def shards(self) -> list[Shard]:
        """All files, in the order of sources and splits."""
        return [shard for source in self.sources for name in SPLITS for shard in source.splits[name].shards]

    @property
    def content_fingerprint(self) -> str:
        """sha256 of the tokens themselves, whatever files they came from and when those were touched."""
        shards = [
            {name: [shard.sha256 for shard in split.shards] for name, split in source.splits.items()}
            for source in self.sources
        ]
        return hashlib.sha256(json.dumps([self.tokenizer_fingerprint, shards], sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        (folder / INDEX_FILE).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Index":
        """
        Raises:
            UserError: there is no index, or none of this format.
        """
        path = folder / INDEX_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            version = values["format_version"]
            if version != FORMAT_VERSION:
                raise UserError(
                    f"{path} has format {version}, this gptjax reads {FORMAT_VERSION}; prepare the data again"
                )
            return cls(**values | {"sources": tuple(map(_source_from_dict, values["sources"]))})
        except OSError as error:
            raise UserError(f"{folder} is no prepared data: {INDEX_FILE}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no index of prepared data ({error!r}); prepare the data again") from error


class TokenArray:
    """The tokens of all shards of a split as one array that can be sliced; nothing is read before it is used."""

    def __init__(self, shards: Sequence[Shard], read: Callable[[Shard], np.ndarray], vocab_size: int):
        """
        Args:
            shards: `file` is a path.
            read: gives a shard's tokens, each time that they are needed.
            vocab_size: every id must be less, or reading it is an error: a model would take it for another token.
        """
        self._shards, self._read, self._vocab_size = shards, read, vocab_size
        self._starts = [0, *itertools.accumulate(shard.tokens for shard in shards)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, key: slice) -> np.ndarray:
        """`[start:stop]` as a one-dimensional array of the shards' type; a view where one shard holds it all.

        Raises:
            UserError: an id is none of the vocabulary's; the message says in which file, and where.
        """
        start, stop, step = key.indices(len(self))
        if step != 1:
            raise ValueError(f"a TokenArray has slices of step 1, not {step}")
        first = max(0, bisect.bisect_right(self._starts, start, hi=len(self._shards)) - 1)
        last = max(first + 1, bisect.bisect_left(self._starts, stop, hi=len(self._shards)))
        pieces = [
            self._read(shard)[max(0, start - offset) : max(0, stop - offset)]
            for shard, offset in zip(self._shards[first:last], self._starts[first:last], strict=True)
        ]
        for piece in pieces:
            if piece.size and piece.max() >= self._vocab_size:
                self._refuse(start + int(np.argmax(np.concatenate(pieces) >= self._vocab_size)))
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _refuse(self, index: int) -> NoReturn:
        number = bisect.bisect_right(self._starts, index) - 1
        shard, place = self._shards[number], index - self._starts[number]
        raise UserError(
            f"{shard.file} was changed: its token {place} is {self._read(shard)[place]}, but there are only "
            f"{self._vocab_size} tokens; delete its folder and prepare it again"
        )


@dataclass(frozen=True)
class PreparedData:
    """An opened folder of prepared data."""

    folder: Path
    tokenizer: Tokenizer
    index: Index

    def tokens(self, split: SplitName) -> TokenArray:
        """All tokens of a split, memory-mapped, one source after the other."""
        return self._array([shard for source in self.index.sources for shard in source.splits[split].shards])

    def tokens_by_source(self, split: SplitName) -> list[TokenArray]:
        """The tokens of a split, apart for each source."""
        return [self._array(source.splits[split].shards) for source in self.index.sources]

    def _array(self, shards: Sequence[Shard]) -> TokenArray:
        placed = [dataclasses.replace(shard, file=str(self.folder / shard.file)) for shard in shards if shard.tokens]
        return TokenArray(placed, self._read, self.tokenizer.vocab_size)

    @functools.cached_property
    def _read(self) -> Callable[[Shard], np.ndarray]:
        """Maps shards, and keeps those that were used last; any thread may call it."""
        # Rows are drawn from all over, so where the shards do not stay mapped, what is read ahead is seldom used.
        sparse = len(self.index.shards) > MAX_MAPPED_SHARDS
        read = functools.partial(_map, dtype=np.dtype(self.index.dtype), read_ahead=not sparse)
        return functools.lru_cache(MAX_MAPPED_SHARDS)(read)


def _map(shard: Shard, dtype: np.dtype, read_ahead: bool) -> np.ndarray:
    """A shard's tokens as its file has them. The mapping ends with the last array that shows it.

    Raises:
        UserError: the file cannot be mapped, or is shorter than when it was opened.
    """
    size = shard.tokens * dtype.itemsize
    try:
        with open(shard.file, "rb") as file:
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ, **_NO_DESCRIPTOR)
    except OSError as error:
        raise UserError(f"{shard.file} can no longer be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{shard.file} has become shorter than {size} bytes; prepare the data again") from error
    if not read_ahead and hasattr(mmap, "MADV_RANDOM"):
        mapped.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapped, dtype)


class ShardWriter:
    """Writes shards NAME-00000.bin and on, hashing what it writes. Use it in a `with` statement."""

    def __init__(self, folder: Path, name: str, dtype: str, max_shard_tokens: int = MAX_SHARD_TOKENS):
        self._folder, self._name, self._dtype, self._max = folder, name, dtype, max_shard_tokens
        self._shards: list[Shard] = []
        self._stream = self._open()
        self._documents = self._bytes = 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def write(self, ids: list[int]) -> None:
        """Append token ids."""
        left = np.asarray(ids, self._dtype)
        while len(left):
            if self._tokens == self._max:
                self._close_shard()
                self._stream = self._open()
            now, left = np.split(left, [self._max - self._tokens])
            raw = now.tobytes()
            self._stream.write(raw)
            self._digest.update(raw)
            self._tokens += len(now)

    def count(self, documents: int, utf8_bytes: int) -> None:
        """Record how much text the tokens stand for."""
        self._documents += documents
        self._bytes += utf8_bytes

    def finish(self) -> SplitIndex:
        """Write the last shard to the disk itself, and say what was written."""
        self._close_shard()
        tokens = sum(shard.tokens for shard in self._shards)
        return SplitIndex(self._documents, tokens, self._bytes, tuple(self._shards))

    def _open(self):
        self._file = f"{self._name}-{len(self._shards):05}.bin"
        self._digest, self._tokens = hashlib.sha256(), 0
        return (self._folder / self._file).open("wb")

    def _close_shard(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._shards.append(Shard(self._file, self._tokens, self._digest.hexdigest()))


def open_prepared(folder: str | os.PathLike, *, verify: bool = False) -> PreparedData:
    """Open prepared data; `verify` also reads every shard and compares its sha256.

    Raises:
        UserError: a file is missing, of another size or content, or the tokenizer is another one.
    """
    folder = Path(folder)
    index = Index.load(folder)
    for shard in index.shards:
        path = folder / shard.file
        expected = shard.tokens * np.dtype(index.dtype).itemsize
        actual = path.stat().st_size if path.is_file() else None
        if actual != expected:
            found = "is missing" if actual is None else f"has {actual} bytes"
            raise UserError(
                f"{path} {found}, but {INDEX_FILE} says {expected} bytes; delete {folder} and prepare it again"
            )
        if verify and _file_sha256(path) != shard.sha256:
            raise UserError(
                f"{path} was changed: its sha256 is not that of {INDEX_FILE}; delete {folder} and prepare it again"
            )
    tokenizer = Tokenizer.load(folder / TOKENIZER_FILE)
    if tokenizer.fingerprint != index.tokenizer_fingerprint:
        raise UserError(f"{folder / TOKENIZER_FILE} is not the tokenizer that wrote the shards beside it")
    return PreparedData(folder, tokenizer, index)


def token_dtype(vocab_size: int) -> str:
    """The smallest type that holds every id."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


def _source_from_dict(values: dict[str, Any]) -> SourceIndex:
    splits = {name: _split_from_dict(values["splits"][name]) for name in SPLITS}
    return SourceIndex(**values | {"paths": tuple(values["paths"]), "splits": splits})


def _split_from_dict(values: dict[str, Any]) -> SplitIndex:
    return SplitIndex(**values | {"shards": tuple(Shard(**shard) for shard in values["shards"])})


def _file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
