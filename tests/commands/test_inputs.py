"""Every command and everything that it may be given: it works, or refuses it in one line that says what to do."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from gguf_files import write_gguf

import sample
import train
from gptjax.__main__ import COMMANDS
from gptjax.__main__ import main as gptjax_main
from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.interop import huggingface
from gptjax.model.gpt import GPT
from gptjax.text.chat import CHATML
from gptjax.text.tokenizer import Tokenizer
from gptjax.training.state import draw_params

ROOT = Path(__file__).parents[2]
TALKS = [{"prompt": f"Say {n}.", "completion": str(n)} for n in range(40)]


@pytest.fixture(scope="module")
def place(run, tmp_path_factory):
    """A folder with one of each: a run, a model from elsewhere as a Hugging Face directory, as a GGUF file and as the
    run that it is imported as, and text."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(run, folder / "run")
    (folder / "hf").mkdir()
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    config = ModelConfig(
        num_layers=1,
        model_dim=16,
        num_heads=2,
        context_length=64,
        vocab_size=tokenizer.vocab_size,
        norm="rmsnorm",
        positions="rope",
        bias=False,
        feed_forward="swiglu",
    )
    huggingface.write_model(folder / "hf", config, draw_params(GPT(config), 0), generation={"eos_token_id": 0})
    tokenizer.save(folder / "hf" / "tokenizer.json")
    (folder / "hf" / "chat_template.jinja").write_text(CHATML)
    write_gguf(folder / "hf", folder / "model.gguf", "llama")
    (folder / "text.txt").write_text("The cat sat on the mat.\n" * 200)
    (folder / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in TALKS))
    return folder


SMALL = "--model.num-layers 1 --model.model-dim 16 --model.num-heads 2 --model.context-length 16".split()
SFT = [str(ROOT / "configs" / "sft.py"), "--data.path", "talks.jsonl", "--dry-run", "--model.init-from"]
Main = Callable[[Sequence[str]], int]
CALLS: dict[str, tuple[Main, list[str]]] = {
    "sample": (sample.main, "X --prompt a --max-tokens 2".split()),
    "talk": (sample.main, "X --message a --max-tokens 2".split()),
    "train": (train.main, ["X"]),
    "tune": (train.main, [*SFT, "X"]),
    "learn from": (train.main, ["--data.path", "X", *SMALL, "--dry-run"]),
    "prepare": (gptjax_main, "prepare X --tokenizer.kind byte --out OUT".split()),
    "prepare by": (gptjax_main, "prepare text.txt --tokenizer.path X --out OUT".split()),
    "tokenizer train": (gptjax_main, "tokenizer train X --tokenizer.kind byte --out OUT".split()),
    "tokenizer show": (gptjax_main, "tokenizer show X --text a".split()),
    "evaluate": (gptjax_main, ["evaluate", "X"]),
    "evaluate text": (gptjax_main, "evaluate X --data text.txt".split()),
    "evaluate prepared": (gptjax_main, "evaluate X --data prepared".split()),
    "attention": (gptjax_main, "attention X --text a --out OUT.png".split()),
    "plan": (gptjax_main, ["plan", "X"]),
    "study": (gptjax_main, ["study", "X"]),
    "fit": (gptjax_main, ["fit", "X"]),
    "coordinates": (gptjax_main, ["coordinates", "X"]),
    "recipe": (gptjax_main, ["recipe", "X"]),
    "report": (gptjax_main, "report X --out OUT".split()),
    "import": (gptjax_main, "import X OUT".split()),
    "export": (gptjax_main, "export X OUT".split()),
    "verify": (gptjax_main, ["verify", "X"]),
}
"""X is what is given, OUT a name that is free."""
MODEL = {"sample", "evaluate text", "attention", "export", "tokenizer show", "prepare by", "tune"}
FOREIGN = MODEL | {"talk", "import", "evaluate prepared"}
WORKS = {
    "run": MODEL | {"train", "evaluate", "evaluate prepared", "plan", "report", "verify"},
    "imported": FOREIGN - {"import"} | {"plan", "report", "verify"},
    "hf": FOREIGN,
    "model.gguf": FOREIGN - {"evaluate prepared"},
    "prepared": {"learn from", "prepare", "prepare by", "tokenizer show"},
    "text.txt": {"learn from", "prepare", "tokenizer train"},
}
"""What each is good for; all else is refused."""
SAID = {
    ("run", "talk"): "has not learned to talk",
    ("run", "import"): "a run is used as it is",
    ("run", "prepare"): "is a model or a run",
    ("imported", "train"): "start a run from it with --model.init-from",
    ("imported", "evaluate"): "give one as --data",
    **{
        (given, name): f"python -m gptjax import {given} RUN makes a run of it"
        for given in ("hf", "model.gguf")
        for name in ("train", "plan", "verify", "report")
    },
    ("model.gguf", "prepare"): "is a model or a run",
    ("model.gguf", "evaluate prepared"): "was made with another tokenizer than model.gguf",
    ("hf", "evaluate"): "give one as --data",
    ("hf", "learn from"): "is a model or a run",
    ("prepared", "sample"): "is not a run",
    ("text.txt", "sample"): "is not a run, but a file",
}
"""Some of the refusals."""


def call(name: str, given: str, out: str) -> str | None:
    """The line with which a command refuses what it is given; None: it works."""
    main, words = CALLS[name]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert main([{"X": given}.get(word, word.replace("OUT", out)) for word in words]) == 0
    except UserError as error:
        return str(error)
    return None


def test_every_command_takes_its_inputs_or_refuses_them(place, monkeypatch):
    monkeypatch.chdir(place)
    assert call("import", "hf", "imported") is None
    assert gptjax_main("prepare text.txt --tokenizer.path hf --out prepared".split()) == 0
    found = {
        (given, name): call(name, given, f"out-{number}-{given}")
        for given in WORKS
        for number, name in enumerate(CALLS)
    }
    assert not any("\n" in line for line in found.values() if line)
    works = {given: {name for name in CALLS if found[given, name] is None} for given in WORKS}
    assert works == WORKS
    for key, words in SAID.items():
        assert words in found[key], key
    assert {words[0] for main, words in CALLS.values() if main is gptjax_main} == set(COMMANDS) - {"env"}
