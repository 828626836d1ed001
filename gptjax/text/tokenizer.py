"""Text to token ids and back: byte-level BPE, bytes or characters, each one `tokenizer.json`.

All kinds are files in the format of the Hugging Face `tokenizers` library, which trains and runs
them, so that other programs read them too. What is added here: a kind, the bytes of every token,
a fingerprint, and the promise that text never becomes a special token.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gptjax.config import TokenizerConfig
from gptjax.errors import UserError

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (
    *(END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<|pad|>"),
    *(f"<|reserved_{i}|>" for i in range(12)),
)
"""Reserved names; in every tokenizer trained here they are the ids 0 to 15."""
END_OF_TEXT_NAMES = (
    *(END_OF_TEXT, "<|end_of_text|>", "<｜end▁of▁sentence｜>", "</s>", "<eos>"),
    *("[EOS]", "<|eos|>", "<|im_end|>"),
)
"""What tokenizers call the token that ends a document; the first one that a tokenizer has is meant."""

# GPT-4's (`cl100k_base` in tiktoken): contractions, words with one leading mark or space, up to three
# digits, punctuation with its newlines, newlines with their indentation so far, and other whitespace.
SPLIT_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


class Tokenizer:
    """Text to ids and back; special tokens come only from `special_token_ids`, never from text."""

    def __init__(self, backend: tokenizers.Tokenizer, vocab_size: int = 0):
        """
        Args:
            vocab_size: ids that there are to be at least; those without a token stand for nothing.
        """
        self._backend = backend
        backend.encode_special_tokens = True  # the file cannot hold it: without it text may spell special tokens
        backend.no_truncation()
        backend.no_padding()
        self._vocab = backend.get_vocab(with_added_tokens=True)
        self._added = backend.get_added_tokens_decoder()
        self.special_token_ids = {token.content: i for i, token in sorted(self._added.items()) if token.special}
        """Id of every special token by its name."""
        self._num_tokens = 1 + max(self._vocab.values())
        self.vocab_size = max(self._num_tokens, vocab_size)
        """Number of ids, special ones included."""

    def with_vocab_size(self, vocab_size: int) -> "Tokenizer":
        """The same with at least so many ids, for a model that has more rows than there are tokens."""
        return Tokenizer(self._backend, vocab_size)

    @property
    def kind(self) -> Literal["bpe", "byte", "char", "sentencepiece"]:
        """The kinds that are trained here, and SentencePiece's, which writes a space as U+2581."""
        decoders = _decoder_types(self._layout["decoder"])
        if "ByteLevel" in decoders:
            trained = self._merges or self._layout["pre_tokenizer"]["type"] != "ByteLevel"
            return "bpe" if trained else "byte"
        return "char" if decoders == ["Fuse"] else "sentencepiece"

    @property
    def end_of_text_id(self) -> int:
        """Id of the token that ends every document."""
        return next(self.special_token_ids[name] for name in END_OF_TEXT_NAMES if name in self.special_token_ids)

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
            UserError: as `encode`.
        """
        for text in texts:
            self._require_encodable(text)
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

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
        bytes_of = {"char": str.encode, "sentencepiece": _sentencepiece_bytes}.get(self.kind, _byte_level_bytes)
        table = [b""] * self.vocab_size
        for token, i in self._vocab.items():
            if i in self._added:  # stands for what it says, or for nothing
                table[i] = b"" if self._added[i].special else token.encode()
            else:
                table[i] = bytes_of(token)
        return table

    def require_lossless(self, text: str, ids: Sequence[int]) -> None:
        """Check that a text's ids stand for all its bytes and nothing else.

        Raises:
            UserError: they do not, as where the tokenizer normalizes text or has no token for a character.
        """
        table, expected = self._token_bytes, text.encode()
        actual = b"".join([table[i] for i in ids])
        if actual not in (expected, self.prefix + expected):
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
        parts = [self._vocab, self._merges, self.special_token_ids, self._layout]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        """Write `tokenizer.json`."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """What `tokenizer.json` holds."""
        return self._backend.to_str(pretty=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Read a `tokenizer.json`: one trained here, or any whose tokens are bytes or pieces of text.

        Raises:
            UserError: the file is missing or no such tokenizer, or no special token ends a document.
        """
        try:
            raw = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"no tokenizer {path}: {error.strerror}") from error
        try:
            backend = tokenizers.Tokenizer.from_buffer(raw)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is not a tokenizer.json: {_what_else(raw, Path(path), error)}") from error
        return cls.of_backend(backend, path)

    @classmethod
    def of_backend(cls, backend: tokenizers.Tokenizer, path: str | os.PathLike) -> "Tokenizer":
        """Check that a tokenizer of the library can be used, and name `path` where it cannot.

        Raises:
            UserError: as `load`.
        """
        types = _decoder_types(json.loads(backend.to_str())["decoder"])
        if "ByteLevel" not in types and types != ["Fuse"] and not {"ByteFallback", "Metaspace"} & set(types):
            raise UserError(
                f"{path} has {' and '.join(types) or 'no'} decoder, from which text does not come back as it was; what "
                "works is byte-level or SentencePiece's, or a char tokenizer of gptjax"
            )
        tokenizer = cls(backend)
        if not set(END_OF_TEXT_NAMES) & set(tokenizer.special_token_ids):
            raise UserError(
                f"{path} has no special token that ends a document, such as {END_OF_TEXT} or </s>; its own are "
                f"{', '.join(tokenizer.special_token_ids) or 'none'}"
            )
        return tokenizer

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


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that `config` asks for; equal texts in equal order give equal tokenizers.

    A `bpe` vocabulary is smaller than asked where the texts hold too few pairs to merge. `byte` does not
    look at the texts, and `char` knows just the characters in them.
    """
    match config.kind:
        case "bpe":
            backend = _train_bpe(texts, config.vocab_size)
        case "byte":
            backend = tokenizers.Tokenizer(models.BPE(_numbered(_CHARACTER_OF_BYTE), []))
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            backend.decoder = decoders.ByteLevel()
        case "char":
            # BPE without merges: it neither splits nor copies the text, so it is five times as fast as WordLevel.
            backend = tokenizers.Tokenizer(models.BPE(_numbered(sorted(set().union(*texts))), []))
            backend.decoder = decoders.Fuse()
    backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in SPECIAL_TOKENS])
    return Tokenizer(backend)


# Where every byte-level tokenizer that we know splits, GPT-2's, GPT-4's and ours among them: after a line break
# between visible characters, and before a single space between them.
_CUT = re.compile(r"(?<=\S\n)(?=\S)|(?<=\S)(?= \S)")
_CUT_SEARCH_CHARACTERS = 4096


def split_text(text: str, max_characters: int) -> Iterator[str]:
    """Cut a long text into pieces that encode, one by one, to the ids of the whole.

    The cuts are between words or lines, where byte-level tokenizers always split. A text without such a
    place in the last 4096 of `max_characters` is cut there, and its ids may differ around the cut.
    """
    start = 0
    while len(text) - start > max_characters:
        end = start + max_characters
        cuts = _CUT.finditer(text, max(start + 1, end - _CUT_SEARCH_CHARACTERS), end + 1)
        cut = max((match.start() for match in cuts if match.start() <= end), default=end)
        yield text[start:cut]
        start = cut
    yield text[start:]


def _train_bpe(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=_CHARACTER_OF_BYTE,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _numbered(alphabet: Sequence[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate((*SPECIAL_TOKENS, *alphabet))}


def _printable_bytes() -> list[str]:
    """The character by which byte-level BPE writes each byte: itself if visible in Latin-1, else from U+0100 on."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in visible else next(stand_ins)) for byte in range(256)]


