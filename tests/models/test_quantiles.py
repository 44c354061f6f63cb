"""Paths to quantiles and points, each aggregate against a slow oracle in plain Python."""

import math
import statistics
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from models.candles import Floats
from models.quantiles import parse_aggregate, path_quantiles, unreachable_levels


def coverage(bands: tuple[Floats, Floats], truth: Floats) -> float:
    return float(((bands[0] <= truth) & (truth <= bands[1])).mean())


def test_an_80_percent_band_of_32_paths_covers_80_percent_of_the_truth() -> None:
    rng = np.random.default_rng(5)
    paths, truth = rng.standard_normal((32, 40_000)), rng.standard_normal(40_000)
    low, high = path_quantiles(paths, (0.1, 0.9))
    assert coverage((low, high), truth) == pytest.approx(0.80, abs=0.01)  # 3.3 of 33 interpolates: 0.807


def test_default_plotting_positions_would_cover_five_points_less() -> None:
    rng = np.random.default_rng(5)
    paths, truth = rng.standard_normal((32, 40_000)), rng.standard_normal(40_000)
    low, high = np.quantile(paths, (0.1, 0.9), axis=0)
    assert coverage((low, high), truth) < 0.765


@pytest.mark.parametrize("level", [0.05, 0.25, 0.5, 0.75, 0.95])
def test_each_level_is_exceeded_as_often_as_it_says_for_any_distribution(level: float) -> None:
    rng = np.random.default_rng(6)
    paths, truth = rng.standard_t(2, (32, 40_000)), rng.standard_t(2, 40_000)
    assert (truth <= path_quantiles(paths, (level,))[0]).mean() == pytest.approx(level, abs=0.01)


def weibull(values: list[float], level: float) -> float:
    """Interpolate between the sorted values at plotting positions i / (S + 1)."""
    ordered = sorted(values)
    position = min(max(level * (len(ordered) + 1), 1), len(ordered))
    below = min(math.floor(position), len(ordered) - 1)
    return (
        ordered[below - 1] + (position - below) * (ordered[below] - ordered[below - 1])
        if len(ordered) > 1
        else ordered[0]
    )


def trimmed(values: list[float], low: float, high: float) -> float:
    """`low` and `high` in whole percent."""
    count = len(values)
    return statistics.fmean(sorted(values)[count * round(low) // 100 : count - count * round(high) // 100])


std = statistics.pstdev
mean = statistics.fmean

ORACLES: dict[str, Callable[[list[float]], float]] = {
    "mean": mean,
    "median": statistics.median,
    "p10": lambda v: weibull(v, 0.1),
    "p05": lambda v: weibull(v, 0.05),
    "p99": lambda v: weibull(v, 0.99),
    "quantile_0.37": lambda v: weibull(v, 0.37),
    "trimmed_mean_10": lambda v: trimmed(v, 10, 10),
    "trimmed_mean_29": lambda v: trimmed(v, 29, 29),
    "trimmed_mean_0": mean,
    "lower_trimmed_mean_20": lambda v: trimmed(v, 20, 0),
    "upper_trimmed_mean_20": lambda v: trimmed(v, 0, 20),
    "mean_plus_std_1.5": lambda v: mean(v) + 1.5 * std(v),
    "mean_minus_std_2": lambda v: mean(v) - 2 * std(v),
    "mean_quantile_mix_0.25_0.7": lambda v: 0.7 * mean(v) + 0.3 * weibull(v, 0.25),
    "quantile_plus_std_0.4_0.5": lambda v: weibull(v, 0.4) + 0.5 * std(v),
}


@pytest.mark.parametrize("spec", ORACLES)
@given(values=st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=100))
def test_every_aggregate_agrees_with_its_slow_oracle(spec: str, values: list[float]) -> None:
    assert float(parse_aggregate(spec)(np.array(values))) == pytest.approx(ORACLES[spec](values), abs=1e-7)


@pytest.mark.parametrize("percent", [1, 29])
def test_29_percent_of_100_paths_are_29_paths(percent: int) -> None:
    paths = np.arange(100.0) ** 2
    kept = np.arange(percent, 100 - percent)
    assert parse_aggregate(f"trimmed_mean_{percent}")(paths) == pytest.approx((kept**2).mean())


@pytest.mark.parametrize("spec", ORACLES)
def test_an_aggregate_keeps_every_axis_but_the_first(spec: str) -> None:
    paths = np.random.default_rng(0).normal(size=(16, 64, 5))  # fewer paths than steps: the axis is not guessed
    whole = parse_aggregate(spec)(paths)
    assert whole.shape == (64, 5)
    assert whole[3, 2] == pytest.approx(float(parse_aggregate(spec)(paths[:, 3, 2])))


@given(arrays(np.float64, (9, 3), elements=st.floats(-1e6, 1e6)))
def test_quantiles_rise_with_their_level_and_stay_among_the_paths(paths: Floats) -> None:
    found = path_quantiles(paths, (0.01, 0.2, 0.5, 0.8, 0.99))
    slack = 1e-9 * (1 + np.abs(paths).max())
    assert (np.diff(found, axis=0) >= -slack).all()
    assert (found >= paths.min(axis=0) - slack).all()
    assert (found <= paths.max(axis=0) + slack).all()


@pytest.mark.parametrize(
    "spec",
    [
        "",
        "Mean",
        "mean ",
        "mode",
        "p",
        "p0",
        "p100",
        "p-5",
        "quantile_0",
        "quantile_1",
        "quantile_1.2",
        "quantile_",
        "trimmed_mean",
        "trimmed_mean_50",
        "trimmed_mean_-1",
        "mean_plus_std",
        "mean_quantile_mix_0.5",
        "mean_quantile_mix_2_0.5",
        "quantile_plus_std_0_1",
        "quantile_0.5\n",
        "__import__",
    ],
)
def test_a_spec_that_means_nothing_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r"aggregate|level|trim"):
        parse_aggregate(spec)


def test_the_refusal_lists_what_would_be_accepted() -> None:
    with pytest.raises(ValueError, match=r"'mode'.*mean, median, pNN.*trimmed_mean_PERCENT"):
        parse_aggregate("mode")


@pytest.mark.parametrize(
    ("levels", "samples", "unreachable"),
    [
        ((0.1, 0.5, 0.9), 32, []),
        ((0.01, 0.1, 0.99), 32, [0.01, 0.99]),
        ((0.1, 0.9), 9, []),  # exactly 1 / (S + 1): the smallest path itself
        ((0.1, 0.9), 8, [0.1, 0.9]),
        ((0.5,), 1, []),
    ],
)
def test_levels_beyond_the_paths_are_named(levels: tuple[float, ...], samples: int, unreachable: list[float]) -> None:
    assert unreachable_levels(levels, samples) == unreachable


@pytest.mark.parametrize(
    "spec", ["mean_plus_std_11", "mean_minus_std_500", "mean_quantile_mix_0.9_2", "quantile_plus_std_0.5_99"]
)
def test_aggregates_out_of_proportion_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r"more than 10|above 1"):
        parse_aggregate(spec)
