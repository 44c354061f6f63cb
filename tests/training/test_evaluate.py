import math
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from statistics import NormalDist

import numpy as np
import pytest

from models import scoring
from models.candles import CLOSE, DAY_MS, Floats
from models.forecaster import Forecaster, Sampling
from models.naive import NaiveForecaster
from tests.walk import WalkForecaster
from training.candle_files import Series
from training.evaluate import baselines, calendars_of, evaluate, gathered, pieces, predict, side_by_side, summary
from training.outcomes import outcomes
from training.scores import LEVELS, Scores
from training.windows import Origins, Split, rolling_origins, split_by_dates

HORIZON = 20


@pytest.fixture(scope="session")
def sample_origins(samples: list[Series]) -> Origins:
    split = split_by_dates(date(2010, 1, 1), date(2011, 1, 1), horizon=HORIZON, unseen=["IBM"])
    return rolling_origins(samples, split, "test", stride=3, min_context=64)


@pytest.fixture(scope="session")
def naive_scores(samples: list[Series], sample_origins: Origins) -> Scores:
    return evaluate(NaiveForecaster(), samples, sample_origins, lookback=64)


@pytest.fixture
def simulated(make_series: Callable[..., Series]) -> tuple[list[Series], Origins]:
    """Independent random walks of constant volatility, and origins whose horizons do not overlap."""
    rng = np.random.default_rng(11)
    series = [make_series(f"S{i}", 100 * np.exp(np.cumsum(rng.normal(size=2200) * 0.01))) for i in range(8)]
    split = Split(12_100 * DAY_MS, 12_200 * DAY_MS, horizon=HORIZON)
    return series, rolling_origins(series, split, "test", stride=HORIZON, min_context=100)


def scaled(series: list[Series], origins: Origins, factor: float) -> list[Series]:
    """`series` with every candle after the last origin of each multiplied."""
    last = {index: max(o for i, o in origins.pairs if i == index) for index, _ in origins.pairs}
    grown = list(series)
    for index, origin in last.items():
        candles = series[index].candles.copy()
        candles[origin + 1 :] *= factor
        grown[index] = replace(series[index], candles=candles)
    return grown


# -- against known truths --------------------------------------------------------------------------


@pytest.mark.parametrize(("with_paths", "estimator"), [(True, "ensemble"), (False, "quantiles")])
def test_a_perfect_walk_scores_the_walks_crps_and_covers_its_band(
    simulated: tuple[list[Series], Origins], with_paths: bool, estimator: str
) -> None:
    series, origins = simulated
    forecaster = WalkForecaster(with_paths=with_paths)
    scores = evaluate(forecaster, series, origins, sampling=Sampling(samples=64), lookback=512, calendar="24/7")
    found = summary(scores)
    assert (found.crps_estimator, found.samples) == (estimator, 64 if with_paths else None)
    assert found.metrics["crps_ratio_walk"].value == pytest.approx(1.0, abs=0.01 if with_paths else 1e-9)
    assert found.metrics["coverage_80"].value == pytest.approx(0.8, abs=0.02)
    assert found.metrics["coverage_80"].walk == pytest.approx(0.8, abs=0.02)
    assert found.metrics["skill_vs_naive"].value == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("with_paths", [True, False])
@pytest.mark.parametrize(("spread", "covers"), [(0.5, 0.48), (2.0, 0.99)])
def test_a_wrong_spread_shows_in_crps_and_coverage(
    simulated: tuple[list[Series], Origins], with_paths: bool, spread: float, covers: float
) -> None:
    series, origins = simulated
    forecaster = WalkForecaster(with_paths=with_paths, spread=spread)
    found = summary(evaluate(forecaster, series, origins, sampling=Sampling(64), lookback=512, calendar="24/7"))
    ratio = found.metrics["crps_ratio_walk"]
    assert ratio.low is not None
    assert ratio.low > 1.02
    assert found.metrics["coverage_80"].value == pytest.approx(covers, abs=0.03)


