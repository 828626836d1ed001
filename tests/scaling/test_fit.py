"""Fits find the law that made a table, say how sure they are, and predict what the law says of other sizes."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax.errors import UserError
from gptjax.scaling import huber
from gptjax.scaling.fit import COEFFICIENTS, LossFit, describe, fit_loss
from gptjax.scaling.laws import DATA_CONSTRAINED, EPOCH, MUENNIGHOFF, DataConstrainedLaw
from gptjax.scaling.repeated import fit_repeated

CURVES = Path(__file__).parents[3] / "shared" / "data" / "gpt3_training_curves.csv"


def made(points, noise, seed=0, law=EPOCH):
    rng = np.random.default_rng(seed)
    N = np.exp(rng.uniform(np.log(7e7), np.log(1.6e10), points))
    D = np.exp(rng.uniform(np.log(5e9), np.log(5e11), points))
    loss = np.array([law.loss(n, d) for n, d in zip(N, D, strict=True)])
    return N, D, loss * np.exp(rng.normal(0, noise, points))


def test_a_table_without_noise_gives_its_law_back():
    fit = fit_loss(*made(12, 0.0), resamples=0)
    for name in COEFFICIENTS:
        assert getattr(fit.law, name) == pytest.approx(getattr(EPOCH, name), rel=1e-6), name
    assert fit.least < 1e-15
    assert fit.interval("E") is None


def test_the_intervals_hold_the_truth_about_as_often_as_they_say():
    """Of 20 tables; benchmarks/fit_coverage.py does it with 200."""
    fits = [fit_loss(*made(60, 0.003, seed), resamples=100, seed=seed) for seed in range(20)]
    for name in COEFFICIENTS:
        bounds = [fit.interval(name) for fit in fits]
        inside = sum(low <= getattr(EPOCH, name) <= high for low, high in bounds)
        assert inside >= 14, f"{name} is in {inside} of 20"
        width = np.median([high - low for low, high in bounds])
        spread = np.std([getattr(fit.law, name) for fit in fits])
        assert 1.5 < width / spread < 8, "neither so wide that it says nothing"


def test_all_resamples_are_one_solve_that_starts_at_the_fit(monkeypatch):
    seen, compiled = [], []
    solvers = huber._solvers

    def spied(model):
        starts, resamples = solvers(model)

        def solve(start, *rest):
            seen.append((np.shape(start), np.shape(rest[2])))
            compiled.append(resamples._cache_size())
            return resamples(start, *rest)

        return starts, solve

    monkeypatch.setattr(huber, "_solvers", spied)
    for seed in (0, 1):
        fit_loss(*made(30, 0.003), resamples=40, seed=seed)
    assert seen == [((5,), (40, 30))] * 2
    assert compiled[1] - compiled[0] == 1, "the second set of resamples compiles nothing"


def test_points_far_off_hardly_move_the_fit():
    """As they would the least squares fit, whose Huber loss has a large delta."""
    N, D, loss = made(40, 0.001)
    loss[::10] *= 1.1
    robust, squares = (fit_loss(N, D, loss, resamples=0, delta=delta).law for delta in (1e-3, 1.0))
    off = [abs(law.loss(7e10, 1.4e12) / EPOCH.loss(7e10, 1.4e12) - 1) for law in (robust, squares)]
    assert 2 * off[0] < off[1]


def test_the_minimum_is_that_of_scipy():
    """In the objective: an independent minimizer, started from the truth, gets no lower."""
    optimize = pytest.importorskip("scipy.optimize")
    N, D, loss = made(50, 0.005)
    fit = fit_loss(N, D, loss, resamples=0)

    def objective(theta):
        e, a, b, alpha, beta = theta
        off = np.log(np.exp(e) + np.exp(a - alpha * np.log(N)) + np.exp(b - beta * np.log(D))) - np.log(loss)
        size = np.abs(off)
        return np.where(size < 1e-3, 0.5 * size**2, 1e-3 * (size - 0.5e-3)).sum() * 1e3

    start = [np.log(EPOCH.E), np.log(EPOCH.A), np.log(EPOCH.B), EPOCH.alpha, EPOCH.beta]
    options = {"maxiter": 20000, "maxfev": 20000, "xatol": 1e-10, "fatol": 1e-12}
    found = optimize.minimize(objective, start, method="Nelder-Mead", options=options)
    assert fit.least * 1e3 <= found.fun * (1 + 1e-6)
    law = fit.law
    ours = objective([np.log(law.E), np.log(law.A), np.log(law.B), law.alpha, law.beta])
    assert fit.least * 1e3 == pytest.approx(ours, rel=1e-9), "what it says is the sum, not the mean"


def test_a_variable_with_one_value_has_no_term():
    N, _, _ = made(8, 0.0)
    one = np.full(8, 3e11)
    fit = fit_loss(N, one, [EPOCH.loss(n, 3e11) for n in N], resamples=50)
    assert fit.fixed == ("B", "beta")
    assert (fit.law.A, fit.law.alpha) == (pytest.approx(EPOCH.A, rel=1e-5), pytest.approx(EPOCH.alpha, rel=1e-6))
    assert EPOCH.E + EPOCH.B / 3e11**EPOCH.beta == pytest.approx(fit.law.E, rel=1e-6)
    assert fit.interval("beta") is None
    assert ("B", "not in the points", "") in describe(fit)


def test_predictions_hold_new_runs_with_their_noise():
    """Of 15 tables, ten new runs each: what is beyond 90 % by the coefficients' doubt alone is the noise."""
    inside = 0
    for seed in range(15):
        fit, rng = fit_loss(*made(60, 0.01, seed), resamples=60), np.random.default_rng(100 + seed)
        loss, low, high = fit.predict(1e9, 1e11)
        assert loss == fit.law.loss(1e9, 1e11)
        inside += sum(low <= EPOCH.loss(1e9, 1e11) * np.exp(noise) <= high for noise in rng.normal(0, 0.01, 10))
    assert 120 <= inside <= 147


