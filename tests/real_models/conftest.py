"""Two real pretrained models; everything here is skipped where `GPTJAX_REAL_MODELS` names no folder that has them.

`.ci/run` fetches them by `fetch.py`, and starts pytest with `--confcutdir` here: the suite's eight fake devices, and
its compiler without optimizations, are not for models of this size.
"""

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = os.environ.get("GPTJAX_REAL_MODELS", "")
sys.path.insert(0, str(ROOT))


class Theirs(NamedTuple):
    """A model as transformers has it."""

    name: str
    gguf: Path
    directory: Path
    """The same model, and its tokenizer, as transformers writes them."""
    model: Any
    tokenizer: Any


@pytest.fixture(scope="session", params=["smollm2", "gemma3"])
def theirs(request, tmp_path_factory) -> Theirs:
    """Read, dequantized and converted by transformers."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    name, folder = request.param, Path(FOLDER)
    directory = tmp_path_factory.mktemp("models") / name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=f"{name}.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=f"{name}.gguf", dtype=torch.float32)
    if hasattr(model.config, "quantization_config"):  # it is dequantized
        del model.config.quantization_config
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Theirs(name, folder / f"{name}.gguf", directory, plain.eval(), tokenizer)
