"""Pooled, by step and by symbol: every metric against a loop, and what stands beside it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date

import numpy as np
import pytest
from scipy.stats import spearmanr

from models import scoring
from models.candles import CLOSE, Floats
from models.forecaster import ForecastInput, Sampling
from models.naive import NaiveForecaster
from tests.walk import WalkForecaster
from training import metrics
from training.baselines import GaussianForecaster, baseline, drift
from training.candle_files import Series
from training.evaluate import evaluate, summary
from training.scores import LEVELS, Scores
from training.windows import Origins, rolling_origins, split_by_dates

HORIZON, STRIDE = 12, 10
NAMES = {
    *("skill_vs_naive", "win_rate", "mae_log_return", "mae_pct_of_price", "mae_price", "rmse_log_return"),
    *("rmse_price", "mase", "bias", "crps", "crps_ratio_walk", "pinball", "rank_ic"),
    *("coverage_50", "coverage_80", "coverage_95"),
}


@pytest.fixture(scope="module")
def origins(samples: list[Series]) -> Origins:
    split = split_by_dates(date(2010, 1, 1), date(2011, 1, 1), horizon=HORIZON, unseen=["IBM"])
    return rolling_origins(samples, split, "test", stride=STRIDE, min_context=64)


@pytest.fixture(scope="module")
def drift_scores(samples: list[Series], origins: Origins) -> Scores:
    return evaluate(baseline("drift"), samples, origins, lookback=64)


def windows(samples: list[Series], origins: Origins) -> Iterator[tuple[str, float, list[float], list[float], float]]:
    """Symbol, last close, actual closes, the drift forecast's closes, mean move of a candle; one window at a time."""
    for index, origin in origins.pairs:
        closes = samples[index].candles[: origin + 1, CLOSE]
        rate = math.log(closes[-1] / closes[-64]) / 63
        forecast = [closes[-1] * math.exp(rate * step) for step in range(1, HORIZON + 1)]
        actual = samples[index].candles[origin + 1 : origin + 1 + HORIZON, CLOSE].tolist()
        moves = np.abs(np.diff(closes[-512:])).mean()
        yield samples[index].symbol, float(closes[-1]), actual, forecast, float(moves)


def test_every_metric_has_its_columns_and_its_interval(drift_scores: Scores) -> None:
    found = metrics.pooled(drift_scores)
    assert set(found) == NAMES
    for name, metric in found.items():
        assert metric.low is not None, name
        assert metric.high is not None, name
        assert metric.low <= metric.value <= metric.high, name
        assert (metric.naive is None) == (metric.walk is None) == (name == "rank_ic"), name
    assert metrics.pooled(drift_scores) == found


def test_pooled_metrics_agree_with_a_loop_over_windows(
    samples: list[Series], origins: Origins, drift_scores: Scores
) -> None:
    logs, prices, percents, scaled, wins = [], [], [], [], []
    for _, last, actual, forecast, moves in windows(samples, origins):
        logs.append([math.log(a / f) for a, f in zip(actual, forecast, strict=True)])
        prices.append([abs(a - f) for a, f in zip(actual, forecast, strict=True)])
        percents += [100 * error / last for error in prices[-1]]
        scaled += [error / moves for error in prices[-1]]
        mae, naive = np.mean(np.abs(logs[-1])), np.mean([abs(math.log(a / last)) for a in actual])
        wins.append(0.5 if abs(mae - naive) <= 1e-4 * naive else float(mae < naive))
    found = {name: metric.value for name, metric in metrics.pooled(drift_scores).items()}
    assert found["mae_log_return"] == pytest.approx(np.mean(np.abs(logs)))
    assert found["rmse_log_return"] == pytest.approx(math.sqrt(np.mean(np.square(logs))))
    assert found["bias"] == pytest.approx(np.mean(logs))
    assert found["mae_price"] == pytest.approx(np.mean(prices))
    assert found["rmse_price"] == pytest.approx(math.sqrt(np.mean(np.square(prices))))
    assert found["mae_pct_of_price"] == pytest.approx(np.mean(percents))
    assert found["mase"] == pytest.approx(np.mean(scaled))
    assert found["win_rate"] == pytest.approx(np.mean(wins))


def test_bands_and_levels_cover_what_a_loop_counts(drift_scores: Scores) -> None:
    moves, found = drift_scores.outcomes.moves, metrics.pooled(drift_scores)
    for percent, low, high in ((50, 0.25, 0.75), (80, 0.1, 0.9), (95, 0.025, 0.975)):
        inside = (drift_scores.quantile(low) <= moves) & (moves <= drift_scores.quantile(high))
        assert found[f"coverage_{percent}"].value == pytest.approx(inside.mean())
    for level, share in zip(LEVELS, drift_scores.below(), strict=True):
        assert share == pytest.approx((moves <= drift_scores.quantile(level)).mean())
    assert found["pinball"].value == pytest.approx(found["crps"].value / 2)  # it has no paths


