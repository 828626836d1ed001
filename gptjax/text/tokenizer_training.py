"""Tokenizers that are trained here: byte-level BPE, bytes and characters."""

from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from gptjax.config import TokenizerConfig
from gptjax.text.token_bytes import CHARACTER_OF_BYTE
from gptjax.text.tokenizer import END_OF_TEXT, Tokenizer

SPECIAL_TOKENS = (
    *(END_OF_TEXT, "<|im_start|>", "<|im_end|>", "<|pad|>"),
    *(f"<|reserved_{i}|>" for i in range(12)),
)
"""Reserved names; in every tokenizer trained here they are the ids 0 to 15."""

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


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that `config` asks for; equal texts in equal order give equal tokenizers.

    A `bpe` vocabulary is smaller than asked where the texts hold too few pairs to merge. `byte` does not
    look at the texts, and `char` knows just the characters in them.
    """
    match config.kind:
        case "bpe":
            backend = _train_bpe(texts, config.vocab_size)
        case "byte":
            backend = tokenizers.Tokenizer(models.BPE(_numbered(CHARACTER_OF_BYTE), []))
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            backend.decoder = decoders.ByteLevel()
        case "char":
            # BPE without merges: it neither splits nor copies the text, so it is five times as fast as WordLevel.
            backend = tokenizers.Tokenizer(models.BPE(_numbered(sorted(set().union(*texts))), []))
            backend.decoder = decoders.Fuse()
    backend.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in SPECIAL_TOKENS])
    return Tokenizer(backend)


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
        initial_alphabet=CHARACTER_OF_BYTE,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _numbered(alphabet: Sequence[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
