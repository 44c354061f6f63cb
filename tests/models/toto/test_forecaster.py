"""Toto's promises: the same answer in any batch and bucket, exact quantiles, refusals."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.candles import check_candles, with_amount
from models.forecaster import Abandoned, ModelError, forecast
from models.toto.forecaster import TotoForecaster
from models.toto.network import TotoConfig, TotoNetwork
from models.toto.transform import LogScales


def build(config, log_scales=None):
    torch.manual_seed(1)
    network = TotoNetwork(TotoConfig.from_published(config))
    return TotoForecaster(network, max_context=512, log_scales=log_scales)


@pytest.fixture(scope="module")
def toto(toto_tiny):
    return build(toto_tiny)


def assert_same_bits(one, other):
    assert one.point.tobytes() == other.point.tobytes()
    assert one.prob_up.tobytes() == other.prob_up.tobytes()
    for name in one.quantiles:
        assert one.quantiles[name].tobytes() == other.quantiles[name].tobytes()


def test_forecast_has_the_same_bits_alone_and_in_a_batch(toto, make_request):
    item = make_request(200, 64, seed=5)
    alone = forecast(toto, [item])[0]
    for rows in (2, 3, 7, 16):
        others = [make_request(256 - 9 * i, 10 + i, seed=100 + i) for i in range(rows)]
        place = rows // 2
        batch = [*others[:place], item, *others[place:]]
        assert_same_bits(forecast(toto, batch)[place], alone)


def test_paths_have_the_same_bits_alone_and_in_a_batch(toto, make_request):
    item = make_request(200, 150, seed=5, samples=5, with_paths=True)
    alone = forecast(toto, [item])[0]
    for rows in (1, 2, 6):
        others = [make_request(256 - 9 * i, 129 + 10 * i, seed=50 + i, samples=8 - i % 3) for i in range(rows)]
        assert {toto.bucket(other) for other in others} == {toto.bucket(item)}
        place = rows // 2
        together = forecast(toto, [*others[:place], item, *others[place:]])[place]
        assert_same_bits(together, alone)
        assert together.paths.tobytes() == alone.paths.tobytes()


def test_first_patch_of_a_long_horizon_is_the_one_pass_forecast(toto, make_request):
    short, long = (forecast(toto, [make_request(300, h, seed=15, samples=8)])[0] for h in (64, 150))
    for name, values in short.quantiles.items():
        np.testing.assert_allclose(long.quantiles[name][:, :64], values, rtol=1e-9)
    assert short.warnings == ()
    assert long.warnings == ("steps beyond 64 are sampled, 8 paths",)


def test_paths_are_candles_around_the_quantiles_and_follow_the_seed(toto, make_request):
    asked = make_request(300, 150, seed=16, samples=64, with_paths=True)
    result = forecast(toto, [asked])[0]
    assert result.paths.shape == (64, 150, 5)
    for path in result.paths[:4]:
        check_candles(with_amount(path))
    low, high = result.quantiles["close"][[0, -1]]
    inside = ((result.paths[..., 3] >= low) & (result.paths[..., 3] <= high)).mean(axis=0)
    assert inside[:64].mean() == pytest.approx(0.8, abs=0.03)
    assert inside[64:].mean() == pytest.approx(0.8, abs=0.03)
    assert (np.diff(result.quantiles["close"], axis=0) > 0).all()
    assert not np.array_equal(forecast(toto, [replace(asked, seed=17)])[0].paths, result.paths)
    assert forecast(toto, [make_request(300, 64, seed=16, with_paths=True)])[0].paths is None


def test_mean_of_a_long_horizon_is_the_paths_mean(toto, make_request):
    result = forecast(toto, [make_request(300, 128, seed=18, samples=256, aggregate="mean", with_paths=True)])[0]
    closes = result.paths[:, 64:, 3]
    errors = (closes.mean(axis=0) - result.point[64:, 3]) / (closes.std(axis=0) / 16)
    assert abs(errors.mean()) < 0.5


def test_one_pass_requests_never_wait_for_paths(toto, make_request):
    one_pass = toto.bucket(make_request(200, 64, seed=1, samples=8))
    assert one_pass == toto.bucket(make_request(200, 3, seed=1, samples=32))
    assert len({one_pass, *(toto.bucket(make_request(200, h, seed=1, samples=8)) for h in (65, 129, 512))}) == 4


def test_horizons_and_paths_beyond_the_limits_are_refused(toto, make_request):
    toto.check(make_request(300, 512, seed=1, samples=256))
    toto.check(make_request(300, 64, seed=1, samples=257))
    with pytest.raises(ModelError, match="512 steps at most"):
        toto.check(make_request(300, 513, seed=1))
    with pytest.raises(ModelError, match="256 paths"):
        toto.check(make_request(300, 65, seed=1, samples=257))
    assert toto.max_rows(make_request(300, 512, seed=1, samples=256)) < toto.max_rows(make_request(300, 64, seed=1))


def test_paths_nobody_waits_for_stop_between_patches(toto, make_request):
    batch = toto.prepare([make_request(200, 200, seed=1, samples=4)])
    answers = iter([True, False])
    with pytest.raises(Abandoned):
        toto.run(batch, lambda: next(answers))


def test_padding_patches_change_nothing(toto, make_request):
    short, long = make_request(256, 64, seed=6), make_request(512, 64, seed=7)
    together = toto.prepare([short, long])  # both in the bucket of 512
    apart = toto.prepare([short])
    assert together.tensors["values"].shape[-2] == 2 * apart.tensors["values"].shape[-2]
    wide, narrow = toto.finish(toto.run(together), together)[0], toto.finish(toto.run(apart), apart)[0]
    np.testing.assert_allclose(wide.quantiles["close"], narrow.quantiles["close"], rtol=1e-5)


def test_values_of_a_partial_first_patch_matter_but_those_of_padding_do_not(toto, make_request):
    item = make_request(200, 64, seed=8)
    batch = toto.prepare([item])
    base = toto.run(batch)["outputs"]
    assert not torch.equal(toto.run(toto.prepare([replace(item, candles=item.candles[1:])]))["outputs"], base)
    masked = batch.tensors["weights"][0] == 0
    assert int(masked.sum()) == 56


def test_every_row_is_a_valid_candle_and_quantiles_rise(toto, make_request):
    result = forecast(toto, [make_request(300, 64, seed=9, levels=(0.05, 0.25, 0.5, 0.75, 0.95))])[0]
    check_candles(with_amount(result.point))
    for values in result.quantiles.values():
        assert values.shape == (5, 64)
        assert (np.diff(values, axis=0) >= 0).all()
        assert (values > 0).all()
    np.testing.assert_array_equal(result.quantiles["close"][2], result.point[:, 3])


def test_prob_up_agrees_with_the_quantiles(toto, make_request):
    item = make_request(300, 64, seed=10)
    result = forecast(toto, [item])[0]
    median_is_above = result.quantiles["close"][1] > item.last_close
    assert ((result.prob_up > 0.5) == median_is_above).all()


def test_aggregate_other_than_median_and_mean_is_refused(toto, make_request):
    with pytest.raises(ModelError, match="median or mean"):
        forecast(toto, [make_request(300, 8, seed=11, aggregate="p10")])


def test_mean_of_a_log_version_is_refused(toto_tiny, make_request):
    with pytest.raises(ModelError, match="no mean"):
        forecast(build(toto_tiny, (100.0, 10.0)), [make_request(300, 8, seed=11, aggregate="mean")])


def test_log_version_scales_with_prices_and_volumes(toto_tiny, make_request):
    model, item = build(toto_tiny, (100.0, 10.0)), make_request(300, 64, seed=12)
    bigger = replace(item, candles=item.candles * np.array([8, 8, 8, 8, 16, 128.0]))
    one, other = forecast(model, [item])[0], forecast(model, [bigger])[0]
    np.testing.assert_allclose(other.point, one.point * np.array([8, 8, 8, 8, 16]), rtol=1e-6)


def test_chained_opens_are_the_closes_before_them(toto_tiny, make_request):
    torch.manual_seed(1)
    network = TotoNetwork(TotoConfig.from_published(toto_tiny))
    item = make_request(300, 16, seed=14)
    point = forecast(TotoForecaster(network, max_context=512, chain_opens=True), [item])[0].point
    assert point[0, 0] == item.last_close
    np.testing.assert_array_equal(point[1:, 0], point[:-1, 3])
    check_candles(with_amount(point))


def test_log_scales_round_trip_and_look_only_at_the_context(make_walk):
    transform, candles = LogScales(100.0, 10.0), make_walk(128, seed=13)
    candles[5, 4] = 0.0
    encoded = transform.encode(candles, 64)
    changed = candles.copy()
    changed[64:] *= 3
    np.testing.assert_array_equal(transform.encode(changed, 64)[:64], encoded[:64])
    back = transform.decode(encoded[:64], candles[:64])
    rows = np.arange(64) != 5
    np.testing.assert_allclose(back[rows], candles[:64][rows, :5], rtol=1e-9)


@pytest.mark.parametrize("aggregate", ["median", "mean"])
def test_rows_summarised_together_have_the_forecasts_of_rows_alone(toto, make_request, aggregate):
    """As on a GPU, where levels and horizons differ too."""
    levels = [(0.1, 0.5, 0.9), (0.25,), (0.1, 0.5, 0.9)]
    items = [
        make_request(100 - i, 10 + 20 * i, seed=i, levels=each, aggregate=aggregate) for i, each in enumerate(levels)
    ]
    batch = toto.prepare(items)
    raw = toto.run(batch)
    rows = [{name: tensor[row] for name, tensor in raw.items()} for row in range(len(items))]
    together = toto._summarised_together(raw["outputs"], items, rows)
    for item, row, summary in zip(items, rows, together, strict=True):
        for found, expected in zip(summary, toto._summarised(item, row), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
