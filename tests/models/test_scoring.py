import math

import numpy as np
import pandas as pd
import pytest
import scoringrules
from scipy.stats import norm, spearmanr, t
from utilsforecast import losses

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
    assert scoring.mae_log_return(actual, forecast).value == pytest.approx((math.log(1.1) - math.log(0.9)) / 2)
    assert scoring.mae_price(actual, forecast).value == 10.0
    assert scoring.mae_pct_of_price(actual, forecast, last).value == pytest.approx(15.0)
    assert scoring.bias(actual, forecast).value == pytest.approx((math.log(1.1) + math.log(0.9)) / 2)


def test_squared_errors_equal_hand_computed_values() -> None:
    actual, forecast = np.array([110.0, 80.0]), np.array([100.0, 100.0])
    assert scoring.rmse_price(actual, forecast).value == pytest.approx(math.sqrt((100 + 400) / 2))
    assert scoring.rmse_log_return(actual, forecast).value == pytest.approx(
        math.sqrt((math.log(1.1) ** 2 + math.log(0.8) ** 2) / 2)
    )


def test_price_errors_agree_with_utilsforecast(rng: np.random.Generator) -> None:
    closes = 100 * np.exp(np.cumsum(rng.normal(size=60) * 0.02))
    past, actual, forecast = closes[:50], closes[50:], closes[50:] * np.exp(rng.normal(size=10) * 0.01)
    frame = pd.DataFrame({"unique_id": "A", "ds": range(10), "y": actual, "model": forecast})
    before = pd.DataFrame({"unique_id": "A", "ds": range(-50, 0), "y": past})
    scale = scoring.one_step_naive(past)[-1:]
    expected = losses.mase(frame, ["model"], seasonality=1, train_df=before)["model"][0]
    assert scoring.mase(actual, forecast, scale).value == pytest.approx(expected)
    assert scoring.rmse_price(actual, forecast).value == pytest.approx(losses.rmse(frame, ["model"])["model"][0])
    assert scoring.mae_price(actual, forecast).value == pytest.approx(losses.mae(frame, ["model"])["model"][0])


def test_scale_of_the_mase_knows_512_candles_and_no_future(rng: np.random.Generator) -> None:
    closes = rng.uniform(1, 2, size=600)
    found = scoring.one_step_naive(closes)
    assert math.isnan(found[0])
    for last in (1, 7, 511, 512, 599):
        assert found[last] == pytest.approx(np.abs(np.diff(closes[max(0, last - 511) : last + 1])).mean())
    np.testing.assert_array_equal(found[:300], scoring.one_step_naive(closes[:300]))


def test_units_prices_scale_price_errors_alone(rng: np.random.Generator) -> None:
    """1.0 is one per cent in `mae_pct_of_price`, and nothing but the price errors knows the currency."""
    last, actual = np.full(9, 50.0), 50 * np.exp(rng.normal(size=9) * 0.02)
    forecast, scale = np.full(9, 50.5), np.full(9, 0.4)
    for price in (scoring.mae_price, scoring.rmse_price):
        assert price(100 * actual, 100 * forecast).value == pytest.approx(100 * price(actual, forecast).value)
    for free in (scoring.mae_log_return, scoring.rmse_log_return, scoring.bias):
        assert free(100 * actual, 100 * forecast).value == pytest.approx(free(actual, forecast).value)
    for scaled in (scoring.mae_pct_of_price, scoring.mase):
        divisor = last if scaled is scoring.mae_pct_of_price else scale
        found = scaled(100 * actual, 100 * forecast, 100 * divisor).value
        assert found == pytest.approx(scaled(actual, forecast, divisor).value)
    assert scoring.mae_pct_of_price(np.array([101.0]), np.array([100.0]), np.array([100.0])).value == pytest.approx(1.0)


def test_bias_is_positive_where_forecasts_were_too_low() -> None:
    assert scoring.bias(np.array([2.0]), np.array([1.0])).value > 0


def test_skill_of_the_naive_forecast_is_exactly_zero(rng: np.random.Generator) -> None:
    errors = rng.normal(size=(50, 7))
    assert scoring.skill_vs_naive(errors, errors).value == 0.0


def test_skill_is_one_minus_the_relative_error() -> None:
    assert scoring.skill_vs_naive(np.array([-1.0, 1.0]), np.array([2.0, -2.0])).value == 0.5
    assert scoring.skill_vs_naive(np.array([3.0]), np.array([2.0])).value == -0.5


def test_skill_is_undefined_where_naive_was_never_wrong() -> None:
    assert math.isnan(scoring.skill_vs_naive(np.array([0.0]), np.array([0.0])).value)


