"""Drawing by inversion follows the softmax, to the rarest token, and never draws what was removed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gptjax.sampling.draw import _invert, draw
from gptjax.sampling.filters import Candidates


@pytest.mark.parametrize("width", [7, 300])
def test_frequencies(width):
    """Over one block and over several; chi-square of 20,000 draws, tokens expected less than 5 times taken together."""
    n = 20_000
    logits_C = 2 * jax.random.normal(jax.random.key(1), (width,))
    logits_C = logits_C.at[3].set(-jnp.inf)
    keys = jax.random.split(jax.random.key(0), n)
    tokens = jax.jit(lambda keys: draw(Candidates(jnp.broadcast_to(logits_C, (n, width)), None), keys))(keys)
    counts = np.bincount(tokens, minlength=width)
    expected = n * np.asarray(jax.nn.softmax(logits_C), np.float64)
    rare = expected < 5
    assert counts[3] == 0
    grouped = [np.append(x[~rare], x[rare].sum()) for x in (counts, expected)]
    grouped = [x[: len(x) - (grouped[1][-1] == 0)] for x in grouped]
    assert stats.chisquare(grouped[0], grouped[1] * n / grouped[1].sum()).pvalue > 1e-4


def test_places_are_tokens():
    """With ids, the place that is drawn is looked up."""
    candidates = Candidates(jnp.array([[0.0, -jnp.inf], [-jnp.inf, 0.0]]), jnp.array([[41, 7], [3, 12]]))
    assert draw(candidates, jax.random.split(jax.random.key(0), 2)).tolist() == [41, 12]
    spread = candidates.spread(jnp.array([[0.25, 0.0], [0.0, 0.75]]), jnp.zeros((2, 50)))
    assert spread[0, 41] == 0.25
    assert spread[1, 12] == 0.75
    assert spread.sum() == 1


def test_no_random_number_draws_what_has_no_weight():
    """Neither 0 nor the last number before 1, nor one beyond it, as rounding might leave."""
    weights = jnp.array([[0.0, 0.3, 0.0, 0.7, 0.0]])
    below_one = float(np.nextafter(np.float32(1), np.float32(0)))
    for uniform, place in ((0.0, 1), (0.29, 1), (0.31, 3), (below_one, 3), (1.0, 3)):
        assert int(_invert(weights, jnp.array([uniform]))[0]) == place
