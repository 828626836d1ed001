"""Text to token ids and back: byte-level BPE, bytes, characters or SentencePiece, each one `tokenizer.json`.

All kinds are files in the format of the Hugging Face `tokenizers` library, which trains and runs them. What is added
here: a kind, the bytes of every token, a fingerprint, and the promise that text never becomes a special token.
"""

import hashlib
import json
import os
import re
import threading
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import tokenizers

from gptjax.errors import UserError
from gptjax.text.mistaken_files import what_else
from gptjax.text.special_tokens import TOKENIZER_CONFIG, Files, read_files, roles_of
from gptjax.text.token_bytes import byte_level_bytes, decoder_types, sentencepiece_bytes

TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (
    *(END_OF_TEXT, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>"),
    *("[EOS]", "<|eos|>", "<|im_end|>"),
)
"""What tokenizers call the token that ends a document: where no file says which, the first that there is."""

_ENCODING = threading.Lock()
"""Held while text is encoded: whether it may spell special tokens is a switch of the library's tokenizer."""


class Tokenizer:
    """Text to ids and back; special tokens come only from `special_token_ids`, never from text."""

    def __init__(self, backend: tokenizers.Tokenizer, vocab_size: int | None = None, files: Files | None = None):
        """
        Args:
            vocab_size: ids that there are. Those without a token stand for nothing; tokens beyond it are none. None: as
                many as there are tokens.
            files: what the files beside `tokenizer.json` say of special tokens, as `special_tokens.read_files`.
        """
        self._backend = backend
        backend.encode_special_tokens = True  # the file cannot hold it: without it text may spell special tokens
        backend.no_truncation()
        backend.no_padding()
        self.files = files or {}
        """What is carried along with `tokenizer.json`: fields by the name of their file."""
        self._roles = roles_of(self.files)
        self._vocab = backend.get_vocab(with_added_tokens=True)
        self._num_tokens = 1 + max(self._vocab.values())
        self.vocab_size = vocab_size or self._num_tokens
        """Number of ids, special ones included."""
        self._added = {i: token for i, token in backend.get_added_tokens_decoder().items() if i < self.vocab_size}
        self.without_rows = [token for token, i in self._vocab.items() if i >= self.vocab_size]
        """Tokens for which a model has no row."""
        self.special_token_ids = {token.content: i for i, token in sorted(self._added.items()) if token.special}
        """Id of every special token by its name."""

    def with_vocab_size(self, vocab_size: int) -> "Tokenizer":
        """The same for a model with so many rows, which may be more than there are tokens, or fewer.

        Raises:
            UserError: there are fewer rows than tokens that text becomes.
        """
        found = Tokenizer(self._backend, vocab_size, self.files)
        added = {token.content for token in self._backend.get_added_tokens_decoder().values()}
        if lacking := next((token for token in found.without_rows if token not in added), None):
            raise UserError(
                f"the tokenizer has {self._num_tokens} ids, but the model has rows for {vocab_size} only, and none for "
                f"{lacking!r}; give the tokenizer that the model was trained with"
            )
        return found

    @property
    def kind(self) -> Literal["bpe", "byte", "char", "sentencepiece"]:
        """The kinds that are trained here, and SentencePiece's, which writes a space as U+2581."""
        decoders = decoder_types(self._layout["decoder"])
        if "ByteLevel" in decoders:
            trained = self._merges or (self._layout["pre_tokenizer"] or {}).get("type") != "ByteLevel"
            return "bpe" if trained else "byte"
        return "char" if decoders == ["Fuse"] else "sentencepiece"

    @cached_property
    def opening(self) -> tuple[int, ...]:
        """The ids before every text: BOS where the file's post-processor adds it, or `add_bos_token` says so."""
        if self._backend.post_processor is not None:
            with _ENCODING:
                added, bare = (self._backend.encode("a", add_special_tokens=add).ids for add in (True, False))
            start = next((i for i in range(len(added)) if added[i : i + len(bare)] == bare), 0)
            if start:
                return tuple(added[:start])
        bos = self.special_token_ids.get(self._roles.named.get("bos_token", ""))
        asked = self.files.get(TOKENIZER_CONFIG, {}).get("add_bos_token") is True
        return (bos,) if asked and bos is not None else ()

    @cached_property
    def end_of_text_id(self) -> int | None:
        """Id of the token that ends every document; None where the tokenizer has no such token."""
        said = self.special_token_ids.get(self._roles.end_of_document or "")
        if said is not None:
            return said
        return next(
            (self.special_token_ids[name] for name in END_OF_TEXT_NAMES if name in self.special_token_ids), None
        )

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end what the model writes; none where the tokenizer has no such token, so that length alone does."""
        known = [i for i in self._roles.stop_ids if i < self.vocab_size]
        named = self.special_token_ids.get(self._roles.named.get("eos_token", ""))
        return tuple(dict.fromkeys(i for i in (*known, named, self.end_of_text_id) if i is not None))

    @property
    def document_start(self) -> tuple[int, ...]:
        """The ids before a document's first token: `opening`, or the end of the document before it.

        Raises:
            UserError: as `require_end_of_text`.
        """
        return self.opening or (self.require_end_of_text(),)

    @property
    def padding_id(self) -> int:
        """What rows are filled up with: no token is ever predicted there."""
        return self.special_token_ids.get(self._roles.named.get("pad_token", ""), self.end_of_text_id or 0)

    @property
    def named_tokens(self) -> dict[str, str]:
        """`bos_token`, `eos_token` and their like by these names, for chat templates."""
        names = {i: name for name, i in self.special_token_ids.items()}
        bos = names[self.opening[-1]] if self.opening else ""
        return {"bos_token": bos, "eos_token": names.get(self.end_of_text_id, "")} | self._roles.named

    def require_end_of_text(self) -> int:
        """`end_of_text_id`.

        Raises:
            UserError: the tokenizer has no special token that ends a document.
        """
        if self.end_of_text_id is None:
            raise UserError(
                "the tokenizer has no special token that ends a document: tokenizer_config.json beside its "
                "tokenizer.json should name one as eos_token; its own are "
                f"{', '.join(self.special_token_ids) or 'none'}"
            )
        return self.end_of_text_id

    @cached_property
    def prefix(self) -> bytes:
        """What encoding puts before every text: a space with most tokenizers of SentencePiece, else nothing."""
        table = self.token_bytes()
        return b"".join(table[i] for i in self.encode("a")).removesuffix(b"a") if self.kind != "char" else b""

    def encode(self, text: str) -> list[int]:
        """Ids of one text.

        Raises:
            UserError: a lone surrogate, which is no Unicode text, or with `char` a character never seen.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, on all cores.

        Raises:
            UserError: as `encode`; or a text has a token for which the model has no row.
        """
        for text in texts:
            self._require_encodable(text)
        with _ENCODING:
            found = [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        if self.vocab_size < self._num_tokens:
            for text, ids in zip(texts, found, strict=True):
                self._require_rows(text, ids)
        return found

    def encode_rendering(self, text: str) -> list[int]:
        """Ids of what a chat template has written, in which names of special tokens are these.

        Raises:
            UserError: as `encode_batch`.
        """
        names = "|".join(map(re.escape, self.special_token_ids)) or r"(?!)"
        self._require_encodable(re.sub(names, "", text))
        with _ENCODING:
            self._backend.encode_special_tokens = False
            try:
                ids = self._backend.encode(text, add_special_tokens=False).ids
            finally:
                self._backend.encode_special_tokens = True
        self._require_rows(text, ids)
        return ids

    def _require_rows(self, text: str, ids: Sequence[int]) -> None:
        beyond = next((i for i in ids if i >= self.vocab_size), None)
        if beyond is not None:
            raise UserError(
                f"the text {text[:40]!r} has the token {self._backend.id_to_token(beyond)!r}, id {beyond}, but the "
                f"model has rows for {self.vocab_size} ids only; leave it out of the text"
            )

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD, special tokens vanish or give their name.

        Raises:
            UserError: an id outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        outside = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if outside is not None:
            raise UserError(f"token id {outside} is outside this tokenizer's {self.vocab_size} ids")
        return self._backend.decode([i for i in ids if i < self._num_tokens], skip_special_tokens=skip_special_tokens)

    def token_bytes(self) -> list[bytes]:
        """The UTF-8 bytes that each id stands for, in the order of the ids; none for special tokens."""
        return self._token_bytes

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        bytes_of = {"char": str.encode, "sentencepiece": sentencepiece_bytes}.get(self.kind, byte_level_bytes)
        as_text = sentencepiece_bytes if self.kind == "sentencepiece" else str.encode
        table = [b""] * self.vocab_size
        for token, i in self._vocab.items():
            added = self._added.get(i)  # stands for what it says, or for nothing
            if i < self.vocab_size and not (added and added.special):
                table[i] = as_text(token) if added else bytes_of(token)
        return table

    def require_lossless(self, text: str, ids: Sequence[int]) -> None:
        """Check that a text's ids stand for all its bytes and nothing else.

        A tokenizer that composes characters (NFC, as Qwen's does) writes some texts otherwise, to the same reader.

        Raises:
            UserError: they do not, as where the tokenizer normalizes text or has no token for a character.
        """
        table, expected = self._token_bytes, text.encode()
        actual = b"".join([table[i] for i in ids])
        composed = unicodedata.normalize("NFC", text).encode()
        if actual not in (expected, self.prefix + expected, composed, self.prefix + composed):
            actual = actual.removeprefix(self.prefix)
            at = next((i for i, (a, b) in enumerate(zip(actual, expected, strict=False)) if a != b), len(actual))
            was, became = (raw[max(0, at - 10) : at + 20].decode(errors="replace") for raw in (expected, actual))
            raise UserError(
                f"the tokenizer cannot encode this text without loss: {was!r} becomes {became!r}; use one that is "
                "byte-level and does not normalize, such as tokenizer.kind bpe"
            )

    @cached_property
    def fingerprint(self) -> str:
        """sha256, in hex, of everything that decides how text becomes ids."""
        parts: list[object] = [self._vocab, self._merges, self.special_token_ids, self._layout]
        if self.opening or self._roles.end_of_document is not None:
            parts.append([self.opening, self.end_of_text_id])
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        """Write `tokenizer.json`, and beside it the files that are carried along."""
        for name, text in self.texts().items():
            place = Path(path) if name == TOKENIZER_FILE else Path(path).with_name(name)
            place.write_text(text, encoding="utf-8")

    def texts(self) -> dict[str, str]:
        """What `tokenizer.json` and the files beside it hold, by their names."""
        beside = {name: json.dumps(values, indent=2, ensure_ascii=False) + "\n" for name, values in self.files.items()}
        return {TOKENIZER_FILE: self.to_json()} | beside

    def to_json(self) -> str:
        """What `tokenizer.json` holds."""
        return self._backend.to_str(pretty=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read a `tokenizer.json`: one trained here, or any whose tokens are bytes or pieces of text.

        Special tokens are for what the files beside it say.

        Raises:
            UserError: the file is missing or no such tokenizer.
        """
        try:
            raw = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"no tokenizer {path}: {error.strerror}") from error
        try:
            backend = tokenizers.Tokenizer.from_buffer(raw)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is not a tokenizer.json: {what_else(raw, Path(path), error)}") from error
        return cls.of_backend(backend, path, read_files(Path(path).parent))

    @classmethod
    def of_backend(
        cls, backend: tokenizers.Tokenizer, path: str | os.PathLike, files: Files | None = None
    ) -> "Tokenizer":
        """Check that a tokenizer of the library can be used, and name `path` where it cannot.

        Tokens that the files name become special, if they are not yet.

        Raises:
            UserError: as `load`.
        """
        types = decoder_types(json.loads(backend.to_str())["decoder"])
        if "ByteLevel" not in types and types != ["Fuse"] and not {"ByteFallback", "Metaspace"} & set(types):
            raise UserError(
                f"{path} has {' and '.join(types) or 'no'} decoder, from which text does not come back as it was; what "
                "works is byte-level or SentencePiece's, or a char tokenizer of gptjax"
            )
        there = backend.get_vocab(with_added_tokens=True)
        special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        named = [name for name in roles_of(files or {}).named.values() if name in there and name not in special]
        backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in named])
        return cls(backend, files=files)

    @cached_property
    def _file(self) -> dict:
        return json.loads(self._backend.to_str())

    @property
    def _layout(self) -> dict:
        return {name: self._file[name] for name in ("normalizer", "pre_tokenizer", "decoder")}

    @property
    def _merges(self) -> list:
        return self._file["model"].get("merges", [])

    @cached_property
    def _alphabet(self) -> frozenset[str] | None:
        """The characters of a `char` tokenizer; None where every text can be encoded."""
        return frozenset(self._vocab) - frozenset(self.special_token_ids) if self.kind == "char" else None

    def _require_encodable(self, text: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"character {error.start} of the text, {text[error.start]!r}, is no Unicode text"
            ) from error
        if self._alphabet is not None and (unseen := set(text) - self._alphabet):
            first = min(unseen, key=text.index)
            raise UserError(
                f"the char tokenizer has never seen {first!r} (U+{ord(first):04X}), only its {len(self._alphabet)} "
                "characters; tokenizer.kind byte and bpe know them all"
            )