def test_horizon_mismatch_is_refused(rng: np.random.Generator) -> None:
    """One step of a model beside 64 of the naive forecast is how 60 % of improvement comes from nothing."""
    one_step, all_steps = rng.normal(size=(20, 1)), rng.normal(size=(20, 64))
    with pytest.raises(ValueError, match="compare equal horizons"):
        scoring.skill_vs_naive(one_step, all_steps)
    with pytest.raises(ValueError, match="compare equal horizons"):
        scoring.win_rate(one_step, all_steps)
    with pytest.raises(ValueError, match="compare equal horizons"):
        scoring.diebold_mariano(one_step[:, 0], all_steps[0], overlap=1)


def test_a_window_is_won_by_the_smaller_error_and_shared_where_rounding_decides() -> None:
    naive = np.array([[2.0, -2.0]] * 4)
    errors = np.array([[1.0, 1.0], [3.0, -3.0], [-2.0, 2.0], [2.0 + 1e-5, 2.0]])
    assert scoring.win_rate(errors, naive).tops[:, 0].tolist() == [1.0, 0.0, 0.5, 0.5]
    assert scoring.win_rate(errors, naive).value == 0.5


# -- ranks -----------------------------------------------------------------------------------------


def rank_ic(forecast: Floats, actual: Floats, groups: np.ndarray) -> Floats:
    found = scoring.rank_ic(forecast, actual, groups)
    return np.asarray(found.tops.sum(axis=0) / found.bottoms.sum(axis=0))


def test_rank_ic_is_the_mean_spearman_correlation_of_the_groups(rng: np.random.Generator) -> None:
    groups = rng.permutation(np.repeat([0, 1, 2], [5, 9, 30]))
    actual = rng.normal(size=(44, 3))
    forecast = np.round(actual + rng.normal(size=(44, 3)), 0)  # with ties
    each = [[spearmanr(forecast[groups == g, h], actual[groups == g, h])[0] for h in range(3)] for g in range(3)]
    np.testing.assert_allclose(rank_ic(forecast, actual, groups), np.mean(each, axis=0))


def test_rank_ic_has_the_sign_of_the_forecast(rng: np.random.Generator) -> None:
    actual, groups = rng.normal(size=(12, 1)), np.zeros(12, dtype=np.int64)
    assert rank_ic(3 * actual + 1, actual, groups) == pytest.approx(1)
    assert rank_ic(-actual, actual, groups) == pytest.approx(-1)


def test_forecasts_that_differ_by_rounding_rank_nothing(rng: np.random.Generator) -> None:
    actual, groups = rng.normal(size=(40, 2)), np.repeat([0, 1], 20)
    forecast = np.concatenate([actual[:20], rng.normal(size=(20, 2)) * 1e-8])
    assert rank_ic(forecast, actual, groups) == pytest.approx(1)
    assert not scoring.rank_ic(forecast[20:], actual[20:], groups[20:]).bottoms.any()


def test_a_group_of_four_ranks_nothing(rng: np.random.Generator) -> None:
    values = rng.normal(size=(4, 2))
    assert not scoring.rank_ic(values, values, np.zeros(4, dtype=np.int64)).bottoms.any()


# -- distributions ---------------------------------------------------------------------------------


def test_band_holds_its_edges_and_a_point_covers_nothing() -> None:
    actual = np.array([1.0, 2.0, 3.0, 2.5])
    assert scoring.covered(actual, np.full(4, 1.0), np.full(4, 2.0)).tolist() == [True, True, False, False]
    assert scoring.coverage(actual, actual, actual).value == 0.0


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