@pytest.mark.parametrize("skew", [1, -1])
def test_a_new_run_s_noise_is_skewed_as_that_of_the_runs_before(skew):
    """With known coefficients the interval is that of the noise: beyond each of its ends lie 5 %, whatever its skew."""
    rng = np.random.default_rng(0)

    def measured(count):
        return EPOCH.loss(1e9, 1e11) * np.exp(skew * rng.exponential(0.01, count))

    residuals_P = np.log(EPOCH.loss(1e9, 1e11) / measured(2000))
    _, low, high = LossFit(EPOCH, (EPOCH,) * 500, residuals_P, 0.0, ()).predict(1e9, 1e11)
    new = measured(10_000)
    assert [np.mean(new < low), np.mean(new > high)] == pytest.approx([0.05, 0.05], abs=0.015)


@pytest.mark.parametrize(
    ("N", "D", "message"),
    [
        ([1e6, 2e6, 4e6, 8e6], [1e9, 2e9, 4e9, 1e9], "4 points are fewer than the 5 coefficients E, A, B, alpha, beta"),
        ([1e6] * 6, [1e9] * 6, "the same parameters and tokens"),
        ([1e6, 2e6] * 3, [1e9, 2e9, 4e9] * 2, "2 different parameters, but a curve with a floor needs three"),
    ],
)
def test_too_little_is_refused(N, D, message):
    with pytest.raises(UserError, match=message):
        fit_loss(N, D, [3.0] * len(N))


def test_losses_that_rise_are_refused():
    N, D, loss = made(12, 0.0)
    with pytest.raises(UserError, match="does not fall"):
        fit_loss(N, D, 10 - loss)


def test_float64_is_the_fit_s_alone():
    fit_loss(*made(12, 0.0), resamples=0)
    assert not jax.config.jax_enable_x64


def test_repeated_text_gives_its_constants_back():
    rng = np.random.default_rng(0)
    law = DataConstrainedLaw(MUENNIGHOFF, 8.0, 3.0)
    U = np.exp(rng.uniform(np.log(1e8), np.log(1e10), 40))
    D, N = U * rng.uniform(2, 60, 40), np.exp(rng.uniform(np.log(1e7), np.log(5e9), 40))
    loss = np.array([law.loss(*point) for point in zip(N, D, U, strict=True)])
    fit = fit_repeated(MUENNIGHOFF, N, D, U, loss, resamples=50)
    assert (fit.law.repeats_tokens, fit.law.excess_parameters) == (
        pytest.approx(8, rel=1e-4),
        pytest.approx(3, rel=1e-4),
    )
    few = np.array([1e6] * 5)
    found = fit_repeated(MUENNIGHOFF, few, D[:5], U[:5], np.full(5, 5.0), resamples=0)
    assert found.law.excess_parameters == DATA_CONSTRAINED.excess_parameters, "the published one where nothing shows"
    with pytest.raises(UserError, match="0 runs repeat text"):
        fit_repeated(MUENNIGHOFF, N, U, U, loss)


@pytest.mark.skipif(not CURVES.is_file(), reason="GPT-3's curves are not part of the project")
def test_gpt3_s_small_models_predict_its_large_ones(monkeypatch):
    import importlib.util

    path = Path(__file__).parents[2] / "benchmarks" / "gpt3_curves.py"
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location("gpt3_curves", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    curves = module.read(CURVES)
    law = fit_loss(*module.points(curves, 20), resamples=0).law
    for model, tolerance in {"13b": 0.005, "175b": 0.025}.items():
        last = np.median(curves[model][curves[model][:, 0] > 295, 1])
        assert law.loss(module.PARAMETERS[model], 300e9) == pytest.approx(last, rel=tolerance)


def test_a_fitted_law_is_one_like_those_that_ship():
    fit = fit_loss(*made(40, 0.001), resamples=0, counts="non_embedding")
    assert dataclasses.replace(fit.law, name="x").counts == "non_embedding"
    assert "is extrapolation" in fit.law.outside(1e12, 1e11)
