"""Tokenizers that a user brings, wherever they lie and however they are written."""

import difflib
import os
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from gptjax.errors import UserError
from gptjax.interop.gguf import is_gguf, open_gguf
from gptjax.plain_files import read_json, read_text
from gptjax.text.special_tokens import GENERATION_CONFIG, TOKENIZER_CONFIG, read_files
from gptjax.text.tokenizer import TOKENIZER_FILE, Tokenizer

ADDED_TOKENS = "added_tokens.json"
"""Further tokens of GPT-2's kind, with the names of Hugging Face: an object, token to id."""
GPT2_VOCABULARY, GPT2_MERGES = "encoder.json", "vocab.bpe"
HUGGING_FACE_NAMES = {"vocab.json": "merges.txt", GPT2_VOCABULARY: GPT2_MERGES}
"""The two files of a GPT-2 tokenizer: OpenAI's names, and those that Hugging Face gave them."""


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """A tokenizer, with the roles that the files beside it give special tokens.

    Args:
        path: a `tokenizer.json`, a GGUF file, one of GPT-2's `encoder.json` and `vocab.bpe`, or a folder with any of
            them but a GGUF file: a run, prepared data and a Hugging Face directory are such folders.

    Raises:
        UserError: nothing is there, with the nearest that is, or no tokenizer from which text comes back as it was.
    """
    path = Path(path)
    if path.is_dir():
        if (path / TOKENIZER_FILE).is_file():
            return Tokenizer.load(path / TOKENIZER_FILE)
        vocabulary = next((path / name for name in HUGGING_FACE_NAMES if (path / name).is_file()), None)
        if vocabulary is None:
            raise UserError(f"{path} holds no {TOKENIZER_FILE}, nor GPT-2's {GPT2_VOCABULARY} and {GPT2_MERGES}")
        return _load_gpt2(vocabulary, path / HUGGING_FACE_NAMES[vocabulary.name])
    if not path.exists():
        names = os.listdir(path.parent) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f"did you mean {path.parent / near[0]}?" if near else f"nothing in {path.parent} is called so"
        raise UserError(f"no tokenizer {path}: there is no such file or folder; {hint}")
    for vocabulary, merges in HUGGING_FACE_NAMES.items():
        if path.name in (vocabulary, merges):
            return _load_gpt2(path.with_name(vocabulary), path.with_name(merges))
    return _of_gguf(path) if is_gguf(path) else Tokenizer.load(path)


def _of_gguf(path: Path) -> Tokenizer:
    file = open_gguf(path)
    said = {name: value for name, value in file.tokenizer_config.items() if name != "chat_template"}
    files = {TOKENIZER_CONFIG: said, GENERATION_CONFIG: file.generation_config}
    return Tokenizer.of_backend(file.tokenizer(), path, files)


def _load_gpt2(vocabulary: Path, merges: Path) -> Tokenizer:
    """GPT-2's byte-level BPE (Radford et al. 2019) of a JSON object, token to id, and a list of merges."""
    try:
        ids = read_json(vocabulary)
        beside = vocabulary.with_name(ADDED_TOKENS)
        added = read_json(beside) if beside.is_file() else {}
        lines = read_text(merges).split("\n")
    except OSError as error:
        raise UserError(f"no tokenizer {vocabulary}: {error.filename} is missing beside it") from error
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    try:
        backend = tokenizers.Tokenizer(models.BPE(ids | added, pairs))
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"{vocabulary} and {merges.name} do not fit together: {' '.join(str(error).split())}"
        ) from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    special = [*(token for token in ids if token.startswith("<|") and token.endswith("|>")), *added]
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in special])
    return Tokenizer.of_backend(backend, vocabulary, read_files(vocabulary.parent))