def test_columns_of_the_bootstrap_are_what_each_would_be_alone(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    top, bottom = rng.uniform(size=(60, 3)), rng.uniform(1, 2, size=(60, 3))
    bottom[:, 1] = 0
    monkeypatch.setattr(scoring, "_AT_ONCE", 1000)  # several pieces
    found = scoring.block_bootstraps(top, bottom, block=7, seed=5, draws=300)
    assert found is not None
    for column in (0, 2):
        alone = scoring.block_bootstrap(top[:, column], bottom[:, column], block=7, seed=5, draws=300)
        np.testing.assert_allclose(found[:, column], alone)
    assert np.isnan(found[:, 1]).all()


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


# -- Diebold and Mariano ---------------------------------------------------------------------------


def overlapping_losses(rng: np.random.Generator, times: int, overlap: int) -> Floats:
    """Losses whose means over `overlap` origins share all targets but one, around 3."""
    return 3 + np.convolve(rng.normal(size=times + overlap - 1), np.ones(overlap), "valid") / overlap


def test_sign_of_diebold_mariano_is_positive_for_the_worse_forecast(rng: np.random.Generator) -> None:
    """A statistic of +11 was once read as a significant improvement."""
    small, large = rng.uniform(1, 2, size=200), rng.uniform(2, 3, size=200)
    worse, better = (scoring.diebold_mariano(a, b, overlap=1) for a, b in ((large, small), (small, large)))
    assert worse is not None
    assert better is not None
    assert worse.statistic == pytest.approx(-better.statistic)
    assert worse.statistic > 10
    assert (worse.sentence(), better.sentence()) == ("worse than naive, p < 0.001", "better than naive, p < 0.001")


def test_diebold_mariano_agrees_with_a_loop_over_cosines(rng: np.random.Generator) -> None:
    first, second = overlapping_losses(rng, 100, 4), overlapping_losses(rng, 100, 4)
    found = scoring.diebold_mariano(first, second, overlap=4)
    differences = first - second
    squares = []
    for j in range(1, 9):
        total = sum(d * math.cos(math.pi * j * (i + 0.5) / 100) for i, d in enumerate(differences))
        squares.append(2 / 100 * total**2)
    statistic = differences.mean() / math.sqrt(np.mean(squares) / 100)
    assert found is not None
    assert (found.times, found.degrees, found.statistic) == (100, 8, pytest.approx(statistic))
    assert found.p_value == pytest.approx(2 * t.sf(abs(statistic), 8))


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 31])
def test_p_values_are_those_of_student(degrees: int) -> None:
    for bound in (0.0, 0.3, 1.0, 2.5, 8.0):
        assert scoring._t_within(bound, degrees) == pytest.approx(1 - 2 * t.sf(bound, degrees))


@pytest.mark.parametrize(("times", "overlap"), [(60, 1), (30, 4), (260, 64)])
def test_size_of_diebold_mariano_stays_near_nominal_where_horizons_overlap(times: int, overlap: int) -> None:
    rng = np.random.default_rng(times)
    pairs = [(overlapping_losses(rng, times, overlap), overlapping_losses(rng, times, overlap)) for _ in range(1500)]
    found = [scoring.diebold_mariano(first, second, overlap=overlap) for first, second in pairs]
    rejected = np.mean([each.p_value < 0.05 for each in found if each])
    assert len([each for each in found if each]) == 1500
    assert 0.03 < rejected < 0.08  # of independent origins the plain t test would reject most of the last


def test_diebold_mariano_finds_a_difference_through_the_overlap(rng: np.random.Generator) -> None:
    found = [
        scoring.diebold_mariano(overlapping_losses(rng, 200, 10) + 0.5, overlapping_losses(rng, 200, 10), overlap=10)
        for _ in range(100)
    ]
    assert np.mean([each is not None and each.p_value < 0.05 and each.statistic > 0 for each in found]) > 0.8


def test_diebold_mariano_has_a_variance_where_a_truncated_kernel_has_none() -> None:
    differences = np.tile([1.0, -1.0, 0.5, -1.0, 1.0], 8) + np.arange(40) * 1e-3
    centred = differences - differences.mean()
    covariances = [np.sum(centred[lag:] * centred[: 40 - lag]) / 40 for lag in range(2)]
    assert covariances[0] + 2 * covariances[1] < 0
    found = scoring.diebold_mariano(5 + differences, np.full(40, 5.0), overlap=2)
    assert found is not None
    assert math.isfinite(found.statistic)
    assert 0 <= found.p_value <= 1


def test_losses_that_differ_by_rounding_are_equal(rng: np.random.Generator) -> None:
    naive = rng.uniform(1, 2, size=50)
    found = scoring.diebold_mariano(naive * (1 + rng.normal(size=50) * 1e-6), naive, overlap=1)
    assert found is not None
    assert (found.statistic, found.p_value, found.sentence()) == (0.0, 1.0, "equal to naive")


def test_an_undecided_comparison_says_so() -> None:
    found = scoring.DieboldMariano(statistic=1.2, p_value=0.25, times=60, degrees=6)
    assert found.sentence() == "undecided, p = 0.250"


def test_windows_that_overlap_throughout_are_too_few_to_compare(rng: np.random.Generator) -> None:
    first, second = rng.normal(size=(2, 39))
    assert scoring.diebold_mariano(first, second, overlap=10) is None
    assert scoring.diebold_mariano(np.full(20, 3.0), np.full(20, 2.0), overlap=1) is None  # no variance at all
