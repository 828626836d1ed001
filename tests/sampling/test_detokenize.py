"""A stream never splits a character, never shows part of a stop string, and adds up to the whole text."""

from hypothesis import given
from hypothesis import strategies as st

from gptjax.sampling.detokenize import TextStream

BYTES = [bytes([i]) for i in range(256)]


def feed(tokens: list[list[int]], stop: tuple[str, ...] = (), token_bytes: list[bytes] = BYTES) -> list[str]:
    row = TextStream(token_bytes, stop)
    return [row.push(ids, "length" if i == len(tokens) - 1 else None) for i, ids in enumerate(tokens)]


def byte_by_byte(text: str | bytes) -> list[list[int]]:
    return [[byte] for byte in (text.encode() if isinstance(text, str) else text)]


def test_characters_are_whole():
    assert feed(byte_by_byte("aé語🙂")) == ["a", "", "é", "", "", "語", "", "", "", "🙂"]


def test_character_cut_off_by_the_end():
    assert feed(byte_by_byte("a🙂".encode()[:-1])) == ["a", "", "", "�"]


@given(st.binary(max_size=12))
def test_any_bytes_add_up(data):
    assert "".join(feed(byte_by_byte(data))) == data.decode("utf-8", errors="replace")


def test_special_tokens_are_silent():
    assert feed([[0, 1, 0]], token_bytes=[b"x", b""]) == ["xx"]


def test_stop_string_over_tokens_and_chunks():
    """EN is held back, let go when it is no END after all, and nothing of END is ever shown."""
    row = TextStream(BYTES, ("END",))
    pieces = [row.push(ids) for ids in byte_by_byte("aENbEEND!")]
    assert pieces == ["a", "", "", "ENb", "", "E", "", "", ""]
    assert row.finish_reason == "stop"
    assert bytes(row.token_ids) == b"aENbEEND"


def test_held_text_appears_at_the_end():
    assert feed(byte_by_byte("aEN"), stop=("END",)) == ["a", "", "EN"]


def test_first_of_several_stop_strings():
    """One token may complete several; the text ends before the first of them."""
    row = TextStream([b"one two three"], ("three", "two"))
    assert row.push([0]) == "one "


def test_stop_string_inside_the_last_tokens_wins_over_length():
    row = TextStream(BYTES, ("b",))
    assert row.push(list(b"abc"), "length") == "a"
    assert (row.finish_reason, bytes(row.token_ids)) == ("stop", b"ab")


@given(st.text("ab語", max_size=12), st.lists(st.text("ab語", min_size=1, max_size=3), max_size=3), st.integers(1, 5))
def test_chunks_do_not_matter(text, stop, size):
    data = list(text.encode())
    chunks = [data[i : i + size] for i in range(0, len(data), size)] or [[]]
    whole = "".join(feed([data], tuple(stop)))
    assert "".join(feed(chunks, tuple(stop))) == whole
    assert text.startswith(whole)
    assert not any(s in whole for s in stop)
