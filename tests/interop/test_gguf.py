"""GGUF files: the model that was written is the one that is read, and what is no such file is told in one line."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from gguf_files import side_by_side, write_gguf
from hypothesis import given
from hypothesis import strategies as st

from gptjax.config import ModelConfig, TokenizerConfig
from gptjax.errors import UserError
from gptjax.interop import huggingface
from gptjax.interop.configs import to_theirs
from gptjax.interop.gguf import MODEL_TYPES, GgufFile, halves, is_gguf
from gptjax.interop.places import template_of
from gptjax.interop.tensor_files import TensorFiles
from gptjax.model.gpt import GPT
from gptjax.text.chat import CHATML
from gptjax.text.files import load_tokenizer
from gptjax.text.tokenizer import Tokenizer
from gptjax.text.tokenizer_training import train_tokenizer
from gptjax.training.load import load_run
from gptjax.training.state import draw_params

TOKENIZER = train_tokenizer(["the cat sat on the mat " * 60], TokenizerConfig(vocab_size=290))
MODERN = {"norm": "rmsnorm", "positions": "rope", "bias": False, "norm_epsilon": 1e-6, "initializer_std": 0.2}
SHAPE = {
    "num_layers": 2,
    "model_dim": 64,
    "num_heads": 4,
    "num_kv_heads": 2,
    "ffn_dim": 96,
    "context_length": 64,
    "head_dim": 32,
    "vocab_size": TOKENIZER.vocab_size,
    "compute_dtype": "float32",
}
GEMMA = MODERN | {
    "norm_position": "both",
    "norm_zero_centered": True,
    "scale_embedding": True,
    "feed_forward": "geglu",
    "num_layers": 7,
    "attention_window": 8,
}
SWIGLU = MODERN | {"feed_forward": "swiglu"}
MODELS = {
    "llama": SWIGLU | {"rope_base": 500.0},
    "qwen2": SWIGLU | {"qkv_bias": True, "tie_embeddings": False, "head_dim": 16},
    "qwen3": SWIGLU | {"qk_norm": True},
    "gemma2": GEMMA
    | {"attention_pattern": ("local", "dense"), "attention_softcap": 20.0, "logit_softcap": 10.0, "num_layers": 2},
    "gemma3": GEMMA
    | {"qk_norm": True, "attention_pattern": ("local",) * 5 + ("dense",), "rope_base": 1e6, "rope_local_base": 1e4},
}


@pytest.fixture
def made(tmp_path):
    """Writes a Hugging Face directory and a GGUF file of the same model, and returns both."""

    def make(architecture: str, **more) -> tuple[Path, Path]:
        directory, path = tmp_path / "hf", tmp_path / "model.gguf"
        directory.mkdir()
        config = ModelConfig(**SHAPE | MODELS[architecture])
        assert to_theirs(config)[0].model_type == MODEL_TYPES[architecture]
        huggingface.write_model(directory, config, draw_params(GPT(config), 0))
        TOKENIZER.save(directory / "tokenizer.json")
        write_gguf(directory, path, architecture, **more)
        return directory, path

    return make


@given(heads=st.integers(1, 5), half=st.integers(1, 5), data=st.data())
def test_pairs_come_back(heads, half, data):
    """Whatever the heads: the order that a converter makes is undone."""
    rows = np.arange(heads * 2 * half * 3).reshape(-1, data.draw(st.sampled_from([1, 3])))
    rows = rows[: heads * 2 * half]
    np.testing.assert_array_equal(halves(side_by_side(rows, heads), heads), rows)


@pytest.mark.parametrize("architecture", MODELS)
def test_a_model_is_the_one_that_was_written(architecture, made):
    """Its configuration, every weight, its tokens, and what they are for."""
    directory, path = made(architecture)
    theirs, ours = load_run(directory), load_run(path, log=print)
    assert dataclasses.replace(ours.config.model, initializer_std=0.2) == theirs.config.model
    jax.tree.map(np.testing.assert_allclose, ours.params, theirs.params)
    text = "the cat 中文 sat\n\n  on 1234"
    assert ours.tokenizer.encode(text) == TOKENIZER.encode(text)
    ours.tokenizer.require_lossless(text, ours.tokenizer.encode(text))
    assert ours.tokenizer.special_token_ids == TOKENIZER.special_token_ids
    assert (ours.tokenizer.opening, ours.tokenizer.stop_ids) == ((1,), (0, 2))
    assert template_of(path)[0] == CHATML


def test_quantized_weights_are_those_of_the_package(made):
    directory, path = made("llama", quantized=True)
    file, exact = GgufFile(path), TensorFiles(directory)
    for name in file.infos:
        found, expected = file.open(name), np.asarray(exact.open(name))
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, atol=np.abs(expected).max() / 120)
    assert not np.array_equal(file.open("model.embed_tokens.weight"), exact.open("model.embed_tokens.weight"))


@pytest.mark.parametrize(("said", "opening"), [(False, ()), (True, (1,)), (None, (1,))])
def test_a_text_begins_as_the_file_says(made, said, opening):
    """And where it says nothing, as llama.cpp takes it: Llama 3's tokenizer adds BOS."""
    _, path = made("llama", tokenizer__ggml__add_bos_token=said)
    assert load_tokenizer(path).opening == opening


