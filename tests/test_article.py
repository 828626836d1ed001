"""The article's listing, rebuilt, against the properties that a language model must have; and docs/article*.md.

The listing is a stack of blocks `x + attention(x)`, then a feed-forward layer of that, to which the attention's output
is added once more; between an embedding and a linear head, without mask, positions or norms. Its attention expects
the sequence in the first dimension, and its model hands it the batch there.
"""

import dataclasses
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import cli, presets
from gptjax.__main__ import COMMANDS
from gptjax.commands import attention, evaluate
from gptjax.model.gpt import GPT

ROOT = Path(__file__).parent.parent
B, T, D, N, F, V, LAYERS = 2, 6, 32, 4, 64, 24, 2
TOKENS = np.arange(B * T).reshape(B, T)  # all different, so that each has a row of the embedding to itself


class Model(NamedTuple):
    """Logits (B, T, V) of tokens (B, T), and parameters with an `embedding`, which is not the head."""

    logits: Callable[[Any, jax.Array], jax.Array]
    params: Any
    silent: Any
    """The parameters with every sublayer's output projection at zero."""


def listing(*, sequence_first: bool) -> Model:
    """The article's model; `sequence_first` hands its attention the data as it expects them."""
    draw = np.random.default_rng(0)

    def weights(*shape):
        return jnp.asarray(draw.normal(size=shape) / np.sqrt(shape[0]), jnp.float32)

    blocks = [
        {"qkv": weights(D, 3 * D), "out": weights(D, D), "up": weights(D, F), "down": weights(F, D)}
        for _ in range(LAYERS)
    ]
    params = {"embedding": weights(V, D), "blocks": blocks, "head": weights(D, V)}

    def attend(block, x_SXD):
        """Attention over the first dimension, whatever it is."""
        q, k, v = jnp.split(x_SXD @ block["qkv"], 3, axis=-1)
        heads = [x.reshape(*x.shape[:2], N, D // N) for x in (q, k, v)]
        weights_XNST = jax.nn.softmax(jnp.einsum("sxnh,txnh->xnst", *heads[:2]) / np.sqrt(D // N))
        return jnp.einsum("xnst,txnh->sxnh", weights_XNST, heads[2]).reshape(x_SXD.shape) @ block["out"]

    def logits(params, tokens):
        x = params["embedding"][tokens]
        x = x.swapaxes(0, 1) if sequence_first else x
        for block in params["blocks"]:
            attended = attend(block, x)
            x = x + attended
            x = jax.nn.relu(x @ block["up"]) @ block["down"]
            x = x + attended
        x = x.swapaxes(0, 1) if sequence_first else x
        return x @ params["head"]

    silent = params | {"blocks": [b | {name: 0 * b[name] for name in ("out", "down")} for b in blocks]}
    return Model(logits, params, silent)


def article_gpt35() -> Model:
    """The preset, smaller."""
    config = dataclasses.replace(
        presets.article_gpt35().model, num_layers=LAYERS, model_dim=D, num_heads=N, ffn_dim=F, context_length=T
    )
    config = dataclasses.replace(config, vocab_size=V, compute_dtype="float32", initializer_std=0.2)
    params = jax.jit(GPT(config).init)(jax.random.key(0), TOKENS)["params"]
    blocks = dict(params["blocks"])
    for sublayer, name in (("attention", "out"), ("feed_forward", "down")):
        zero = jax.tree.map(jnp.zeros_like, blocks[sublayer][name])
        blocks[sublayer] = blocks[sublayer] | {name: zero}
    return Model(lambda p, tokens: GPT(config).apply({"params": p}, tokens)[0], params, params | {"blocks": blocks})


def influence(model: Model) -> np.ndarray:
    """(T, B, T): whether the logits after token t of the first row depend on each token, by their gradient."""

    def one(t):
        gradient_VD = jax.grad(lambda e: (model.logits(model.params | {"embedding": e}, TOKENS)[0, t] ** 2).sum())(
            model.params["embedding"]
        )
        return np.asarray(jnp.abs(gradient_VD).sum(-1))[TOKENS] > 1e-7

    return np.stack([one(t) for t in range(T)])


def sees_what_came_before(model: Model) -> bool:
    return bool(influence(model)[:, 0][np.tri(T, dtype=bool)].all())


def is_causal(model: Model) -> bool:
    return not influence(model)[:, 0][~np.tri(T, dtype=bool)].any()


def is_alone_in_its_batch(model: Model) -> bool:
    return not influence(model)[:, 1].any()


def knows_the_order(model: Model) -> bool:
    other = TOKENS[:, [2, 0, 1, 3, 4, 5]]
    last, swapped = (model.logits(model.params, tokens)[:, -1] for tokens in (TOKENS, other))
    return not np.allclose(last, swapped, atol=1e-4)


def has_a_residual_path(model: Model) -> bool:
    """With silent sublayers the token still reaches the head: its logits differ from other tokens'."""
    logits = np.asarray(model.logits(model.silent, TOKENS))
    return not np.allclose(logits[0, 0], logits[0, 1], atol=1e-4)


PROPERTIES = (sees_what_came_before, is_causal, knows_the_order, has_a_residual_path, is_alone_in_its_batch)
EXPECTED = {
    "as written": (False, True, False, False, False),
    "sequence first": (True, False, False, False, True),
    "article_gpt35": (True, True, True, True, True),
}
MODELS = {
    "as written": listing(sequence_first=False),
    "sequence first": listing(sequence_first=True),
    "article_gpt35": article_gpt35(),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_which_properties_hold(name):
    """As written the listing attends over the batch, so it is causal only because it sees nothing of the text at all;
    with the data turned it sees the future. Our model has every property."""
    assert tuple(holds(MODELS[name]) for holds in PROPERTIES) == EXPECTED[name]


def test_the_listing_has_no_way_but_through_matrices():
    """With its feed-forward layers silent the text still reaches the head, by the output of attention that is added
    once more; with attention silent as well, nothing does. The row of the faults says both."""
    model = MODELS["sequence first"]
    without_ffn = model.params | {"blocks": [block | {"down": 0 * block["down"]} for block in model.params["blocks"]]}
    assert influence(model._replace(params=without_ffn))[:, 0].all()
    assert not influence(model._replace(params=model.silent)).any()
    for name in DOCS:
        (row,) = (line for line in DOCS[name].splitlines() if "`Block`" in line and "ReLU" in line)
        assert ("values and output" if name == "article.md" else "值矩阵和输出矩阵") in row


DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("article*.md"))}


@pytest.mark.parametrize("name", DOCS)
def test_the_table_in_the_text_is_the_table_of_the_tests(name):
    rows = re.findall(r"^\| `(\w+)` \|.*?\| ([✓✗]) \| ([✓✗]) \| ([✓✗]) \|$", DOCS[name], re.MULTILINE)
    assert [row[0] for row in rows] == [holds.__name__ for holds in PROPERTIES]
    for column, model in enumerate(EXPECTED, start=1):
        assert tuple(row[column] == "✓" for row in rows) == EXPECTED[model]


@pytest.mark.parametrize("name", DOCS)
def test_links_lead_somewhere(name):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", DOCS[name])
    assert len(targets) > 15
    missing = [target for target in targets if not (ROOT / "docs" / target).exists()]
    assert missing == []


@pytest.mark.parametrize("name", DOCS)
def test_named_code_exists(name):
    """`file.py: name` in the text is a name that the file defines."""
    for file, symbol in re.findall(r"\[`[\w/]+\.py`\]\(\.\./([\w/]+\.py)\): `(\w+)`", DOCS[name]):
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^\s*(def|class) {symbol}\b|^\s*{symbol}\b.*[:=]", source, re.MULTILINE), (file, symbol)


@pytest.mark.parametrize("name", DOCS)
def test_commands_parse(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = [block.replace("\\\n", "") for block in re.findall(r"```sh\n(.*?)```", DOCS[name], re.DOTALL)]
    lines = [line for block in blocks for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]
    assert len(commands) >= 5
    for _, *words in commands:
        if words[0] == "train.py":
            config, *_ = cli.parse_train(words[1:], ROOT / "configs" / "quickstart.py")
            assert config.optimizer.warmup_steps < config.training.steps
        elif words[0] == "sample.py":
            cli.parse_sample(words[1:])
        else:
            assert words[:2] == ["-m", "gptjax"]
            assert words[2] in COMMANDS
            parsers = {"attention": attention.parse, "evaluate": evaluate.parse}
            if words[2] in parsers:
                parsers[words[2]](words[3:])


def test_the_two_languages_say_the_same():
    """The same sections, code, formulas and links, in the same order."""
    english, chinese = DOCS["article.md"], DOCS["article.zh.md"]
    for pattern in (r"^(#+ [\d.]*)", r"(```\w*\n.*?```)", r"(\$\$.*?\$\$)", r"\]\(([^)#]+)\)"):
        flags = re.MULTILINE if pattern.startswith("^") else re.DOTALL
        found = [[*re.findall(pattern, text, flags)] for text in (english, chinese)]
        found = [[link for link in links if "article" not in link] for links in found]
        assert found[0] == found[1], pattern