def test_naive_has_exactly_no_skill_and_no_coverage(naive_scores: Scores) -> None:
    metrics = summary(naive_scores).metrics
    skill, coverage = metrics["skill_vs_naive"], metrics["coverage_80"]
    assert (skill.value, skill.naive, skill.low, skill.high) == (0.0, 0.0, 0.0, 0.0)
    assert (coverage.value, coverage.naive) == (0.0, 0.0)
    for name in ("mae_log_return", "mae_price", "crps", "crps_ratio_walk"):
        assert metrics[name].value == pytest.approx(metrics[name].naive, rel=1e-12)


def test_metrics_agree_with_a_loop_over_origins(samples: list[Series], sample_origins: Origins) -> None:
    scores = evaluate(WalkForecaster(with_paths=False, spread=1.3), samples, sample_origins, lookback=200)
    logs, prices, hits, crps = [], [], [], []
    for index, origin in sample_origins.pairs:
        closes = samples[index].candles[:, CLOSE]
        history = scoring.log_returns(closes[max(0, origin - 199) : origin + 1])
        sigma = 1.3 * scoring.ewma_volatility(history, 0.94)[-1]
        for step in range(1, HORIZON + 1):
            move = math.log(closes[origin + step] / closes[origin])
            edge = 1.2815515655446004 * sigma * math.sqrt(step)
            hits.append(abs(move) <= edge)
            logs.append(abs(move))
            prices.append(abs(closes[origin + step] - closes[origin]))
            quantiles = [NormalDist(0, sigma * math.sqrt(step)).inv_cdf(level) for level in LEVELS]
            losses = [max(q * (move - x), (q - 1) * (move - x)) for q, x in zip(LEVELS, quantiles, strict=True)]
            crps.append(2 * sum(losses) / len(losses))
    metrics = summary(scores).metrics
    assert metrics["mae_log_return"].value == pytest.approx(np.mean(logs))
    assert metrics["mae_price"].value == pytest.approx(np.mean(prices))
    assert metrics["coverage_80"].value == pytest.approx(np.mean(hits))
    assert metrics["crps"].value == pytest.approx(np.mean(crps))


def test_intervals_hold_their_values(samples: list[Series], sample_origins: Origins) -> None:
    scores = evaluate(WalkForecaster(with_paths=True, spread=1.2), samples, sample_origins, lookback=64)
    for name, metric in summary(scores).metrics.items():
        assert metric.low is not None, name
        assert metric.high is not None, name
        assert metric.low <= metric.value <= metric.high, name
    assert summary(scores) == summary(scores)


# -- honesty ---------------------------------------------------------------------------------------


def test_a_forecaster_sees_nothing_after_its_origin(samples: list[Series], sample_origins: Origins) -> None:
    last = Origins("test", HORIZON, tuple({index: (index, origin) for index, origin in sample_origins.pairs}.values()))
    plain, moved = WalkForecaster(with_paths=True), WalkForecaster(with_paths=True)
    before = evaluate(plain, samples, last, lookback=64)
    after = evaluate(moved, scaled(samples, last, 3.0), last, lookback=64)
    for first, second in zip(plain.seen, moved.seen, strict=True):
        assert (first.candles == second.candles).all()
        assert first.timestamps[-1] < first.future_timestamps[0]
    assert (before.point == after.point).all()
    assert (before.outcomes.walk_sigma == after.outcomes.walk_sigma).all()
    np.testing.assert_allclose(after.outcomes.moves - before.outcomes.moves, math.log(3))


def test_lookback_limits_the_context(samples: list[Series], sample_origins: Origins) -> None:
    forecaster = WalkForecaster(with_paths=False)
    evaluate(forecaster, samples, sample_origins, lookback=70)
    assert {len(item.candles) for item in forecaster.seen} <= set(range(64, 71))
    assert max(len(item.candles) for item in forecaster.seen) == 70