def test_naive_beside_every_metric_is_what_the_naive_forecast_scores(samples: list[Series], origins: Origins) -> None:
    found = metrics.pooled(evaluate(NaiveForecaster(), samples, origins, lookback=64))
    assert set(found) == NAMES - {"rank_ic"}  # it ranks nothing
    for name, metric in found.items():
        assert metric.value == pytest.approx(metric.naive, rel=1e-12), name
    assert (found["skill_vs_naive"].value, found["win_rate"].value) == (0.0, 0.5)


def test_walk_beside_every_metric_is_what_the_ewma_baseline_scores(samples: list[Series], origins: Origins) -> None:
    for name, metric in metrics.pooled(evaluate(baseline("ewma"), samples, origins, lookback=4096)).items():
        assert metric.value == pytest.approx(metric.walk, abs=1e-12), name


# -- by step and by symbol -------------------------------------------------------------------------


def test_steps_average_to_the_pooled_score(drift_scores: Scores) -> None:
    steps, pooled = metrics.by_step(drift_scores), metrics.pooled(drift_scores)
    assert set(steps) == NAMES - {"win_rate"}
    for name in ("mae_log_return", "coverage_95", "crps", "mase", "bias"):
        assert steps[name].value.shape == (HORIZON,)
        assert steps[name].value.mean() == pytest.approx(pooled[name].value)
    for name, curve in steps.items():
        assert (curve.low <= curve.value).all(), name
        assert (curve.value <= curve.high).all(), name
    assert steps["rmse_price"].value[-1] > 2 * steps["rmse_price"].value[0]


def test_a_step_is_compared_with_naive_at_the_same_step(drift_scores: Scores) -> None:
    errors, naive = np.abs(drift_scores.errors), np.abs(drift_scores.naive_errors)
    for step, found in enumerate(metrics.by_step(drift_scores)["skill_vs_naive"].value):
        assert found == pytest.approx(scoring.skill_vs_naive(errors[:, step], naive[:, step]).value)


def test_symbols_are_what_each_would_be_alone(samples: list[Series], origins: Origins, drift_scores: Scores) -> None:
    together = metrics.by_symbol(drift_scores)
    index = next(i for i, item in enumerate(samples) if item.symbol == "MSFT")
    alone = Origins("test", HORIZON, tuple(pair for pair in origins.pairs if pair[0] == index))
    expected = metrics.pooled(evaluate(baseline("drift"), samples, alone, lookback=64))
    assert list(together) == sorted({str(symbol) for symbol in drift_scores.outcomes.symbols})
    assert "rank_ic" not in together["MSFT"]
    for name in NAMES - {"rank_ic"}:  # alone, times are ranked
        assert together["MSFT"][name].value == pytest.approx(expected[name].value), name
        assert together["MSFT"][name].low == pytest.approx(expected[name].low), name
        assert together["MSFT"][name].naive == pytest.approx(expected[name].naive), name


# -- ranks, bands, comparison ----------------------------------------------------------------------


def test_rank_ic_ranks_symbols_at_each_origin_where_there_are_five(drift_scores: Scores) -> None:
    facts = drift_scores.outcomes
    assert metrics.ranked(facts) == "symbols"
    forecast = np.round(np.log(drift_scores.point / facts.last_close[:, None]), 6)
    each = [
        spearmanr(forecast[rows, step], facts.moves[rows, step])[0]
        for time in np.unique(facts.origin_times)
        if len(rows := np.flatnonzero(facts.origin_times == time)) >= 5
        for step in range(HORIZON)
    ]
    assert metrics.pooled(drift_scores)["rank_ic"].value == pytest.approx(np.mean(each))


def test_rank_ic_ranks_times_where_symbols_are_few(samples: list[Series], origins: Origins) -> None:
    few = Origins("test", HORIZON, tuple(pair for pair in origins.pairs if samples[pair[0]].symbol in ("AAPL", "MSFT")))
    scores = evaluate(baseline("drift"), samples, few, lookback=64)
    facts = scores.outcomes
    assert metrics.ranked(facts) == "times"
    forecast = np.round(np.log(scores.point / facts.last_close[:, None]), 6)
    each = [
        spearmanr(forecast[rows, step], facts.moves[rows, step])[0]
        for symbol in ("AAPL", "MSFT")
        for rows in [np.flatnonzero(facts.symbols == symbol)]
        for step in range(HORIZON)
    ]
    assert metrics.pooled(scores)["rank_ic"].value == pytest.approx(np.mean(each))
    assert summary(scores).ranked == "times"


def test_too_few_paths_claim_no_95_percent_band(samples: list[Series], origins: Origins) -> None:
    few = Origins("test", HORIZON, origins.pairs[:20])
    for samples_drawn, there in ((38, False), (39, True)):
        scores = evaluate(WalkForecaster(with_paths=True), samples, few, lookback=64, sampling=Sampling(samples_drawn))
        assert ("coverage_95" in metrics.pooled(scores)) == there


