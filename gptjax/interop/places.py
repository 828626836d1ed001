"""Where models of other programs lie, a Hugging Face directory or a GGUF file, and what each says in the same terms."""

from pathlib import Path
from typing import Any

from gptjax.interop.configs import is_huggingface, read_json
from gptjax.interop.gguf import GgufFile, is_gguf, open_gguf
from gptjax.interop.tensor_files import TensorFiles
from gptjax.text.templates import read_template, template_file


def is_foreign(place: Path) -> bool:
    """Whether a model of another program lies there; a run does not count."""
    return is_gguf(place) or is_huggingface(place)


def read_values(place: Path) -> dict[str, Any]:
    """What `config.json` says, or would say.

    Raises:
        UserError: it cannot be read, or has an architecture that is not known here.
    """
    return open_gguf(place).config_json if is_gguf(place) else read_json(place)


def open_tensors(place: Path) -> TensorFiles | GgufFile:
    """The tensors by the names that Hugging Face has for them, none of them read yet.

    Raises:
        UserError: there are none, or files are damaged.
    """
    return open_gguf(place) if is_gguf(place) else TensorFiles(place)


def template_of(place: Path) -> tuple[str, str] | None:
    """The chat template of a run or of another program's model, and where it stands; None: there is none.

    Raises:
        UserError: it cannot be read.
    """
    if is_gguf(place):
        text = open_gguf(place).tokenizer_config.get("chat_template")
        return None if text is None else (text, f"the chat template of {place}")
    path = template_file(place)
    return None if path is None else (read_template(path), str(path))
