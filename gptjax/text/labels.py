"""Tokens as people can read them."""

from gptjax.text.tokenizer import Tokenizer


def token_label(raw: bytes, name: str = "") -> str:
    """A token to be shown: its text, spaces as ␣, and what cannot be seen or drawn as an escape.

    Args:
        raw: its bytes; none for special tokens.
        name: what a special token is called.
    """
    if not raw:
        return name or "∅"
    text = raw.decode(errors="backslashreplace")
    return "".join("␣" if c == " " else c if c.isprintable() else repr(c)[1:-1] for c in text)


def token_labels(tokenizer: Tokenizer) -> list[str]:
    """The `token_label` of every id, in the order of the ids."""
    names = {i: name for name, i in tokenizer.special_token_ids.items()}
    return [token_label(raw, names.get(i, "")) for i, raw in enumerate(tokenizer.token_bytes())]
