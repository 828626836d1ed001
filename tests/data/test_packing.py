"""Packing loses nothing, and a packed row teaches what its examples would teach alone."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data.packing import Example, PackedRows, fit_rows, pack
from gptjax.data.rankings import EncodedAnswers, PairRows
from gptjax.errors import UserError
from gptjax.model.gpt import GPT
from gptjax.parallel import sharding
from gptjax.training.losses import language_model_loss

PADDING = 0


def example(length, seed=0):
    draw = np.random.default_rng((seed, length))
    return Example(draw.integers(1, 61, length).astype(np.int32), draw.random(length) < 0.6)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_pack_places_each_item_once_in_few_rows(lengths):
    rows = pack(lengths, 20)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    filled = [sum(lengths[item] for item in row) for row in rows]
    assert max(filled) <= 20
    assert sum(total <= 10 for total in filled) <= 1, "two half-empty rows would be one"
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 20) * 1.5 + 1


@pytest.mark.parametrize("positions", ["learned", "rope"])
def test_a_packed_row_is_its_examples(tiny, positions):
    """The loss and its gradient, summed over rows, are those of every example in a row of its own."""
    import dataclasses

    config = dataclasses.replace(tiny, positions=positions)
    model = GPT(config)
    examples = [example(length, seed) for seed, length in enumerate((9, 4, 17, 3, 6, 8, 2, 12, 5))]
    rows = PackedRows(examples, tiny.context_length, PADDING)
    assert len(rows) < len(examples)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    loss = jax.jit(jax.value_and_grad(language_model_loss(model, packed=True), has_aux=True))

    def total(batches):
        found = [loss(params, {name: values[None] for name, values in batch.items()}, None) for batch in batches]
        return jax.tree.map(lambda *parts: sum(parts), *found)

    alone = [PackedRows([one], tiny.context_length, PADDING)[0] for one in examples]
    (packed_sum, packed_sums), packed_grads = total([rows[i] for i in range(len(rows))])
    (sum_, sums), grads = total(alone)
    assert packed_sums["weight"] == sums["weight"] == sum(e.learned[1:].sum() for e in examples)
    np.testing.assert_allclose(packed_sum, sum_, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), packed_grads, grads)


def test_no_token_sees_another_example(tiny):
    """Another text in one example changes no logit of the others."""
    model = GPT(tiny)
    first, second = example(7), example(9)
    row = PackedRows([first, second], tiny.context_length, PADDING)[0]
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    places = {name: row[name][None, :-1] for name in ("segment_ids", "positions")}
    apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens, **places, in_order=True)[0][0])
    changed = row["tokens"].copy()
    in_first = row["segment_ids"] == row["segment_ids"][0]
    changed[in_first] = changed[in_first] % 60 + 1
    before, after = apply(row["tokens"][None, :-1]), apply(changed[None, :-1])
    np.testing.assert_array_equal(before[~in_first[:-1]], after[~in_first[:-1]])
    assert not np.array_equal(before[in_first[:-1]], after[in_first[:-1]])


def test_what_does_not_fit():
    examples, origins = [example(5), example(12)], ["a:1", "a:2"]
    with pytest.raises(UserError, match=r"a:2: 12 tokens do not fit training.sequence_length 8 .*1 of 2.*on-long"):
        fit_rows(examples, origins, 8, "stop")
    kept, counts = fit_rows(examples, origins, 8, "skip")
    assert [len(e.token_ids) for e in kept] == [5]
    assert counts == {"too long and left out": 1}
    kept, counts = fit_rows(examples, origins, 8, "truncate")
    assert [len(e.token_ids) for e in kept] == [5, 9]
    assert counts == {"too long and cut": 1}
    unlearned = [Example(np.ones(12, np.int32), np.arange(12) > 10)]
    assert fit_rows(unlearned, ["b"], 8, "truncate")[0] == [], "nothing of it would be learned"


def test_rows_go_to_a_mesh(tiny):
    rows = PackedRows([example(7), example(9), example(12)], 16, PADDING)
    batch = {name: sharding.put_batch(np.stack([rows[0][name]] * 8)) for name in rows[0]}
    assert {name: (x.shape, str(x.dtype)) for name, x in batch.items()} == {
        "tokens": ((8, 17), "int32"),
        "loss_mask": ((8, 17), "float32"),
        "segment_ids": ((8, 17), "int32"),
        "positions": ((8, 17), "int32"),
    }


def test_answers_of_the_same_tokens_are_no_pair():
    """Two answers that were cut at the same place are one: neither is better, whatever their ranks say."""
    same, other = (Example(np.array([1, 2, last]), np.array([False, True, True])) for last in (3, 4))
    pairs = PairRows([EncodedAnswers([same, same, other], (0, 1, 2))], 4, 0)
    assert [pairs[number]["tokens"][:, 2].tolist() for number in range(len(pairs))] == [[3, 4], [3, 4]]
