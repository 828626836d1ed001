"""Word vectors as the beginning of token embeddings: three forms of files, and any width."""

import dataclasses
import io

import numpy as np
import pytest

from gptjax.config import TokenizerConfig
from gptjax.config_files import load_config
from gptjax.errors import UserError
from gptjax.interop.word_vectors import embed_words, read_vectors
from gptjax.stages.train import train
from gptjax.text.tokenizer_training import train_tokenizer
from gptjax.training.load import load_run
from gptjax.training.metrics import Console

WORDS = ["the", "cat", "dog", "xyzzy", "sat", "New York"]
VECTORS = np.random.default_rng(0).normal(size=(len(WORDS), 7)).astype(np.float32)


def write(form, path):
    header = f"{len(WORDS)} {VECTORS.shape[1]}\n".encode()
    if form == "binary":
        body = b"".join(
            w.replace(" ", "_").encode() + b" " + v.tobytes() + b"\n" for w, v in zip(WORDS, VECTORS, strict=True)
        )
    else:
        lines = (
            f"{word} {' '.join(repr(float(x)) for x in vector)}\n" for word, vector in zip(WORDS, VECTORS, strict=True)
        )
        body = "".join(lines).encode()
    path.write_bytes(body if form == "glove" else header + body)
    return path


@pytest.mark.parametrize("form", ["glove", "text", "binary"])
def test_all_forms_are_read(form, tmp_path):
    """Only what is wanted; a word may hold a space."""
    wanted = ["cat", "sat", "New_York" if form == "binary" else "New York", "absent"]
    found = read_vectors(write(form, tmp_path / "v"), wanted)
    assert found.words == ["cat", "sat", wanted[2]]
    np.testing.assert_array_equal(found.vectors_NW, VECTORS[[1, 4, 5]])
    assert found.num_words == len(WORDS)


@pytest.mark.parametrize("width", [7, 16, 3])
def test_rows_are_the_words_vectors(width, tmp_path):
    """At any width the rows' angles are those of the vectors, as far as the width holds them, and their deviation is
    that of the drawn rows, which all other tokens keep."""
    tokenizer = train_tokenizer(["the cat the dog The sat " * 40], TokenizerConfig(vocab_size=300))
    drawn = 0.02 * np.random.default_rng(1).normal(size=(tokenizer.vocab_size, width)).astype(np.float32)
    said = []
    made = embed_words(write("glove", tmp_path / "v"), tokenizer, drawn, said.append)
    texts = [raw.decode(errors="replace").strip() for raw in tokenizer.token_bytes()]
    rows = [i for i, text in enumerate(texts) if text.lower() in ("the", "cat", "dog", "sat")]
    assert len(rows) >= 4
    assert f"{len(rows)} of {len(texts)} tokens" in said[0]
    others = np.setdiff1d(np.arange(len(texts)), rows)
    np.testing.assert_array_equal(made[others], drawn[others])
    np.testing.assert_allclose(made[rows].std(), drawn.std(), rtol=1e-4)
    vectors = VECTORS[[WORDS.index(texts[i].lower()) for i in rows]]
    vectors = vectors - vectors.mean(axis=0)
    if width >= 7:
        scale = made[rows].std() * np.sqrt(width) / (vectors.std() * np.sqrt(7))
        np.testing.assert_allclose(made[rows] @ made[rows].T, scale**2 * vectors @ vectors.T, rtol=1e-3, atol=1e-5)
    else:
        assert np.linalg.matrix_rank(made[rows] - made[rows].mean(axis=0), tol=1e-5) == 3


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"hello\n", "has no word vectors"),
        (b"the 1 2 3\ncat 1 2\n", "has 2 numbers in line 2 of its words, and 3 in its first"),
        (b"the 1 2 x\n", "that are no numbers"),
        (b"the 1 2 nan\n", "that are no numbers"),
        (b"2 3\nthe " + np.ones(3, "<f4").tobytes(), "ends within a word"),
    ],
)
def test_other_files_are_refused(raw, said, tmp_path):
    (tmp_path / "v").write_bytes(raw)
    with pytest.raises(UserError, match=said):
        read_vectors(tmp_path / "v", ["the", "cat"])


def test_a_run_begins_with_them(inside, tmp_path):
    """The first checkpoint of a run that has learned nothing yet has the vectors."""
    path = write("text", tmp_path / "vectors.txt")
    config = load_config("tiny.py")
    training = dataclasses.replace(config.training, steps=1, eval_every_steps=0)
    optimizer = dataclasses.replace(config.optimizer, peak_learning_rate=0.0)
    model = dataclasses.replace(config.model, init_embeddings=str(path), residual_dropout=0.0)
    config = dataclasses.replace(
        config, model=model, training=training, optimizer=optimizer, run_dir=str(tmp_path / "run")
    )
    output = io.StringIO()
    train(config, console=Console(output))
    run = load_run(tmp_path / "run")
    assert f"begin as vectors of {path}, of width 7 made 32" in output.getvalue()
    texts = [raw.decode(errors="replace").strip() for raw in run.tokenizer.token_bytes()]
    rows = np.asarray(run.params["embedding"])
    same = [i for i, text in enumerate(texts) if text == "the"]
    assert len(same) >= 1
    assert all(np.allclose(rows[i], rows[same[0]]) for i in same)
