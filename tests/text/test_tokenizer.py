import json
from itertools import pairwise

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from gptjax.config import TokenizerConfig
from gptjax.errors import UserError
from gptjax.text import splitting
from gptjax.text.splitting import split_text
from gptjax.text.tokenizer import Tokenizer
from gptjax.text.tokenizer_training import SPECIAL_TOKENS, SPLIT_PATTERN, train_tokenizer

CORPUS = [
    "def fib(n):\n    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)\n" * 5,
    "It's 12345 o'clock, and they'll count to 67890.\n\n" * 5,
    "床前明月光，疑是地上霜。\r\n<|endoftext|> <|im_start|>user" * 5,
]
# Whatever a regex, a byte alphabet or a decoder may stumble over, more often than chance would give it.
TEXTS = st.text(
    st.one_of(
        st.sampled_from("ab1 \t\n\r\x00\x85\u0301\u200b\u3000é中😀'<|>"), st.characters(exclude_categories=["Cs"])
    ),
    max_size=60,
)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_tokenizer(CORPUS, TokenizerConfig(kind="bpe", vocab_size=400))


@pytest.fixture(scope="module")
def byte() -> Tokenizer:
    return train_tokenizer([], TokenizerConfig(kind="byte"))


@pytest.fixture(scope="module")
def char() -> Tokenizer:
    return train_tokenizer(CORPUS, TokenizerConfig(kind="char"))


@pytest.fixture(params=["bpe", "byte", "char"])
def tokenizer(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


@given(text=TEXTS)
@settings(deadline=None)
def test_any_text_round_trips(bpe, byte, text):
    for tokenizer in (bpe, byte):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        table = tokenizer.token_bytes()
        assert b"".join(table[i] for i in ids) == text.encode()


@given(text=TEXTS)
@settings(deadline=None)
def test_char_round_trips_the_texts_it_was_made_from(text):
    tokenizer = train_tokenizer([text], TokenizerConfig(kind="char"))
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes()[i] for i in ids) == text.encode()


@given(text=TEXTS, max_characters=st.integers(1, 20))
@settings(deadline=None)
def test_pieces_cut_at_line_starts_encode_as_the_whole(bpe, text, max_characters):
    pieces = list(split_text(text, max_characters))
    assert "".join(pieces) == text
    assert all(len(piece) <= max_characters for piece in pieces)
    # Only where no line starts in reach is a piece filled to the brim, and its ids may differ.
    if all(piece.endswith("\n") and not after[0].isspace() for piece, after in pairwise(pieces)):
        assert [i for piece in pieces for i in bpe.encode(piece)] == bpe.encode(text)


_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERNS = {
    "GPT-2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "GPT-4": SPLIT_PATTERN,
    "GPT-4o": "|".join(
        (
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
            rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
            r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )
    ),
}


@given(text=st.text(st.sampled_from(" \n\n\r\tab1'!/.sé.A\u0301\u200b\x85中  "), max_size=30))
@example("./\n/a")
@settings(deadline=None)
@pytest.mark.parametrize("name", PATTERNS)
def test_families_of_tokenizers_split_wherever_a_text_may_be_cut(name, text):
    """Cut at every such place, its pieces are split as the whole is."""
    words = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[name]), behavior="isolated")
    cuts = [0, *(match.start() for match in splitting._CUT.finditer(text)), len(text)]
    pieces = [text[start:end] for start, end in pairwise(cuts)]
    found = [word for piece in pieces for word, _ in words.pre_tokenize_str(piece)]
    assert found == [word for word, _ in words.pre_tokenize_str(text)]


