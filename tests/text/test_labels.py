import pytest

from gptjax.text.labels import token_label


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
