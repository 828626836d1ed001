"""Tiny models with random parameters, and a tokenizer of bytes."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import ModelConfig
from gptjax.model.gpt import GPT

TINY = {
    "num_layers": 2,
    "model_dim": 16,
    "num_heads": 4,
    "ffn_dim": 24,
    "vocab_size": 257,
    "context_length": 64,
    "attention_window": 5,
    "tie_embeddings": False,  # a random tied head repeats its input, which any cache would get right
    "compute_dtype": "float32",
}


@pytest.fixture(scope="session")
def make_model():
    """`make_model(**switches) -> (config, params)`; all parameters are random, biases and norms, too."""

    def make(**switches):
        config = ModelConfig(**TINY | switches)
        shapes = jax.eval_shape(lambda: GPT(config).init(jax.random.key(0), jnp.zeros((2, 8), jnp.int32))["params"])
        rng = np.random.default_rng(0)

        def fill(path, leaf):
            value = 0.4 * rng.standard_normal(leaf.shape, np.float32)
            return jnp.asarray(value + 1 if path[-1].key == "scale" else value)

        return config, jax.tree_util.tree_map_with_path(fill, shapes)

    return make


@pytest.fixture(scope="session")
def model(make_model):
    return make_model()


class ByteTokenizer:
    vocab_size = 257
    end_of_text_id = 256
    stop_ids = (256,)
    opening = ()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self) -> list[bytes]:
        return [*(bytes([i]) for i in range(256)), b""]

    def require_lossless(self, text: str, ids: Sequence[int]) -> None:
        assert bytes(ids) == text.encode()


@pytest.fixture(scope="session")
def tokenizer():
    return ByteTokenizer()