@pytest.mark.parametrize("max_characters", range(60, 70))
def test_a_long_text_with_lines_is_cut_only_where_lines_start(max_characters):
    text = "".join(f"word {i}\n\n    indented\n \n" for i in range(40))
    tokenizer = train_tokenizer([text], TokenizerConfig(vocab_size=400))
    pieces = list(split_text(text, max_characters))
    assert len(pieces) > 10
    assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_text_never_becomes_a_special_token(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    special = set(tokenizer.special_token_ids.values())
    for each in (tokenizer, Tokenizer.load(tmp_path / "tokenizer.json")):
        for text in ("<|endoftext|>", "user<|endoftext|><|im_start|>"):
            ids = each.encode(text)
            assert not special & set(ids)
            assert each.decode(ids) == text


def test_special_tokens_vanish_or_give_their_name(tokenizer):
    ids = [tokenizer.end_of_text_id, *tokenizer.encode("on"), tokenizer.special_token_ids["<|im_end|>"]]
    assert tokenizer.decode(ids) == "on"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|endoftext|>on<|im_end|>"
    assert tuple(tokenizer.special_token_ids) == SPECIAL_TOKENS
    assert len(SPECIAL_TOKENS) == 16
    assert [tokenizer.token_bytes()[i] for i in tokenizer.special_token_ids.values()] == [b""] * 16


def test_a_saved_tokenizer_is_the_same_one(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.kind, loaded.vocab_size) == (tokenizer.kind, tokenizer.vocab_size)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(CORPUS[0]) == tokenizer.encode(CORPUS[0])


def test_kinds_differ_in_fingerprint_and_name_themselves(bpe, byte, char):
    assert [t.kind for t in (bpe, byte, char)] == ["bpe", "byte", "char"]
    assert len({t.fingerprint for t in (bpe, byte, char)}) == 3
    assert byte.vocab_size == 256 + 16
    assert char.vocab_size == len(set("".join(CORPUS))) + 16


def test_training_is_deterministic_and_depends_on_the_text(bpe):
    config = TokenizerConfig(vocab_size=400)
    assert train_tokenizer(iter(CORPUS), config).fingerprint == bpe.fingerprint
    assert train_tokenizer(CORPUS[:1], config).fingerprint != bpe.fingerprint


def test_vocabulary_is_what_was_asked_or_what_the_text_gives():
    long = train_tokenizer(CORPUS, TokenizerConfig(vocab_size=300))
    assert long.vocab_size == 300
    short = train_tokenizer(["ab"], TokenizerConfig(vocab_size=300))
    assert short.vocab_size == 16 + 256
    assert short.kind == "bpe"


def test_merges_never_cross_gpt4_boundaries(bpe):
    """However often it was seen, no token joins four digits, two words, or a word and the newline after it."""
    table = [t.decode(errors="replace") for t in bpe.token_bytes()]
    assert "123" in table
    assert not any(t.isdigit() and len(t) > 3 for t in table)
    assert not any(len(t.split()) > 1 or (t.strip().isalpha() and t.endswith("\n")) for t in table)
    assert r"\p{N}{1,3}" in SPLIT_PATTERN


def test_indentation_is_apart_from_the_line_end_and_the_word(bpe):
    table = bpe.token_bytes()
    assert [table[i] for i in bpe.encode("\n    if")] == [b"\n", b"   ", b" if"]


def test_half_a_character_is_shown_as_replacement(byte):
    ids = byte.encode("中")
    assert len(ids) == 3
    assert byte.decode(ids[:2]) == "\ufffd"


def test_batch_equals_one_by_one(tokenizer):
    assert tokenizer.encode_batch(CORPUS) == [tokenizer.encode(text) for text in CORPUS]
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.encode("") == []


def test_refusals(char, bpe, tmp_path):
    with pytest.raises(UserError, match=r"never seen 'ß' \(U\+00DF\)"):
        char.encode("return ß")
    with pytest.raises(UserError, match="character 1 of the text"):
        bpe.encode("a\udcff")
    with pytest.raises(UserError, match=f"token id {bpe.vocab_size} is outside this tokenizer's {bpe.vocab_size} ids"):
        bpe.decode([1, bpe.vocab_size])
    with pytest.raises(UserError, match="token id -1 is outside"):
        bpe.decode([-1])
    with pytest.raises(UserError, match=r"no tokenizer .*missing.json"):
        Tokenizer.load(tmp_path / "missing.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"a": 1}')
    with pytest.raises(UserError, match=r"broken.json is not a tokenizer.json: [^\n]+$"):
        Tokenizer.load(broken)


def test_foreign_tokenizers_are_told_apart(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    bpe.save(path)
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}))
    with pytest.raises(UserError, match="has WordPiece decoder"):
        Tokenizer.load(path)
    renamed = json.dumps(values).replace("<|endoftext|>", "<|over|>").replace("<|im_end|>", "<|done|>")
    path.write_text(renamed)
    endless = Tokenizer.load(path)
    assert (endless.end_of_text_id, endless.stop_ids, endless.opening) == (None, (), ())
    with pytest.raises(
        UserError, match=r"no special token that ends a document: tokenizer_config.json .* <\|over\|>, "
    ):
        endless.require_end_of_text()
