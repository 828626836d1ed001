"""Tokenizers from elsewhere: their ids are their makers', and text comes back or is refused."""

import json

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from gptjax.config import TokenizerConfig
from gptjax.errors import UserError
from gptjax.text.files import load_tokenizer
from gptjax.text.splitting import split_text
from gptjax.text.tokenizer import Tokenizer
from gptjax.text.tokenizer_training import train_tokenizer

CORPUS = [
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n" * 5,
    "It's 12345 o'clock, and they'll count to 67890.\n\n   So it is.\r\n" * 5,
    "床前明月光，疑是地上霜。😀" * 5,
]
TEXTS = st.text(
    st.one_of(
        st.sampled_from("ab1' \t\n\r\x00\x1c\x85\u0301\u200b\u3000é中😀<|>"), st.characters(exclude_categories=["Cs"])
    ),
    max_size=60,
)
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""The split rule of GPT-2, as tiktoken writes it."""


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory):
    """A small vocabulary in the form of GPT-2's two files."""
    folder = tmp_path_factory.mktemp("gpt2")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    model = json.loads(backend.to_str())["model"]
    vocabulary = model["vocab"] | {"<|endoftext|>": len(model["vocab"])}
    (folder / "encoder.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = "".join(" ".join(pair) + "\n" for pair in model["merges"])
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def gpt2(gpt2_folder) -> Tokenizer:
    return load_tokenizer(gpt2_folder)


@pytest.fixture(scope="session")
def reference(gpt2) -> tiktoken.Encoding:
    """tiktoken with the same vocabulary, whose ids are its ranks, and GPT-2's rule."""
    ranks = {raw: i for i, raw in enumerate(gpt2.token_bytes()) if raw}
    special = {"<|endoftext|>": gpt2.end_of_text_id}
    return tiktoken.Encoding("small", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


@given(text=TEXTS)
@settings(deadline=None, max_examples=300)
def test_gpt2_ids_are_tiktokens(gpt2, reference, text):
    ids = gpt2.encode(text)
    assert ids == reference.encode(text, disallowed_special=())
    gpt2.require_lossless(text, ids)
    assert gpt2.decode(ids) == text


@pytest.mark.parametrize("name", ["", "encoder.json", "vocab.bpe"])
def test_gpt2_by_folder_or_file(gpt2_folder, gpt2, name):
    assert load_tokenizer(gpt2_folder / name).fingerprint == gpt2.fingerprint
    assert (gpt2.kind, gpt2.end_of_text_id, gpt2.prefix) == ("bpe", gpt2.vocab_size - 1, b"")


def test_the_names_of_hugging_face(gpt2_folder, gpt2, tmp_path):
    (tmp_path / "vocab.json").write_bytes((gpt2_folder / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((gpt2_folder / "vocab.bpe").read_bytes())
    assert load_tokenizer(tmp_path).fingerprint == gpt2.fingerprint


@pytest.mark.parametrize("form", ["gpt2", "bpe"])
@given(words=st.lists(TEXTS, min_size=1, max_size=20), length=st.integers(20, 60))
@settings(deadline=None, max_examples=200)
def test_pieces_encode_to_the_ids_of_the_whole(gpt2, form, words, length):
    """Pieces are cut where both rules split anyway; a piece that could only be cut anywhere is told by its length."""
    tokenizer = gpt2 if form == "gpt2" else train_tokenizer(CORPUS, TokenizerConfig(vocab_size=400))
    text = " ".join(words)
    pieces = list(split_text(text, length))
    assert "".join(pieces) == text
    assert all(len(piece) <= length for piece in pieces)
    if all(len(piece) < length for piece in pieces):
        assert [i for piece in pieces for i in tokenizer.encode(piece)] == tokenizer.encode(text)


def sentencepiece_like(*, byte_fallback: bool) -> Backend:
    """The form of Llama 2's file: spaces are U+2581, one is put before the text, unknown characters become bytes."""
    texts = [text.replace(" ", "▁") for text in CORPUS]
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=byte_fallback, fuse_unk=True))
    specials = ["<unk>", "<s>", "</s>", *([f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else [])]
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, special_tokens=specials))
    values = json.loads(backend.to_str())
    values["added_tokens"] = values["added_tokens"][:3]
    backend = Backend.from_str(json.dumps(values))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


@given(text=TEXTS.filter(lambda text: "▁" not in text))
@settings(deadline=None)
def test_sentencepiece_round_trips_through_bytes(text):
    tokenizer = Tokenizer.of_backend(sentencepiece_like(byte_fallback=True), "here")
    ids = tokenizer.encode(text)
    tokenizer.require_lossless(text, ids)
    table = tokenizer.token_bytes()
    assert b"".join(table[i] for i in ids) == (tokenizer.prefix + text.encode() if text else b"")
    assert (tokenizer.kind, tokenizer.prefix) == ("sentencepiece", b" ")
    assert tokenizer.end_of_text_id == tokenizer.special_token_ids["</s>"]


def test_runs_of_spaces_that_were_added_are_spaces():
    """As in Gemma's files: what SentencePiece writes as U+2581 is a space in tokens that were added, too."""
    backend = sentencepiece_like(byte_fallback=True)
    backend.add_tokens([AddedToken("▁▁", normalized=True)])
    tokenizer = Tokenizer.of_backend(backend, "here")
    ids = tokenizer.encode("a  b")
    assert backend.token_to_id("▁▁") in ids
    tokenizer.require_lossless("a  b", ids)


def test_what_is_lost_is_refused(gpt2):
    """Unknown characters and normalized text are told with the place; special names in the text are no loss."""
    without = Tokenizer.of_backend(sentencepiece_like(byte_fallback=False), "here")
    with pytest.raises(UserError, match=r"without loss: .*ß"):
        without.require_lossless("12 ß", without.encode("12 ß"))
    backend = Backend.from_str(gpt2.to_json())
    backend.normalizer = normalizers.Lowercase()
    lower = Tokenizer.of_backend(backend, "here")
    lower.require_lossless("fib", lower.encode("fib"))
    with pytest.raises(UserError, match=r"'It is Fib' becomes 'it is fib'"):
        lower.require_lossless("It is Fib", lower.encode("It is Fib"))
    gpt2.require_lossless("a<|endoftext|>", gpt2.encode("a<|endoftext|>"))


def test_the_file_alone_keeps_everything(gpt2, tmp_path):
    """A run keeps only tokenizer.json: ids, end of text and bytes are the same after a round trip through it, and
    settings of length in the file, which would cut texts, are off."""
    backend = Backend.from_str(gpt2.to_json())
    backend.add_tokens([AddedToken("    ", normalized=False)])
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    tokenizer = Tokenizer.of_backend(backend, "here")
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint
    for text in (*CORPUS, "a    b"):
        ids = again.encode(text)
        assert ids == tokenizer.encode(text)
        again.require_lossless(text, ids)
    assert again.token_bytes()[again.vocab_size - 1] == b"    "


def test_a_missing_tokenizer_names_the_nearest(gpt2_folder, tmp_path):
    folder = tmp_path / "runs" / "quickstart"
    folder.mkdir(parents=True)
    for wrong, right in ((folder.parent / "quickstar", folder), (gpt2_folder / "vocab.bpo", gpt2_folder / "vocab.bpe")):
        with pytest.raises(UserError) as error:
            load_tokenizer(wrong)
        assert f"no tokenizer {wrong}: " in str(error.value)
        assert str(error.value).endswith(f"did you mean {right}?")
    with pytest.raises(UserError, match=r"no tokenizer .*nothing in .*none is called so"):
        load_tokenizer(tmp_path / "none" / "encoder.json")


SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x08\n\x03\xe2\x96\x81\x15\xff\xfe"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", b'{"model_type": "gpt2"}', "it has no vocabulary under 'model'"),
        ("config.json", b'{"model": "gpt2"}', "it has no vocabulary under 'model'"),
        ("list.json", b"[]", "it has no vocabulary under 'model'"),
        ("tokenizer.model", SENTENCEPIECE, "it is a model of SentencePiece, which has to be converted: AutoTokenizer"),
        ("weights.bin", b"\x80\xff", "it is no JSON"),
        ("notes.txt", b"some text", "it is no JSON"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "it is a tokenizer of tiktoken"),
    ],
)
def test_files_of_another_kind_are_told_what_is_read(gpt2, tmp_path, name, content, expected):
    """In words of ours, not of the library's parser; and a tokenizer.json beside it is what was meant."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_tokenizer(path)
    message = str(error.value)
    assert message.startswith(f"{path} is not a tokenizer.json: {expected}"), message
    assert not any(word in message for word in ("line 1", "column", "utf-8", "codec", "\n"))
    gpt2.save(tmp_path / "tokenizer.json")
    with pytest.raises(UserError) as error:
        load_tokenizer(path)
    assert str(error.value).endswith(f"did you mean {tmp_path / 'tokenizer.json'}?")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "holds no tokenizer.json, nor GPT-2's"),
        ({"encoder.json": "{}"}, "vocab.bpe is missing"),
        ({"encoder.json": "[", "vocab.bpe": ""}, "encoder.json is not JSON"),
        ({"encoder.json": '{"a": 0, "<|endoftext|>": 1}', "vocab.bpe": "#version: 0.2\na b\n"}, "do not fit together"),
        ({"tokenizer.json": '{"model": 1}'}, "is not a tokenizer.json"),
    ],
)
def test_other_folders_are_refused_in_one_line(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=expected) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
