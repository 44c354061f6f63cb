import math

import numpy as np
import pandas as pd
import pytest
import scoringrules
from scipy.stats import norm

from models import scoring
from models.candles import Floats

LEVELS = tuple(round(k / 20, 2) for k in range(1, 20))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def slow_fair_crps(actual: float, paths: list[float]) -> float:
    count = len(paths)
    distance = sum(abs(x - actual) for x in paths) / count
    return distance - sum(abs(x - y) for x in paths for y in paths) / (2 * count * (count - 1))


# -- points ----------------------------------------------------------------------------------------


def test_errors_equal_hand_computed_values() -> None:
    actual, forecast, last = np.array([110.0, 90.0]), np.array([100.0, 100.0]), np.array([100.0, 50.0])
    assert scoring.mae_log_return(actual, forecast) == pytest.approx((math.log(1.1) - math.log(0.9)) / 2)
    assert scoring.mae_price(actual, forecast) == 10.0
    assert scoring.mae_pct_of_price(actual, forecast, last) == pytest.approx(15.0)
    assert scoring.bias(actual, forecast) == pytest.approx((math.log(1.1) + math.log(0.9)) / 2)


def test_bias_is_positive_where_forecasts_were_too_low() -> None:
    assert scoring.bias(np.array([2.0]), np.array([1.0])) > 0


def test_skill_of_the_naive_forecast_is_exactly_zero(rng: np.random.Generator) -> None:
    errors = rng.normal(size=(50, 7))
    assert scoring.skill_vs_naive(errors, errors) == 0.0


def test_skill_is_one_minus_the_relative_error() -> None:
    assert scoring.skill_vs_naive(np.array([-1.0, 1.0]), np.array([2.0, -2.0])) == 0.5
    assert scoring.skill_vs_naive(np.array([3.0]), np.array([2.0])) == -0.5


def test_skill_is_undefined_where_naive_was_never_wrong() -> None:
    assert math.isnan(scoring.skill_vs_naive(np.array([0.0]), np.array([0.0])))


# -- distributions ---------------------------------------------------------------------------------


def test_band_holds_its_edges_and_a_point_covers_nothing() -> None:
    actual = np.array([1.0, 2.0, 3.0, 2.5])
    assert scoring.covered(actual, np.full(4, 1.0), np.full(4, 2.0)).tolist() == [True, True, False, False]
    assert scoring.coverage(actual, actual, actual) == 0.0


def test_pinball_and_quantile_crps_agree_with_scoringrules(rng: np.random.Generator) -> None:
    actual, quantiles = rng.normal(size=(5, 3)), np.sort(rng.normal(size=(19, 5, 3)), axis=0)
    losses = scoring.pinball(actual, quantiles, LEVELS)
    for level, quantile, loss in zip(LEVELS, quantiles, losses, strict=True):
        np.testing.assert_allclose(loss, scoringrules.quantile_score(actual, quantile, level))
    expected = scoringrules.crps_quantile(actual, np.moveaxis(quantiles, 0, -1), np.array(LEVELS))
    np.testing.assert_allclose(scoring.crps_quantiles(actual, quantiles, LEVELS), expected)


def test_quantile_crps_of_a_point_is_its_absolute_error(rng: np.random.Generator) -> None:
    actual = rng.normal(size=9)
    np.testing.assert_allclose(scoring.crps_quantiles(actual, np.zeros((19, 9)), LEVELS), np.abs(actual))


def test_ensemble_crps_agrees_with_scoringrules_and_the_double_loop(rng: np.random.Generator) -> None:
    actual, paths = rng.normal(size=(4, 3)), rng.normal(size=(11, 4, 3))
    found = scoring.crps_ensemble(actual, paths)
    expected = scoringrules.crps_ensemble(actual, np.moveaxis(paths, 0, -1), estimator="fair")
    np.testing.assert_allclose(found, expected)
    assert found[2, 1] == pytest.approx(slow_fair_crps(actual[2, 1], paths[:, 2, 1].tolist()))


def test_ensemble_crps_does_not_depend_on_how_many_paths_are_drawn(rng: np.random.Generator) -> None:
    actual = rng.normal(size=40_000)
    expected = scoring.crps_gaussian(actual, np.ones_like(actual)).mean()
    for samples in (2, 8):
        found = scoring.crps_ensemble(actual, rng.normal(size=(samples, actual.size))).mean()
        assert found == pytest.approx(expected, abs=0.01)


def test_ensemble_crps_of_one_path_is_refused() -> None:
    with pytest.raises(ValueError, match="two paths or more, got 1"):
        scoring.crps_ensemble(np.zeros(3), np.zeros((1, 3)))