@pytest.mark.parametrize("batch_rows", [1, 7, 1000])
def test_scores_do_not_depend_on_the_batches(samples: list[Series], sample_origins: Origins, batch_rows: int) -> None:
    few = Origins("test", HORIZON, sample_origins.pairs[:60:4] + sample_origins.pairs[-40::4])
    by_five = evaluate(WalkForecaster(with_paths=True), samples, few, lookback=500, batch_rows=5)
    other = evaluate(WalkForecaster(with_paths=True), samples, few, lookback=500, batch_rows=batch_rows)
    assert (by_five.crps == other.crps).all()
    assert (by_five.pinball == other.pinball).all()


@pytest.mark.parametrize("family", ["toto", "kronos"])
def test_pieces_give_the_same_bits_whatever_their_size_and_order(
    family: str, samples: list[Series], sample_origins: Origins, build_tiny: Callable[..., Forecaster]
) -> None:
    few = replace(sample_origins, horizon=8, pairs=sample_origins.pairs[100:105] + sample_origins.pairs[-8:])
    forecaster, sampling = build_tiny(family), Sampling(samples=4)
    whole = evaluate(forecaster, samples, few, sampling=sampling, lookback=64)
    calendars = calendars_of(samples, few)
    backwards = [predict(forecaster, samples, calendars, piece, 64, sampling) for piece in reversed(pieces(few, 3))]
    found = gathered(whole.outcomes, backwards[::-1])
    assert (found.samples, found.estimator) == (whole.samples, whole.estimator)
    for name in ("point", "quantiles", "crps"):
        assert getattr(found, name).tobytes() == getattr(whole, name).tobytes(), name


def test_every_origin_has_its_own_seed(samples: list[Series], sample_origins: Origins) -> None:
    forecaster = WalkForecaster(with_paths=True)
    evaluate(forecaster, samples, sample_origins, lookback=64)
    assert len({item.seed for item in forecaster.seen}) == len(sample_origins)


def test_progress_hears_of_every_origin(samples: list[Series], sample_origins: Origins) -> None:
    heard: list[int] = []
    evaluate(NaiveForecaster(), samples, sample_origins, lookback=64, batch_rows=10, progress=heard.append)
    assert sum(heard) == len(sample_origins)
    assert max(heard) == 10


def test_side_by_side_judges_all_on_the_same_outcomes(samples: list[Series], sample_origins: Origins) -> None:
    few = Origins("test", HORIZON, sample_origins.pairs[:50])
    entrants = {
        "naive": (NaiveForecaster(), 64, Sampling(), "median"),
        "walk": (WalkForecaster(with_paths=True), 200, Sampling(samples=16), "median"),
    }
    found = side_by_side(entrants, samples, few)
    assert list(found) == ["naive", "walk"]
    assert (found["naive"].outcomes.actual == found["walk"].outcomes.actual).all()
    assert (found["naive"].samples, found["walk"].samples) == (None, 16)


def test_hourly_candles_with_weekends_are_evaluated(eurusd: Series) -> None:
    split = Split(eurusd.timestamps[3000], eurusd.timestamps[3500], horizon=30)
    origins = rolling_origins([eurusd], split, "test", stride=50, min_context=64)
    found = summary(evaluate(NaiveForecaster(), [eurusd], origins, lookback=64))
    assert (found.interval, found.origins, found.metrics["skill_vs_naive"].value) == ("1h", len(origins), 0.0)


# -- refusals --------------------------------------------------------------------------------------


def test_no_origin_is_refused(samples: list[Series]) -> None:
    with pytest.raises(ValueError, match="the unseen part has no origin"):
        evaluate(NaiveForecaster(), samples, Origins("unseen", 5, ()), lookback=64)


def test_two_intervals_in_one_evaluation_are_refused(samples: list[Series], eurusd: Series) -> None:
    with pytest.raises(ValueError, match="1d, 1h"):
        outcomes([samples[0], eurusd], Origins("test", 5, ((0, 100), (1, 100))))


def test_an_origin_without_a_past_is_refused(samples: list[Series]) -> None:
    with pytest.raises(ValueError, match="candle before it"):
        outcomes(samples, Origins("test", 5, ((0, 0),)))


