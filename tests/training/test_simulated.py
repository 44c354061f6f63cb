"""Simulated candles are candles, and behave as markets are known to (Cont 2001, "Empirical properties of asset
returns: stylized facts and statistical issues")."""

import numpy as np
import pytest

from models.candles import CLOSE, HIGH, LOW, OPEN, VOLUME, check_candles
from training.simulated import partly_simulated, simulate


@pytest.fixture(scope="module")
def markets():
    return simulate(64, 1000, np.random.default_rng(0))


@pytest.fixture(scope="module")
def returns(markets):
    """In standard deviations of their own market, `[64, 999]`."""
    moves = np.diff(np.log(markets[..., CLOSE]), axis=1)
    return moves / moves.std(axis=1, keepdims=True)


def correlation(values, lag):
    centred = values - values.mean(axis=1, keepdims=True)
    return ((centred[:, lag:] * centred[:, :-lag]).mean(axis=1) / (centred**2).mean(axis=1)).mean()


def test_simulated_candles_are_valid_and_a_function_of_the_seed(markets):
    for market in markets:
        check_candles(market)
    np.testing.assert_array_equal(simulate(64, 1000, np.random.default_rng(0)), markets)
    assert not np.array_equal(simulate(64, 1000, np.random.default_rng(1)), markets)


def test_volatility_clusters_and_reverts_while_returns_are_white(returns):
    assert abs(correlation(returns, 1)) < 0.02
    near, far = correlation(abs(returns), 1), correlation(abs(returns), 60)
    assert near > 0.08
    assert near > 3 * far
    assert np.median((returns**4).mean(axis=1)) > 4  # a Gaussian has 3
    assert abs(returns.mean()) < 0.02  # no drift


def test_falls_raise_the_volatility(returns):
    assert (returns[:, :-1] * abs(returns[:, 1:])).mean() < -0.01


def test_ranges_and_gaps_belong_to_the_returns(markets):
    logs = np.log(markets)
    variance = np.diff(logs[..., CLOSE], axis=1).var(axis=1)
    gaps = (logs[:, 1:, OPEN] - logs[:, :-1, CLOSE]).var(axis=1) / variance
    assert 0.15 < gaps.mean() < 0.3  # of 0 to 0.45
    ranges = ((logs[..., HIGH] - logs[..., LOW]) ** 2).mean(axis=1) / (4 * np.log(2)) / variance
    np.testing.assert_allclose((gaps + ranges).mean(), 1, atol=0.05)  # Parkinson 1980


def test_volume_follows_the_volatility(markets, returns):
    logs = np.log(markets[:, 1:, VOLUME])
    assert np.mean([np.corrcoef(*pair)[0, 1] for pair in zip(logs, abs(returns), strict=True)]) > 0.15


def test_a_share_of_the_windows_is_simulated_and_the_others_stay(markets):
    mixed = partly_simulated(markets[:10, :80], 0.4, np.random.default_rng(2))
    np.testing.assert_array_equal(mixed[4:], markets[4:10, :80])
    assert (mixed[:4] != markets[:4, :80]).all()
