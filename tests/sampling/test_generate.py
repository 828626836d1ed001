"""Text from prompts: what ends it, what is refused, and that a stream is the same text."""

import dataclasses
from collections.abc import Sequence

import pytest

from gptjax.errors import UserError
from gptjax.sampling.config import SamplingConfig
from gptjax.sampling.detokenize import TextStream
from gptjax.sampling.generate import Completion, generate, stream
from gptjax.sampling.rows import generate_tokens

HOT = SamplingConfig(max_tokens=40, temperature=1.3, seed=3)


def text_of(token_ids: list[int]) -> str:
    return bytes(token_ids).decode("utf-8", errors="replace")


def test_generate(model, tokenizer):
    completions = generate(*model, tokenizer, ["语", "语"], HOT)
    assert [c.prompt for c in completions] == ["语", "语"]
    for completion in completions:
        assert completion.text == text_of(completion.token_ids)
        assert (completion.finish_reason == "length") == (len(completion.token_ids) == 40)
    assert completions[0].text != completions[1].text


@pytest.mark.parametrize("stop", [(), (" no such",)])
def test_stream_is_what_generate_returns(model, tokenizer, stop):
    sampling = dataclasses.replace(HOT, stop=stop)
    pieces = list(stream(*model, tokenizer, "def ", sampling))
    assert len(pieces) > 2
    assert "".join(pieces) == generate(*model, tokenizer, ["def "], sampling)[0].text


def test_stop_strings_end_rows_apart(model, tokenizer):
    """Each row ends at its own stop string, and its tokens end with those that completed it."""
    free = generate(*model, tokenizer, ["a", "b"], HOT)
    stop = next(t for i in range(9, 15) if (t := free[0].text[i : i + 2]).isascii())
    for before, after in zip(
        free, generate(*model, tokenizer, ["a", "b"], dataclasses.replace(HOT, stop=stop)), strict=True
    ):
        if stop in before.text:
            assert after.text == before.text[: before.text.index(stop)]
            assert after.finish_reason == "stop"
            assert after.token_ids == before.token_ids[: len(after.token_ids)]
            assert stop in text_of(after.token_ids)
            assert stop not in text_of(after.token_ids[:-1])
        else:
            assert after == before
    pieces = stream(*model, tokenizer, "a", dataclasses.replace(HOT, stop=stop))
    assert "".join(pieces) == free[0].text[: free[0].text.index(stop)]


def test_end_of_text_token(model, tokenizer):
    """The row ends without it, and says why."""
    free = generate(*model, tokenizer, ["a", "b"], HOT)
    end = free[0].token_ids[9]
    rows = [TextStream(tokenizer.token_bytes()) for _ in free]
    for chunk in generate_tokens(*model, [[97], [98]], HOT, (end,), chunk_tokens=8):
        for row, tokens in zip(rows, chunk, strict=True):
            row.push(*tokens)
    for row, before in zip(rows, free, strict=True):
        kept = before.token_ids[: before.token_ids.index(end)] if end in before.token_ids else before.token_ids
        assert row.token_ids == kept
        assert row.finish_reason == ("stop" if end in before.token_ids else "length")


def test_all_rows_finished_ends_the_loop(model):
    """Greedy rows that end in the first chunk are not followed by a second one."""
    prompts, sampling = [[5]], SamplingConfig(max_tokens=40, temperature=0)
    first = next(generate_tokens(*model, prompts, sampling, (), chunk_tokens=8))[0].token_ids[0]
    assert list(generate_tokens(*model, prompts, sampling, (first,), chunk_tokens=8)) == [[([], "stop")]]


def test_context_ends_first(model, tokenizer):
    """Each row ends where its own context does."""
    prompts = ["x" * 60, "x"]
    completions = generate(*model, tokenizer, prompts, HOT)
    assert [(len(c.token_ids), c.finish_reason) for c in completions] == [(4, "length"), (40, "length")]
    assert len(generate(*model, tokenizer, ["x"], SamplingConfig(max_tokens=999))[0].token_ids) == 63


