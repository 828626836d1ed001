"""Files that are given for a tokenizer.json and are none."""

import json
import re
from pathlib import Path


def what_else(raw: bytes, path: Path, error: Exception) -> str:
    """What a file is that the library refuses with this error, and what helps."""
    beside = path.with_name("tokenizer.json")
    hint = f"; did you mean {beside}?" if beside.is_file() and beside != path else ""
    try:
        values = json.loads(raw)
    except ValueError:
        if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", raw):
            return f"it is a tokenizer of tiktoken, of which the split of words is missing{hint}"
        if path.suffix == ".model":
            convert = "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OUT) of transformers writes one"
            return f"it is a model of SentencePiece, which has to be converted: {hint.removeprefix('; ') or convert}"
        return f"it is no JSON, as the Hugging Face tokenizers library writes it{hint}"
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        return f"it has no vocabulary under 'model', where the Hugging Face tokenizers library writes it{hint}"
    return " ".join(str(error).split())
