import pytest

from gptjax.config import TokenizerConfig
from gptjax.text.labels import token_label, token_labels
from gptjax.text.tokenizer_training import train_tokenizer


@pytest.mark.parametrize(
    ("raw", "name", "expected"),
    [
        (b" cat", "", "␣cat"),
        (b"\n\t", "", r"\n\t"),
        ("中".encode(), "", "中"),
        ("中".encode()[:2], "", r"\xe4\xb8"),
        (b" a\n" + "中".encode()[:2], "", r"␣a\n\xe4\xb8"),
        (b"", "<|endoftext|>", "<|endoftext|>"),
        (b"", "", "∅"),
    ],
)
def test_labels_show_what_cannot_be_seen(raw, name, expected):
    assert token_label(raw, name) == expected


def test_every_id_has_its_label():
    """Special tokens by their names, all others as their bytes are shown."""
    tokenizer = train_tokenizer(["a b"], TokenizerConfig(kind="char"))
    labels = token_labels(tokenizer)
    assert len(labels) == tokenizer.vocab_size
    assert labels[tokenizer.end_of_text_id] == "<|endoftext|>"
    assert [labels[i] for i in tokenizer.encode("a b")] == ["a", "␣", "b"]