def test_a_biased_model_is_worse_than_naive_and_a_seer_better(samples: list[Series], origins: Origins) -> None:
    few = Origins("test", HORIZON, origins.pairs[::3])

    def sentence(forecaster: GaussianForecaster) -> str:
        compared = summary(evaluate(forecaster, samples, few, lookback=64)).versus_naive
        assert compared is not None
        return compared.sentence

    by_last = {
        (int(item.timestamps[k]), item.candles[k, CLOSE]): (item, k) for item in samples for k in range(len(item))
    }

    def seer(closes: Floats, item: ForecastInput) -> tuple[Floats, Floats]:
        series, origin = by_last[int(item.timestamps[-1]), item.last_close]
        ahead = np.log(series.candles[origin + 1 : origin + 1 + HORIZON, CLOSE])
        return 0.5 * (ahead - closes[-1]), np.full(HORIZON, 0.01)

    assert sentence(GaussianForecaster(seer)) == "better than naive, p < 0.001"
    biased = GaussianForecaster(lambda closes, item: (np.full(HORIZON, 0.2), np.full(HORIZON, 0.01)))
    assert sentence(biased) == "worse than naive, p < 0.001"
    assert sentence(GaussianForecaster(lambda c, item: (np.zeros(HORIZON), drift(c, item)[1]))) == "equal to naive"


def test_comparison_averages_symbols_that_share_an_origin(drift_scores: Scores) -> None:
    facts, found = drift_scores.outcomes, metrics.versus_naive(drift_scores)
    times = np.unique(facts.origin_times)
    losses, naive = (
        np.array([np.abs(errors[facts.origin_times == time]).mean() for time in times])
        for errors in (drift_scores.errors, drift_scores.naive_errors)
    )
    expected = scoring.diebold_mariano(losses, naive, overlap=2)
    assert expected is not None
    assert found is not None
    assert (found.statistic, found.p_value) == (pytest.approx(expected.statistic), pytest.approx(expected.p_value))
    assert (found.times, found.degrees) == (len(times), expected.degrees)


def test_a_tuned_version_stands_beside_its_base_on_the_same_windows_alone(
    drift_scores: Scores, samples: list[Series], origins: Origins
) -> None:
    base = evaluate(baseline("ewma"), samples, origins, lookback=64)
    found = summary(drift_scores, base)
    alone = summary(base)
    for name, metric in alone.metrics.items():
        if name in found.metrics:
            assert found.metrics[name].base == pytest.approx(metric.value), name
    ratio = found.metrics["crps_ratio_base"]
    assert ratio.value == pytest.approx(drift_scores.crps.mean() / base.crps.mean())
    assert ratio.low is not None
    assert ratio.low < ratio.value
    losses, rival = np.abs(drift_scores.errors).mean(), np.abs(base.errors).mean()
    assert found.metrics["skill_vs_base"].value == pytest.approx(1 - losses / rival)
    assert found.versus_base is not None
    assert (found.versus_base.statistic > 0) == (losses > rival)
    itself = summary(base, base)
    assert (itself.metrics["crps_ratio_base"].low, itself.metrics["crps_ratio_base"].high) == (1, 1)
    assert itself.versus_base is not None
    assert itself.versus_base.sentence == "equal to base"


@pytest.mark.parametrize("change", [{"horizon": HORIZON - 4}, {"pairs": "earlier"}, {"pairs": "others"}])
def test_horizon_mismatch_and_other_origins_are_refused(
    drift_scores: Scores, samples: list[Series], origins: Origins, change: dict[str, object]
) -> None:
    """As many windows, of another horizon, shifted by a candle, or of another symbol at the same times."""
    apple, microsoft = (next(k for k, item in enumerate(samples) if item.symbol == name) for name in ("AAPL", "MSFT"))
    pairs = {
        "earlier": tuple((index, origin - 1) for index, origin in origins.pairs),
        "others": tuple((microsoft if index == apple else index, origin) for index, origin in origins.pairs),
    }
    other = replace(origins, **{name: pairs.get(str(value), value) for name, value in change.items()})
    with pytest.raises(ValueError, match="compare only on the same windows"):
        summary(drift_scores, evaluate(baseline("ewma"), samples, other, lookback=64))


def test_a_symbol_that_never_moves_is_left_out(make_series: Callable[..., Series]) -> None:
    rng = np.random.default_rng(2)
    series = [make_series("FLAT", np.full(200, 5.0)), make_series("MOVES", np.exp(rng.normal(size=200)))]
    pairs = tuple((index, origin) for index in (0, 1) for origin in range(80, 190, 5))
    scores = evaluate(NaiveForecaster(), series, Origins("test", 5, pairs), lookback=64, calendar="24/7")
    assert list(metrics.by_symbol(scores)) == ["MOVES"]
    assert metrics.pooled(scores)["mase"].value > 0