def test_empty_prompt_is_the_start_of_a_document(model, tokenizer):
    (chunk,) = next(generate_tokens(*model, [[tokenizer.end_of_text_id]], HOT, tokenizer.stop_ids))
    completion = generate(*model, tokenizer, [""], HOT)[0]
    assert completion.token_ids[: len(chunk.token_ids)] == chunk.token_ids
    assert generate(*model, tokenizer, []) == []


def test_completion_is_plain_data(model, tokenizer):
    (completion,) = generate(*model, tokenizer, ["a"], HOT)
    assert list(dataclasses.asdict(completion)) == ["prompt", "text", "token_ids", "finish_reason"]
    assert all(type(token) is int for token in completion.token_ids)
    assert isinstance(completion, Completion)


def test_prompt_that_fills_the_context(model, tokenizer):
    for call in (lambda p: generate(*model, tokenizer, ["a", p]), lambda p: stream(*model, tokenizer, p)):
        with pytest.raises(UserError, match=r"prompt has 64 tokens, but the context 64, .* has 63$"):
            call("x" * 64)
    assert len(generate(*model, tokenizer, ["x" * 63])[0].token_ids) == 1


def test_top_k_beyond_the_vocabulary(model, tokenizer):
    with pytest.raises(UserError, match="top_k is 258, but the vocabulary has 257 tokens"):
        generate(*model, tokenizer, ["a"], SamplingConfig(top_k=258))


def test_tokenizer_of_another_model(make_model, tokenizer):
    with pytest.raises(UserError, match=r"tokenizer has 257 tokens, but model\.vocab_size is 100"):
        stream(*make_model(vocab_size=100), tokenizer, "a")


def test_a_prompt_that_the_tokenizer_loses_is_refused(model, tokenizer):
    """It would be continued from another text than the one that is shown."""

    class Losing(type(tokenizer)):
        def encode(self, text: str) -> list[int]:
            return super().encode(text.lower())

        def require_lossless(self, text: str, ids: Sequence[int]) -> None:
            if bytes(ids) != text.encode():
                raise UserError(f"{text} is lost")

    assert generate(*model, Losing(), ["ab"], HOT)
    for call in (lambda: generate(*model, Losing(), ["ab", "aB"], HOT), lambda: stream(*model, Losing(), "aB", HOT)):
        with pytest.raises(UserError, match="aB is lost"):
            call()


SPACED_WORDS = {0: b" fo", 1: b" ba"}


class SpaceTokenizer:
    """Bytes, and two words that carry the space before them, as byte-level BPE makes them."""

    vocab_size = 257
    end_of_text_id = 256
    stop_ids = (256,)
    opening = ()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self) -> list[bytes]:
        return [*(SPACED_WORDS.get(i, bytes([i])) for i in range(256)), b""]

    def require_lossless(self, text: str, ids: Sequence[int]) -> None:
        assert bytes(ids) == text.encode()


def test_prompt_that_ends_in_a_space_goes_on_with_a_word(model):
    """The first token begins with the prompt's last space, which is not said twice; other prompts begin freely."""
    tokenizer = SpaceTokenizer()
    prompts = ["a ", "a", "bc "]
    completions = generate(*model, tokenizer, prompts, dataclasses.replace(HOT, stop=("\x00no",)))
    token_bytes = tokenizer.token_bytes()
    for completion in completions:
        raw = b"".join(token_bytes[i] for i in completion.token_ids)
        given = b" " if completion.prompt.endswith(" ") else b""
        assert raw.startswith(given)
        assert completion.text == raw.removeprefix(given).decode("utf-8", errors="replace")
    assert generate(*model, tokenizer, ["a"], HOT)[0].token_ids != completions[0].token_ids
    pieces = stream(*model, tokenizer, "a ", dataclasses.replace(HOT, stop=("\x00no",)))
    assert "".join(pieces) == completions[0].text
