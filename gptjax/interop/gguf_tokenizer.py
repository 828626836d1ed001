"""The tokenizer in a GGUF file's metadata, for the library that runs it: byte-level BPE, and SentencePiece's."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from gptjax.errors import UserError
from gptjax.text.tokenizer_training import SPLIT_PATTERN

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Types of tokens: pieces of words, special ones, and others that are taken whole out of a text."""
PREFIX = "tokenizer.ggml."
NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
"""What `tokenizer_config.json` calls the tokens whose ids are here `..._token_id`."""
ENDS = ("eos", "eot", "eom")
"""Ids of tokens that end a text, a turn, and a message."""


def config_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What `tokenizer_config.json` would say."""
    tokens = metadata.get(f"{PREFIX}tokens", [])
    ids = {name: metadata.get(f"{PREFIX}{ours}_token_id") for name, ours in NAMED.items()}
    values: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    values |= {name: tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)}
    if (template := metadata.get("tokenizer.chat_template")) is not None:
        values["chat_template"] = template
    return values


def generation_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What `generation_config.json` would say."""
    ends = dict.fromkeys(metadata.get(f"{PREFIX}{name}_token_id") for name in ENDS)
    ends = [i for i in ends if i is not None]
    found = {
        "bos_token_id": metadata.get(f"{PREFIX}bos_token_id"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": metadata.get(f"{PREFIX}padding_token_id"),
    }
    return {name: value for name, value in found.items() if value is not None}


def build(path: Path, metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer, whose post-processor puts BOS before a text where the file says so.

    Raises:
        UserError: there is none, it is of a kind, or splits words in a way, that is not known here.
    """
    kind, tokens = metadata.get(f"{PREFIX}model"), metadata.get(f"{PREFIX}tokens")
    kinds = {"gpt2": _byte_level, "llama": _sentencepiece}
    if tokens is None or kind not in kinds:
        raise UserError(
            f"{path} has {'no tokenizer' if tokens is None else f'a tokenizer of kind {kind!r}'}; those that can be "
            "read are byte-level BPE (gpt2) and SentencePiece (llama)"
        )
    types = metadata.get(f"{PREFIX}token_type", [1] * len(tokens))
    backend = kinds[kind](path, metadata, tokens)
    backend.add_tokens([_added(t, False) for t, c in zip(tokens, types, strict=True) if c == USER_DEFINED])
    backend.add_special_tokens([_added(t, True) for t, c in zip(tokens, types, strict=True) if c == CONTROL])
    bos = metadata.get(f"{PREFIX}bos_token_id")
    # What llama.cpp takes where the field is left out.
    if bos is not None and metadata.get(f"{PREFIX}add_bos_token", kind == "llama" or _pre(metadata) in LLAMA3):
        template = processors.TemplateProcessing(single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)])
        backend.post_processor = template
    return backend


def _added(token: str, special: bool) -> AddedToken:
    return AddedToken(token, normalized=False, special=special)


LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
QWEN_PATTERN = SPLIT_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
"""Qwen 2's and 3's: GPT-4's, with digits one by one."""


def _pre(metadata: Mapping[str, Any]) -> str:
    return metadata.get(f"{PREFIX}pre", "default")


def _byte_level(path: Path, metadata: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """GPT-2's kind, with the split of words that the file names."""
    of_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    pre, merges = _pre(metadata), metadata.get(f"{PREFIX}merges", [])
    splits = {
        **dict.fromkeys(("gpt-2", "gpt2", "default"), of_gpt2),
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), of_gpt2]),
        **dict.fromkeys(LLAMA3, _split(SPLIT_PATTERN)),
        "qwen2": _split(QWEN_PATTERN),
    }
    if pre not in splits:
        raise UserError(f"{path} splits words as {pre!r}, which is none of those that are known: {', '.join(splits)}")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre in LLAMA3))
    backend.pre_tokenizer, backend.decoder = splits[pre], decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    return backend


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece(path: Path, metadata: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """SentencePiece's BPE, whose merges are those of which a token of the highest score comes first."""
    scores = metadata.get(f"{PREFIX}scores")
    if scores is None:
        raise UserError(f"{path} has no {PREFIX}scores, by which SentencePiece joins pieces of words")
    ids = {token: i for i, token in enumerate(tokens)}
    types = metadata.get(f"{PREFIX}token_type", [NORMAL] * len(tokens))
    merges = [
        (-scores[i], -cut, token[:cut], token[cut:])
        for token, i in ids.items()
        if types[i] in (NORMAL, USER_DEFINED)  # no text is joined to a control token
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    merges.sort(key=lambda merge: merge[:2])
    unknown = metadata.get(f"{PREFIX}unknown_token_id")
    model = models.BPE(
        ids,
        [(left, right) for _, _, left, right in merges],
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    prefixed = metadata.get(f"{PREFIX}add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefixed else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *[decoders.Strip(" ", 1, 0)] * prefixed])
    return backend