def test_gaussian_crps_agrees_with_scoringrules(rng: np.random.Generator) -> None:
    actual, sigma = rng.normal(size=(6, 5)), rng.uniform(0.1, 3, size=(6, 5))
    np.testing.assert_allclose(scoring.crps_gaussian(actual, sigma), scoringrules.crps_normal(actual, 0.0, sigma))


def test_gaussian_crps_without_spread_is_the_absolute_error() -> None:
    assert scoring.crps_gaussian(np.array([-0.3, 0.2]), np.zeros(2)).tolist() == [0.3, 0.2]


# -- volatility and the walk -----------------------------------------------------------------------


def test_ewma_volatility_agrees_with_pandas(rng: np.random.Generator) -> None:
    returns = rng.normal(size=300) * 0.01
    expected = np.sqrt(pd.Series(returns**2).ewm(alpha=1 - 0.94).mean())
    np.testing.assert_allclose(scoring.ewma_volatility(returns, 0.94), expected)


def test_ewma_volatility_does_not_know_the_future(rng: np.random.Generator) -> None:
    returns = rng.normal(size=50)
    changed = np.concatenate([returns[:30], rng.normal(size=20) * 9])
    before, after = scoring.ewma_volatility(returns, 0.9), scoring.ewma_volatility(changed, 0.9)
    assert (before[:30] == after[:30]).all()
    assert (before[30:] != after[30:]).all()


def test_walk_spreads_with_the_root_of_the_step() -> None:
    sigma = scoring.walk_sigma(np.array([0.01, 0.02]), 4)
    np.testing.assert_allclose(sigma[1], [0.02, 0.02 * 2**0.5, 0.02 * 3**0.5, 0.04])
    np.testing.assert_allclose(
        scoring.walk_quantiles(sigma, (0.1, 0.5, 0.9))[:, 0, 3], norm.ppf([0.1, 0.5, 0.9]) * 0.02
    )


# -- comparisons -----------------------------------------------------------------------------------


def test_paired_loss_is_negative_at_the_baseline_and_positive_when_it_worsens() -> None:
    naive, scale = np.full(4, 0.02), np.full(4, 0.01)
    assert scoring.paired_loss(0.9 * naive, naive, 0.9, scale) == pytest.approx(-0.03 * 0.9 * 2)
    assert scoring.paired_loss(-naive, naive, 0.9, scale) == pytest.approx((1 - 1.03 * 0.9) * 2)


def test_paired_loss_stays_finite_where_the_market_stood_still() -> None:
    assert np.isfinite(scoring.paired_loss(np.ones(1), np.ones(1), 1.0, np.zeros(1))).all()


def test_block_bootstrap_agrees_with_a_loop_over_draws(rng: np.random.Generator) -> None:
    top, bottom = rng.uniform(size=50), rng.uniform(1, 2, size=50)
    starts = np.random.default_rng(3).integers(50, size=(200, 7))
    ratios = []
    for draw in starts:
        rows = [(start + offset) % 50 for start in draw for offset in range(8)]
        ratios.append(top[rows].sum() / bottom[rows].sum())
    found = scoring.block_bootstrap(top, bottom, block=8, seed=3, draws=200)
    np.testing.assert_allclose(found, np.quantile(ratios, [0.025, 0.975]))


def test_block_bootstrap_of_equal_sums_is_exactly_one(rng: np.random.Generator) -> None:
    values = rng.uniform(size=100)
    assert scoring.block_bootstrap(values, values, block=10, seed=0) == (1.0, 1.0)


def test_block_bootstrap_skips_times_without_origins() -> None:
    counts = np.tile([1.0, 0, 0, 0, 0], 20)
    assert scoring.block_bootstrap(2 * counts, counts, block=3, seed=0) == (2.0, 2.0)


def test_block_bootstrap_of_three_blocks_claims_no_interval() -> None:
    assert scoring.block_bootstrap(np.ones(30), np.ones(30), block=10, seed=0) is None


def test_block_bootstrap_covers_the_mean_of_overlapping_errors(rng: np.random.Generator) -> None:
    def share_covered(block: int) -> float:
        intervals = [
            scoring.block_bootstrap(series, np.ones_like(series), block=block, seed=i, draws=400)
            for i, series in enumerate(overlapping)
        ]
        return float(np.mean([low <= 0 <= high for low, high in filter(None, intervals)]))

    def moving_sum(noise: Floats) -> Floats:
        return np.convolve(noise, np.ones(10), "valid")

    overlapping = [moving_sum(rng.normal(size=409)) for _ in range(150)]
    assert share_covered(20) > 0.85
    assert share_covered(1) < 0.6  # what treating them as independent would claim