_CHARACTER_OF_BYTE = _printable_bytes()
_BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(_CHARACTER_OF_BYTE)}


def _byte_level_bytes(token: str) -> bytes:
    return bytes(_BYTE_OF_CHARACTER[character] for character in token)


def _sentencepiece_bytes(token: str) -> bytes:
    if match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):
        return bytes.fromhex(match[1])
    return token.replace("▁", " ").encode()


def _what_else(raw: bytes, path: Path, error: Exception) -> str:
    """What a file that the library does not read is instead, and what helps."""
    beside = path.with_name("tokenizer.json")
    hint = f"; did you mean {beside}?" if beside.is_file() and beside != path else ""
    try:
        values = json.loads(raw)
    except ValueError:
        if path.suffix == ".model":
            convert = "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OUT) of transformers writes one"
            return f"it is a model of SentencePiece, which has to be converted: {hint.removeprefix('; ') or convert}"
        return f"it is no JSON, as the Hugging Face tokenizers library writes it{hint}"
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        return f"it has no vocabulary under 'model', where the Hugging Face tokenizers library writes it{hint}"
    return " ".join(str(error).split())


def _decoder_types(decoder: dict | None) -> list[str]:
    """The types of a decoder's steps, as its file names them."""
    if decoder is None:
        return []
    return [step["type"] for step in decoder["decoders"]] if decoder["type"] == "Sequence" else [decoder["type"]]