def test_a_market_that_never_moves_is_refused(make_series: Callable[..., Series]) -> None:
    series = [make_series("FLAT", np.full(200, 5.0))]
    scores = evaluate(NaiveForecaster(), series, Origins("test", 5, ((0, 100), (0, 120))), lookback=64)
    with pytest.raises(ValueError, match="never moves"):
        summary(scores)
    assert baselines(scores) == ()


def test_few_origins_claim_no_interval(samples: list[Series], sample_origins: Origins) -> None:
    scores = evaluate(NaiveForecaster(), samples, Origins("test", HORIZON, sample_origins.pairs[:4]), lookback=64)
    assert summary(scores).metrics["mae_log_return"].low is None


# -- the drift baseline ---------------------------------------------------------------------------


def slow_block_means(scores: Scores, symbol: str, group: int, rho0: float) -> list[float]:
    blocks: dict[int, list[float]] = {}
    facts = scores.outcomes
    steps, length = ((range(8), 24), (range(8, HORIZON), 30))[group]
    for row in np.flatnonzero(facts.symbols == symbol):
        for step in steps:
            error, naive = abs(scores.errors[row, step]), abs(scores.naive_errors[row, step])
            loss = (error - rho0 * 1.03 * naive) / facts.scale[row, step]
            blocks.setdefault(int(facts.target_times[row, step]) // (length * DAY_MS), []).append(loss)
    usual = np.median([len(block) for block in blocks.values()])
    return [float(np.mean(block)) for block in blocks.values() if len(block) >= usual / 2]


def test_baselines_agree_with_a_loop_over_targets(samples: list[Series], sample_origins: Origins) -> None:
    scores = evaluate(WalkForecaster(with_paths=False), samples, sample_origins, lookback=64)
    everything = baselines(scores)
    assert {baseline.group for baseline in everything} == {0, 1}
    for group, last in ((0, 8), (1, HORIZON)):
        found = {baseline.symbol: baseline for baseline in everything if baseline.group == group}
        assert list(found)[:3] == ["*", "AAPL", "FB"] or list(found)[:3] == ["*", "AAPL", "GOOG"]
        apple = found["AAPL"]
        means = slow_block_means(scores, "AAPL", group, apple.rho0)
        assert (apple.n_blocks, apple.horizon) == (len(means), last)
        assert apple.sd_block == pytest.approx(np.std(means, ddof=1))
        assert apple.rho0 == pytest.approx(apple.mae_log_return / apple.naive_mae_log_return)
        assert list(apple.pinball) == ["0.1", "0.25", "0.5", "0.75", "0.9"]
        assert apple.pinball["0.5"] == pytest.approx(apple.mae_log_return / 2)
        rho0 = found["*"].rho0
        pooled = [mean for symbol in list(found)[1:] for mean in slow_block_means(scores, symbol, group, rho0)]
        assert found["*"].n_blocks == pytest.approx(len(pooled), abs=len(found))  # the median block differs


def test_symbols_that_move_together_are_known_to(samples: list[Series], sample_origins: Origins) -> None:
    """GSPC and IXIC hold the others; a walk beside them would be alone."""
    scores = evaluate(WalkForecaster(with_paths=False), samples, sample_origins, lookback=64)
    everyone = next(baseline for baseline in baselines(scores) if baseline.symbol == "*")
    assert 0.1 < everyone.correlation < 0.9


def test_scale_of_the_paired_loss_is_known_at_the_origin(naive_scores: Scores, samples: list[Series]) -> None:
    facts = naive_scores.outcomes
    row = int(np.flatnonzero(facts.symbols == "MSFT")[5])
    series = next(item for item in samples if item.symbol == "MSFT")
    known: Floats = series.candles[series.timestamps <= facts.origin_times[row], CLOSE]
    sigma = scoring.ewma_volatility(scoring.log_returns(known), 0.97)[-1]
    np.testing.assert_allclose(facts.scale[row], sigma * np.sqrt(np.arange(1, HORIZON + 1)))
