"""The blend's arithmetic, and that members answer in it as they do alone."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from models.candles import check_candles
from models.ensemble import EnsembleForecaster, Member, checked_weights, member_of, members_of
from models.forecaster import Forecast, Forecaster, ForecastInput, ModelError, Sampling, forecast
from models.naive import NaiveForecaster
from models.probes import is_batch_invariant, probe
from tests.walk import WalkForecaster

HALVES = ((0.5, 0.5), (0.5, 0.5))


def walks(*spreads: float, lookback: int = 128) -> list[Member]:
    return [Member(WalkForecaster(spread=spread), lookback, Sampling()) for spread in spreads]


def asked(horizon: int = 30, **settings: object) -> ForecastInput:
    item = probe(NaiveForecaster(), 3, context=100, **settings)
    return replace(
        item, future_timestamps=item.future_timestamps[:horizon], local_times=item.local_times[: 100 + horizon]
    )


def test_quantiles_are_averaged_in_logarithms_by_the_weights_of_their_group() -> None:
    narrow, wide = walks(1.0, 3.0)
    ensemble = EnsembleForecaster([narrow, wide], ((0.25, 0.75), (1.0, 0.0)), 30)
    item = asked()
    [found] = forecast(ensemble, [item])
    near, far = (forecast(member.forecaster, [member.asked(item)])[0] for member in (narrow, wide))
    for name in ("high", "low", "close"):
        logs = [np.log(each.quantiles[name]) for each in (near, far)]
        np.testing.assert_allclose(np.log(found.quantiles[name][:, :8]), (0.25 * logs[0] + 0.75 * logs[1])[:, :8])
        np.testing.assert_allclose(np.log(found.quantiles[name][:, 8:]), logs[0][:, 8:])
    widths = [np.log(each.quantiles["close"][2, 0] / each.quantiles["close"][0, 0]) for each in (near, found, far)]
    assert widths[1] == pytest.approx(0.25 * widths[0] + 0.75 * widths[2]), "a linear pool's band would be another"


def test_the_point_is_a_candle_and_the_probability_the_mean(build_tiny: Callable[[str], Forecaster]) -> None:
    members = [member_of(build_tiny(family), {}) for family in ("toto", "kronos")]
    ensemble = EnsembleForecaster(members, ((0.3, 0.7), (0.6, 0.4)), 30)
    item = asked()
    [found] = forecast(ensemble, [item])
    alone = [forecast(member.forecaster, [member.asked(item)])[0] for member in members]
    check_candles(found.point)
    shares = np.array([[0.3] * 8 + [0.6] * 22, [0.7] * 8 + [0.4] * 22])
    expected = sum(share * each.prob_up for share, each in zip(shares, alone, strict=True))
    np.testing.assert_allclose(found.prob_up, expected)
    closes = sum(share * np.log(each.point[:, 3]) for share, each in zip(shares, alone, strict=True))
    np.testing.assert_allclose(np.log(found.point[:, 3]), closes)
    assert found.paths is None
    assert found.step_return_quantiles is None


def test_a_blend_has_the_same_bits_alone_and_in_a_batch(build_tiny: Callable[[str], Forecaster]) -> None:
    members = [member_of(build_tiny(family), {"samples": 8}) for family in ("toto", "kronos")]
    assert is_batch_invariant(EnsembleForecaster(members, HALVES, 30))


def test_each_member_sees_its_own_lookback_and_draws_as_it_does_when_served() -> None:
    first, second = WalkForecaster(), WalkForecaster()
    sampling = Sampling(samples=7, temperature=0.5)
    members = [Member(first, 16, sampling), Member(second, 100, Sampling())]
    item = replace(asked(aggregate="median"), sampling=Sampling(samples=99), with_paths=True, seed=5)
    forecast(EnsembleForecaster(members, HALVES, 30), [item])
    for member, seen, kept in ((first, sampling, 16), (second, Sampling(), 100)):
        [got] = member.seen
        assert (len(got.candles), got.sampling, got.seed, got.with_paths) == (kept, seen, 5, False)
        assert np.array_equal(got.candles, item.candles[-kept:])
        assert np.array_equal(got.local_times, item.local_times[-kept - 30 :])


def test_limits_are_those_that_all_members_keep(build_tiny: Callable[[str], Forecaster]) -> None:
    toto, kronos = (member_of(build_tiny(family), {}) for family in ("toto", "kronos"))
    ensemble = EnsembleForecaster([toto, kronos], HALVES, 30)
    assert (ensemble.limits.min_context, ensemble.limits.max_context, ensemble.limits.max_horizon) == (2, 512, 30)
    long = replace(asked(), future_timestamps=np.arange(31), local_times=np.arange(131))
    with pytest.raises(ModelError, match="30 steps at most"):
        ensemble.check(long)
    with pytest.raises(ModelError, match="median"):
        ensemble.check(asked(aggregate="mean"))
    with pytest.raises(ValueError, match="do not reach"):
        EnsembleForecaster([toto, kronos], HALVES, 31)
    with pytest.raises(ValueError, match="do not reach"):
        EnsembleForecaster([toto, kronos], ((0.5, 0.5),) * 4, kronos.forecaster.limits.max_horizon + 1)


@pytest.mark.parametrize(
    "weights",
    [[[0.5, 0.6]], [[1.5, -0.5]], [[1.0]], [["0.5", "0.5"]], [[float("nan"), 1.0]], [], [[0.5, 0.5]] * 5, None],
    ids=["above one", "negative", "another number", "text", "nan", "none", "too many groups", "missing"],
)
def test_weights_that_are_no_shares_are_refused(weights: object) -> None:
    with pytest.raises(ValueError, match=r"weights|finite"):
        checked_weights(weights, 2)


@pytest.mark.parametrize("members", [None, [], ["a@0123456789ab"], "ab", [1, 2]])
def test_fewer_than_two_members_are_no_ensemble(members: object) -> None:
    with pytest.raises(ValueError, match="two members"):
        members_of({"members": members})


def test_warnings_of_all_members_are_told_once() -> None:
    class Warning(WalkForecaster):
        def _forecast(self, item: ForecastInput) -> Forecast:
            return replace(super()._forecast(item), warnings=("the bands are too wide",))

    [found] = forecast(EnsembleForecaster([Member(Warning(), 128, Sampling())] * 2, HALVES, 30), [asked()])
    assert found.warnings == ("the bands are too wide",)
