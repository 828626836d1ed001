"""Hugging Face directories read and written without any program of theirs; and what is refused of them."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gptjax.config import ModelConfig, TokenizerConfig
from gptjax.errors import UserError
from gptjax.interop import huggingface, tensor_files
from gptjax.interop.families import FAMILIES
from gptjax.interop.transfer import export_run, find_source, import_model
from gptjax.model.gpt import GPT
from gptjax.text.tokenizer_training import train_tokenizer
from gptjax.training.load import load_run
from gptjax.training.state import init_params

ROOT = Path(__file__).parents[2]
SHAPE = {"num_layers": 3, "model_dim": 24, "num_heads": 4, "context_length": 32, "ffn_dim": 40, "vocab_size": 301}
MODERN = {**SHAPE, "norm": "rmsnorm", "positions": "rope", "feed_forward": "swiglu", "bias": False, "head_dim": 8}
GEMMA = {
    **MODERN,
    "feed_forward": "geglu",
    "norm_position": "both",
    "norm_zero_centered": True,
    "scale_embedding": True,
    "query_scale_dim": 20.0,
    "attention_pattern": ("local", "dense"),
    "attention_window": 6,
    "attention_softcap": 50.0,
}
LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_length": 16, "tie_embeddings": False}
YARN = {"rope_scaling": "yarn", "rope_factor": 8.0, "rope_original_length": 16, "rope_truncate": False}
LONGROPE = {"rope_scaling": "longrope", "rope_original_length": 16, "rope_factor": 2.0}
LONGROPE |= {"rope_short_factors": (1.0, 1.5, 2.0, 2.5), "rope_long_factors": (1.0, 2.0, 3.0, 4.0)}
MODELS = {
    "gpt2": SHAPE,
    "llama": {**MODERN, **LLAMA3, "num_kv_heads": 1, "bias": True, "ffn_bias": False},
    "mistral": {**MODERN, **YARN, "attention_pattern": ("local",), "attention_window": 5, "rope_scale_local": True},
    "qwen2": {**MODERN, "qkv_bias": True, "head_dim": None},
    "qwen3": {**MODERN, **LONGROPE, "qk_norm": True},
    "apertus": {**MODERN, "feed_forward": "relu2", "qk_norm": True, "num_kv_heads": 2},
    "gpt_neox": {
        **SHAPE,
        "positions": "rope",
        "rope_fraction": 1 / 3,
        "parallel_residual": True,
        "feed_forward": "gelu",
        "tie_embeddings": False,
    },
    "gemma2": GEMMA,
    "gemma3_text": {
        **GEMMA,
        "qk_norm": True,
        "attention_softcap": 0.0,
        "rope_base": 1e6,
        "rope_local_base": 1e4,
        "rope_scaling": "linear",
        "rope_factor": 8.0,
    },
}


def test_every_family_has_a_model():
    assert set(MODELS) == set(FAMILIES)


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_comes_back(kind, tmp_path):
    """Written and read again it is the same, bit by bit, in one file or in several."""
    config = ModelConfig(**MODELS[kind])
    params = drawn(config)
    family = huggingface.write_model(tmp_path, config, params, shard_bytes=20_000)
    assert family.model_type == kind
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    again = huggingface.read_config(tmp_path)
    for field in dataclasses.fields(ModelConfig):
        resolved = f"resolved_{field.name}" if hasattr(config, f"resolved_{field.name}") else field.name
        # Without such layers these two are for nothing, and not written.
        if field.name not in ("attention_window", "rope_scale_local") or "local" in config.attention_pattern:
            assert getattr(again, resolved) == pytest.approx(getattr(config, resolved)), field.name
    jax.tree.map(np.testing.assert_array_equal, rows_of(huggingface.read_params(tmp_path, again)), rows_of(params))


def drawn(config):
    """Every parameter drawn, norms and biases too."""
    params = init_params(GPT(config), jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([x + jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)])


def rows_of(params):
    """Without the padding of the vocabulary, which no other program has."""
    tables = {name: params[name][: SHAPE["vocab_size"]] for name in ("embedding", "head") if name in params}
    return jax.device_get(params | tables)


@pytest.fixture
def directory(tmp_path) -> Path:
    """A model with its tokenizer, whose two files of weights have an index."""
    tokenizer = train_tokenizer([], TokenizerConfig(kind="byte"))
    config = ModelConfig(**MODERN | {"vocab_size": tokenizer.vocab_size})
    (tmp_path / "hf").mkdir()
    huggingface.write_model(tmp_path / "hf", config, drawn(config))
    tokenizer.save(tmp_path / "hf" / "tokenizer.json")
    return tmp_path / "hf"


def change(directory: Path, **tensors):
    """Write tensors anew; None takes one out."""
    path = directory / tensor_files.SINGLE
    kept = load_file(path) | {name.replace("__", "."): value for name, value in tensors.items()}
    save_file({name: value for name, value in kept.items() if value is not None}, path)


def set_field(directory: Path, name: str, value) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))


def index(directory: Path, files: dict) -> None:
    (directory / tensor_files.INDEX).write_text(json.dumps({"weight_map": files}))


def cut(directory: Path) -> None:
    path = directory / tensor_files.SINGLE
    path.write_bytes(path.read_bytes()[:-100])


def craft(directory: Path) -> None:
    """A header that is said to be longer than the file."""
    (directory / tensor_files.SINGLE).write_bytes((2**62).to_bytes(8, "little") + b"{}")


def pickle(directory: Path) -> None:
    (directory / tensor_files.SINGLE).rename(directory / "pytorch_model.bin")


BAD = {
    "missing": (lambda d: change(d, model__norm__weight=None), "lacks the tensor model.norm.weight"),
    "extra": (
        lambda d: change(d, model__more=np.zeros(3, np.float32)),
        "has the tensor model.more, for which the llama",
    ),
    "shape": (
        lambda d: change(d, model__norm__weight=np.zeros(3, np.float32)),
        "model.norm.weight has the shape [3], but config.json asks for [24]",
    ),
    "type": (lambda d: change(d, model__norm__weight=np.zeros(24, np.int32)), "model.norm.weight is of type I32"),
    "cut": (cut, "is no file of safetensors, or not a whole one"),
    "crafted": (craft, "is no file of safetensors, or not a whole one"),
    "pickle": (pickle, "has its weights in pytorch_model.bin, a pickle"),
    "outside": (
        lambda d: index(d, {"model.norm.weight": "../x.safetensors"}),
        "'../x.safetensors', outside of the directory",
    ),
    "absolute": (lambda d: index(d, {"model.norm.weight": "/etc/passwd"}), "'/etc/passwd', outside of the directory"),
    "gone": (
        lambda d: index(d, {"model.norm.weight": "model-1.safetensors"}),
        "names model-1.safetensors, which is not there",
    ),
    "no index": (lambda d: index(d, []), "is no index of safetensors"),
    "another index": (lambda d: index(d, {"model.norm.weight": tensor_files.SINGLE}), "does not fit its files"),
    "fewer rows": (lambda d: set_field(d, "vocab_size", 200), "has 272 ids, but the model has rows for 200 only"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "holds no tokenizer.json"),
}


@pytest.mark.parametrize("how", BAD)
def test_a_bad_directory_is_refused(how, directory, tmp_path):
    """In one line, and no run is made of it."""
    spoil, said = BAD[how]
    spoil(directory)
    with pytest.raises(UserError) as error:
        import_model(directory, tmp_path / "run", print)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_rows_without_tokens_and_odd_special_ids_are_noted(directory, tmp_path):
    """Usual in what is published: a vocabulary rounded up, and a configuration with another model's ids."""
    config = huggingface.read_config(directory)
    more = dataclasses.replace(config, vocab_size=config.vocab_size + 7)
    huggingface.write_model(directory, more, drawn(more), generation={"eos_token_id": 50256})
    said = []
    import_model(directory, tmp_path / "run", said.append)
    assert said[0] == "7 rows of the model stand for no token, as is usual"
    assert "eos_token_id 50256 of config.json is outside the vocabulary and is not used" in said
    run = load_run(tmp_path / "run")
    assert run.config.model.vocab_size == run.tokenizer.vocab_size == 279
    assert run.tokenizer.decode([278, *run.tokenizer.encode("a")]) == "a"


def test_a_run_is_exported_whole(directory, tmp_path):
    """Weights in any type, the tokenizer, a card; into an empty folder alone."""
    import_model(directory, tmp_path / "run", print)
    run = load_run(tmp_path / "run")
    assert export_run(run, tmp_path / "out", dtype="bfloat16", licence="mit") == "llama"
    infos = tensor_files.TensorFiles(tmp_path / "out").infos
    assert {info.dtype for info in infos.values()} == {"BF16"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    assert f"| made from | {directory.absolute()} |" in card
    values = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert values["eos_token"] == "<|endoftext|>"
    with pytest.raises(UserError, match="not an empty folder; nothing was written"):
        export_run(run, tmp_path / "out")
    with pytest.raises(UserError, match="int3 is no type of weights"):
        export_run(run, tmp_path / "other", dtype="int3")
    assert not (tmp_path / "other").exists()


def test_a_source_that_is_nowhere(tmp_path):
    with pytest.raises(UserError, match="is no directory, no GGUF file and no model of the Hugging Face hub"):
        find_source(str(tmp_path / "a" / "b"), print)
