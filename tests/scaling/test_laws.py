"""Published laws say what their papers say, as far as papers repeat themselves in other figures."""

import dataclasses
import math

import pytest

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.model.accounting import parameter_counts
from gptjax.scaling import laws


@pytest.mark.parametrize(
    ("law", "exponent", "tolerance"),
    [
        (laws.CHINCHILLA, 0.46, 0.005),  # Hoffmann et al., table 2
        (laws.EPOCH, 0.513, 0.001),  # Besiroglu et al.
        (laws.MUENNIGHOFF, 0.5, 1e-12),  # they tied the exponents
        (laws.CHINCHILLA_1, 0.50, 0),
        (laws.CHINCHILLA_2, 0.49, 0),
        (laws.KAPLAN, 0.73, 0),
    ],
)
def test_frontier_exponents_are_the_published_ones_and_the_frontier_has_them(law, exponent, tolerance):
    assert law.frontier_exponent == pytest.approx(exponent, abs=tolerance)
    (small, _), (large, tokens) = law.compute_optimal(1e20), law.compute_optimal(1e22)
    assert math.log(large / small) / math.log(100) == pytest.approx(law.frontier_exponent)
    assert 6 * large * tokens == pytest.approx(1e22)


def test_published_sizes():
    """Rows of the papers' tables that the coefficients were not taken from."""
    assert laws.CHINCHILLA_1.compute_optimal(5.76e23)[0] == pytest.approx(67e9, rel=0.05)  # Chinchilla itself
    assert laws.CHINCHILLA_2.compute_optimal(6.88e23)[0] == pytest.approx(67e9, rel=0.05)
    assert laws.CHINCHILLA.compute_optimal(1.71e24)[0] == pytest.approx(67e9, rel=0.1)
    N, D = laws.EPOCH.compute_optimal(5.76e23)
    assert abs(D / N - 20) < 6, "about 20 tokens a parameter"
    assert laws.KAPLAN.compute_optimal(laws.PF_DAY)[0] == pytest.approx(1.3e9)
    # With plenty of data the joint law is L(N); the paper's two fits of N_c agree within 3 %.
    assert laws.KAPLAN.loss(1e9, 1e18) == pytest.approx(laws.KAPLAN_PARAMETERS.loss(1e9), rel=0.03)
    assert laws.KAPLAN.loss(1e18, 1e10) == pytest.approx(laws.KAPLAN_TOKENS.loss(1e10), rel=0.05)


@pytest.mark.parametrize("law", [laws.CHINCHILLA, laws.EPOCH, laws.MUENNIGHOFF])
def test_compute_optimal_is_least_on_its_isoflop_line(law):
    N, D = law.compute_optimal(1e21)
    least = law.loss(N, D)
    assert all(law.loss(N * f, D / f) > least for f in (0.9, 0.99, 1.01, 1.1))
    assert law.optimal_tokens(N) == pytest.approx(D)
    assert law.optimal_parameters(D) == pytest.approx(N)
    assert law.cheapest(least) == pytest.approx((N, D))
    assert law.tokens_for(N, least) == pytest.approx(D)


def test_a_loss_out_of_reach_is_refused_with_the_least():
    with pytest.raises(UserError, match=r"1B parameters get no lower than 2\.1\d+, so never to 2\b"):
        laws.EPOCH.tokens_for(1e9, 2.0)
    with pytest.raises(UserError, match=r"below E = 1\.817"):
        laws.EPOCH.cheapest(1.8)
    with pytest.raises(UserError, match="flops is 0"):
        laws.EPOCH.compute_optimal(0)


def test_outside_names_what_is_extrapolated():
    assert laws.CHINCHILLA.outside(1e9, 20e9) is None
    assert laws.CHINCHILLA.outside(70e6, 500e9) is None
    warning = laws.CHINCHILLA.outside(175e9, 300e9)
    assert warning == "Chinchilla 3 was measured with 70M to 16B parameters: 175B parameters is extrapolation"
    both = laws.STEP_LAW.outside(1e6, 1e6)
    assert "60M to 1.07B parameters and 2B to 100B tokens: 1M parameters and 1M tokens" in both
    assert "1e+17 to 2e+19 FLOPs: 6e+21 FLOPs" in laws.DEEPSEEK.outside(1e11, 1e10)


def test_repeated_tokens_are_worth_less():
    law = laws.DATA_CONSTRAINED
    unique = 10e9
    N = laws.MUENNIGHOFF.optimal_parameters(unique)
    assert N / unique == pytest.approx(0.051, rel=0.01)  # the authors' constant
    assert law.loss(N, unique, unique) == laws.MUENNIGHOFF.loss(N, unique), "one epoch repeats nothing"
    _, four = law.effective(N, 4 * unique, unique)
    assert 0.9 * 4 * unique < four < 4 * unique, "four epochs are nearly as good as new data"
    _, forty = law.effective(N, 40 * unique, unique)
    assert forty < 0.42 * 40 * unique, "forty are not"
    _, many = law.effective(N, 1e6 * unique, unique)
    assert many == pytest.approx((1 + 15.387756) * unique), "there is a limit to what repetition gives"
    excess, _ = law.effective(100 * N, unique, unique)
    assert excess < (1 + 5.309743) * N * 1.0001


def test_tuning_laws_give_their_papers_figures():
    # DeepSeek LLM, figure 3's formulas, at 1e19 FLOPs by hand.
    N, D = 1e9, 1e19 / 6e9
    assert laws.DEEPSEEK.learning_rate(N, D) == pytest.approx(0.3118 * 1e19**-0.125)
    assert laws.DEEPSEEK.batch_tokens(N, D) == pytest.approx(0.2920 * 1e19**0.3271)
    # Step Law at 1B parameters and 100B tokens: 1.6e-3 and 1.1M tokens.
    assert laws.STEP_LAW.learning_rate(1e9, 100e9) == pytest.approx(1.6e-3, rel=0.05)
    assert laws.STEP_LAW.batch_tokens(1e9, 100e9) == pytest.approx(1.1e6, rel=0.05)


def test_parameters_are_counted_as_a_law_counts_them():
    model = ModelConfig(num_layers=2, model_dim=32, num_heads=4, context_length=16, vocab_size=100, tie_embeddings=True)
    parts = parameter_counts(model)
    inner = laws.counted_parameters(model, "non_embedding")
    assert inner == parts["total"] - parts["embedding"] - parts["positions"] - parts["head"]
    assert laws.counted_parameters(model, "total") == parts["total"]
    assert laws.counted_parameters(model, "non_embedding_and_head") == inner + 100 * 32
    untied = dataclasses.replace(model, tie_embeddings=False)
    assert laws.counted_parameters(untied, "non_embedding") == inner


@pytest.mark.parametrize(("value", "text"), [(768, "768"), (1.3e9, "1.3B"), (70e6, "70M"), (999.9e6, "1B"), (5, "5")])
def test_short(value, text):
    assert laws.short(value) == text