@pytest.mark.parametrize("prefixed", [True, False])
def test_sentencepiece(made, prefixed):
    """Scores decide which pieces are joined; bytes stand for what has no token; text comes back."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "t", "h", "e", "▁t", "he", "▁the", "th", "\n"]
    pieces += [f"<{i}>" for i in range(TOKENIZER.vocab_size - len(pieces))]
    scores = [0.0] * 259 + [-20.0, -21.0, -22.0, -23.0, -1.0, -3.0, -4.0, -2.0, -24.0]
    scores += [-1000.0] * (len(pieces) - len(scores))
    changes = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(pieces) - 259)],
        "tokenizer.ggml.add_space_prefix": prefixed,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": None,
    }
    _, path = made("llama", **changes)
    tokenizer = load_tokenizer(path)
    assert [pieces[i] for i in tokenizer.encode("the the")] == (["▁the"] * 2 if prefixed else ["th", "e", "▁the"])
    for text in ("the é中\n the", "", "  the"):
        ids = tokenizer.encode(text)
        tokenizer.require_lossless(text, ids)
        assert tokenizer.decode(ids) == text
    assert (tokenizer.opening, tokenizer.end_of_text_id) == ((1,), 2)


BAD = {
    "architecture": ({"general.architecture": "mamba"}, "has the architecture 'mamba', which is none of"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_count = 8, which gptjax does not know"),
    "too many layers": ({"llama.block_count": 2**31}, "too few for 2147483648 layers"),
    "no width": ({"llama.embedding_length": None}, "lacks llama.embedding_length"),
    "part of heads": ({"llama.rope.dimension_count": 8}, "rotates 8 of 32 dimensions"),
    "scaling": ({"llama.rope.scaling.type": "dynamic"}, "scales rotary positions by 'dynamic'"),
    "window": ({"llama.attention.sliding_window": 8}, "has a window in its llama layers"),
    "words": ({"tokenizer.ggml.pre": "tekken"}, "splits words as 'tekken'"),
    "kind": ({"tokenizer.ggml.model": "rwkv"}, "a tokenizer of kind 'rwkv'"),
    "one of several": ({"split.count": 3}, "is one of 3 files of a model"),
}


@pytest.mark.parametrize("how", BAD)
def test_what_is_not_known_is_refused(how, made):
    changes, said = BAD[how]
    with pytest.raises(UserError, match=said) as error:
        load_run(made("llama", **changes)[1], log=print)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kept", [0, 3, 5, 100, 20_000, -1])
def test_a_part_of_a_file_is_none(made, kept):
    _, path = made("llama")
    path.write_bytes(path.read_bytes()[:kept])
    assert is_gguf(path)
    with pytest.raises(UserError, match=r"model.gguf (is|lacks)") as error:
        load_run(path, log=print)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html>", "does not begin as one"),
        (b"GGUF" + (1).to_bytes(4, "little"), "of version 1"),
        (b"GGUF" + (3).to_bytes(4, "big"), "of a big-endian machine"),
    ],
)
def test_other_files(tmp_path, content, said):
    path = tmp_path / "model.gguf"
    path.write_bytes(content + bytes(64))
    with pytest.raises(UserError, match=said):
        load_run(path)


def test_a_run_of_a_file(made, tmp_path, monkeypatch):
    """Imported and exported it is the same model, with the same tokens, roles and template."""
    from gptjax.interop.transfer import export_run, import_model

    _, path = made("qwen3")
    import_model(path, tmp_path / "run", print)
    export_run(load_run(tmp_path / "run"), tmp_path / "out")
    first, last = load_run(path, log=print), load_run(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, first.params, last.params)
    assert Tokenizer.load(tmp_path / "out" / "tokenizer.json").texts() == first.tokenizer.texts()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHATML
