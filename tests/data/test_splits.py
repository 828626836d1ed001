import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import DataConfig
from gptjax.data.sources import Document
from gptjax.data.splits import choose_split, uniform_hash
from gptjax.errors import UserError


def documents(count: int, length: int = 10) -> list[Document]:
    return [Document(f"{i:0{length}}", f"{i}.txt") for i in range(count)]


def data(fraction: float = 0.1, split: str = "auto") -> DataConfig:
    return DataConfig(validation_fraction=fraction, split=split)


@pytest.mark.parametrize(("count", "rule"), [(99, "position"), (100, "hash")])
def test_auto_needs_a_hundred_documents_to_hash(count, rule):
    split = choose_split(documents(count), data())
    assert split.rule == rule
    assert "100 documents" in split.reason


@pytest.mark.parametrize("rule", ["hash", "position"])
def test_a_rule_can_be_forced(rule):
    split = choose_split(documents(50 if rule == "hash" else 200), data(0.3, rule))
    assert (split.rule, split.reason) == (rule, "data.split")


def test_hash_keeps_a_document_on_its_side_whatever_else_there_is():
    some, more = documents(300), documents(3000)
    sides = {p.text: p.split for p in choose_split(some, data()).parts(some)}
    grown = {p.text: p.split for p in choose_split(more, data()).parts(reversed(more))}
    assert all(grown[text] == side for text, side in sides.items())
    held_out = sum(side == "validation" for side in grown.values())
    assert 240 < held_out < 360, "a tenth of 3000, within four standard deviations"


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8), fraction=st.floats(0.05, 0.95))
@settings(deadline=None)
def test_position_cuts_the_concatenated_text_once(lengths, fraction):
    docs = [Document(chr(ord("a") + i) * n, "") for i, n in enumerate(lengths)]
    whole = "".join(d.text for d in docs)
    cut = int(len(whole) * (1 - fraction))
    if not 0 < cut < len(whole):
        with pytest.raises(UserError, match="split by position"):
            choose_split(docs, data(fraction))
        return
    parts = list(choose_split(docs, data(fraction)).parts(docs))
    assert "".join(p.text for p in parts if p.split == "train") == whole[:cut]
    assert "".join(p.text for p in parts if p.split == "validation") == whole[cut:]
    assert all(p.text for p in parts)
    assert [p.split for p in parts] == sorted(p.split for p in parts), "everything before the cut comes first"


def test_empty_sides_are_refused():
    with pytest.raises(UserError, match="split by hash gives 100 of 100 documents to train and 0 to validation"):
        choose_split(documents(100), data(1e-9))
    with pytest.raises(UserError, match=r"^data\.path a b: the split by position gives 0 of 1 characters"):
        choose_split([Document("a", "")], DataConfig(path=("a", "b"), validation_fraction=0.5))
    with pytest.raises(UserError, match="no document left"):
        choose_split([], data())


def test_hashes_of_two_purposes_are_independent():
    low = [d.text for d in documents(4000) if uniform_hash(d.text, "validation") < 0.5]
    both = sum(uniform_hash(text, "tokenizer") < 0.5 for text in low)
    assert 0.45 < both / len(low) < 0.55
