"""What a model's own files say of its special tokens: which begins a text, and which end a document or an answer.

Hugging Face keeps this beside `tokenizer.json`: in `tokenizer_config.json` (before that in `special_tokens_map.json`)
by name, and in `generation_config.json` and `config.json` by id. What was read is carried along as it is, from a
directory into a run and from a run into a directory. It is guessed by name only where no file says it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.errors import UserError
from gptjax.plain_files import read_json

TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
FILES = (TOKENIZER_CONFIG, GENERATION_CONFIG)
"""The files that are carried along with a `tokenizer.json`, each an object of fields."""
END_OF_DOCUMENT = "gptjax_end_of_document"
"""Our own field of `tokenizer_config.json`: the token after a document, where `eos_token` ends answers instead."""
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

Files = Mapping[str, Mapping[str, Any]]
"""Fields by the name of their file."""


class Roles(NamedTuple):
    """What special tokens are for, by their names and ids."""

    named: dict[str, str]
    """`bos_token`, `eos_token` and their like, as chat templates call them."""
    end_of_document: str | None
    """Stands after each document; None: no file says."""
    stop_ids: tuple[int, ...]
    """Each of these ends what the model writes."""


def read_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The special tokens of a folder with a `tokenizer.json`, as `FILES` has them.

    Raises:
        UserError: one of the files holds no JSON object.
    """
    tokenizer = _read(folder / "special_tokens_map.json") | _read(folder / TOKENIZER_CONFIG)
    tokenizer.pop("chat_template", None)  # lies in a file of its own in a run
    generation = _read(folder / GENERATION_CONFIG)
    model = _read(folder / "config.json")
    if "model_type" in model or "architectures" in model:  # a run's has sections instead
        generation = {name: model[name] for name in TOKEN_IDS if model.get(name) is not None} | generation
    return {name: values for name, values in zip(FILES, (tokenizer, generation), strict=True) if values}


def _read(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no object of fields")
    return values


def roles_of(files: Files) -> Roles:
    """What the files say."""
    tokenizer = files.get(TOKENIZER_CONFIG, {})
    named = {name: text for name, value in tokenizer.items() if name.endswith("_token") and (text := _content(value))}
    end = tokenizer.get(END_OF_DOCUMENT, named.get("eos_token"))
    return Roles(named, end, tuple(ids(files.get(GENERATION_CONFIG, {}).get("eos_token_id"))))


def ids(value: Any) -> Iterator[int]:
    """The ids of a field that holds one, a list of them, or null."""
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int) and not isinstance(number, bool):
            yield number


def _content(value: Any) -> str:
    """A token's text, which some files wrap in an object."""
    value = value.get("content") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) else ""
