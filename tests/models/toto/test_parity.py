"""Toto against the reference implementation: the same random weights, the same candles."""

import numpy as np
import pytest
import torch

from bench.published import toto_weights as weights_of
from models.forecaster import forecast
from models.layers import WeightsMismatch, load_strictly
from models.toto.decoder import Cache, Projected, TotoDecoder
from models.toto.forecaster import TotoForecaster
from models.toto.network import TotoConfig, TotoNetwork

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def base(reference_toto, toto_base):
    reference = reference_toto(toto_base)
    network = TotoNetwork(TotoConfig.from_published(toto_base))
    load_strictly(network, weights_of(reference), "Toto")
    return reference, TotoDecoder(network).eval()


def padded(values, length):
    """Left-padded values and their mask."""
    rows, variates, given = values.shape
    out, mask = torch.zeros(rows, variates, length), torch.zeros(rows, 1, length)
    out[..., length - given :] = values
    mask[..., length - given :] = 1
    return out, mask


def patched(*parts):
    return [part.unflatten(-1, (-1, 64)) for part in parts]


def relative(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize(("variates", "length"), [(5, 512), (1, 512), (5, 500), (5, 320), (5, 4096), (1, 4096)])
@torch.inference_mode()
def test_mixture_equals_the_reference_at_the_published_size(base, make_walk, variates, length):
    reference, decoder = base
    values = torch.tensor(make_walk(length, seed=length).T[None, :variates], dtype=torch.float32)
    whole = -(-length // 64) * 64
    inputs, mask = padded(values, whole)
    theirs = reference.model(inputs, mask.bool().expand_as(inputs), torch.zeros_like(inputs), None, whole)
    bucket = max(256, 1 << (length - 1).bit_length())
    projected, loc, scale = decoder(*patched(*padded(values, bucket)))
    ours = TotoNetwork.mixture(projected)
    components = theirs.distribution.component_distribution
    assert relative(ours.df, components.df[:, :, -64:]) <= TOLERANCE
    assert relative(ours.loc, components.loc[:, :, -64:]) <= TOLERANCE
    assert relative(ours.scale, components.scale[:, :, -64:]) <= TOLERANCE
    probabilities = theirs.distribution.mixture_distribution.probs[:, :, -64:]
    assert relative(ours.log_weights.exp(), probabilities) <= TOLERANCE
    assert relative(loc, theirs.loc[..., -1]) <= TOLERANCE
    assert relative(scale, theirs.scale[..., -1]) <= TOLERANCE


def test_mean_forecast_equals_the_reference_forecaster(base, toto_base, make_request):
    from toto.data.util.dataset import MaskedTimeseries
    from toto.inference.forecaster import TotoForecaster as Reference

    reference, _ = base
    item = make_request(512, 64, seed=3, aggregate="mean")
    series = torch.tensor(item.candles.T[:5], dtype=torch.float32)
    ones = torch.ones_like(series)
    given = MaskedTimeseries(series, ones.bool(), ones * 0, ones.int() * 0, torch.ones(5, dtype=torch.int))
    theirs = Reference(reference.model).forecast(given, prediction_length=64).mean[0].T.numpy()
    ours = TotoForecaster.from_weights({"network": toto_base, "max_context": 4096}, weights_of(reference), "cpu")
    point = forecast(ours, [item])[0].point
    close = slice(3, 5)  # open, high and low may have been repaired into a valid candle
    np.testing.assert_allclose(point[:, close], theirs[:, close], rtol=TOLERANCE)


def assert_equal_mixtures(ours, theirs):
    """Ours `[B, V, S, 64, 4K]` of one series against the reference's last patch of its paths."""
    mixture, components = TotoNetwork.mixture(ours[0].transpose(0, 1)), theirs.distribution.component_distribution
    for name in ("df", "loc", "scale"):
        assert relative(getattr(mixture, name), getattr(components, name)[:, :, -64:]) <= TOLERANCE
    assert relative(mixture.log_weights.exp(), theirs.distribution.mixture_distribution.probs[:, :, -64:]) <= TOLERANCE


@pytest.mark.parametrize("length", [320, 500])
@torch.inference_mode()
def test_steps_over_drawn_patches_equal_the_references_pass_over_the_longer_series(base, make_walk, length):
    """The reference's own cache is another matter: it moves the centre of its xpos decay as the cache grows, and
    leaves its uncached pass by 1e-4 wherever half the number of patches has been rounded. Five patches agree."""
    reference, decoder = base
    paths, whole = 4, 64 * -(-length // 64)
    series, mask = padded(torch.tensor(make_walk(length, seed=length).T[None, :5], dtype=torch.float32), whole)
    ahead, prefix, reached = decoder.prefill(*patched(series, mask))
    ahead = Projected(*(part.unsqueeze(2) for part in ahead))
    cache = Cache.empty(prefix, paths, 2)
    series, real = series.expand(paths, -1, -1), mask.bool().expand(paths, 5, -1)
    theirs = reference.model.allocate_kv_cache(paths, 5, whole + 64, series.device, series.dtype)
    reference.model(series, real, torch.zeros_like(series), theirs, whole)
    for index in range(2):
        uniforms = torch.rand(1, 5, paths, 64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(index))
        drawn = decoder.draw(ahead, uniforms)
        ahead, reached, entries = decoder.step(drawn, reached, prefix, cache, torch.tensor(index))
        cache.write(entries, index)
        series, real = torch.cat([series, drawn.values[0].transpose(0, 1)], -1), torch.cat([real, real[..., -64:]], -1)
        expected = reference.model(series, real, torch.zeros_like(series), None, whole)
        assert_equal_mixtures(ahead.outputs, expected)
        assert relative(ahead.loc[0].T, expected.loc[..., -1]) <= TOLERANCE
        assert relative(ahead.scale[0].T, expected.scale[..., -1]) <= TOLERANCE
        if length == 320 and index == 0:
            assert_equal_mixtures(ahead.outputs, reference.model(series, real, torch.zeros_like(series), theirs, whole))


def test_second_patch_is_distributed_as_the_references(reference_toto, toto_tiny, make_request):
    from toto.data.util.dataset import MaskedTimeseries
    from toto.inference.forecaster import TotoForecaster as Reference

    reference = reference_toto(toto_tiny)
    levels = (0.1, 0.5, 0.9)
    item = make_request(320, 128, seed=4, samples=256, levels=levels)
    series = torch.tensor(item.candles.T[:5], dtype=torch.float32)
    ones = torch.ones_like(series)
    given = MaskedTimeseries(series, ones.bool(), ones * 0, ones.int() * 0, torch.ones(5, dtype=torch.int))
    torch.manual_seed(0)
    sampled = Reference(reference.model).forecast(given, 128, num_samples=512, samples_per_batch=512).samples[0]
    config = {"network": toto_tiny, "max_context": 512}
    ours = forecast(TotoForecaster.from_weights(config, weights_of(reference), "cpu"), [item])[0]
    for variate, name in enumerate(("high", "low", "close"), start=1):
        for level, values in zip(levels, ours.quantiles[name], strict=True):
            below = (sampled[variate].T.numpy() < values).mean(axis=0)  # [H]
            assert below[:64].mean() == pytest.approx(level, abs=0.02)
            assert below[64:].mean() == pytest.approx(level, abs=0.02)


@pytest.mark.parametrize("spacewise_first", [True, False])
@torch.inference_mode()
def test_layer_order_follows_the_config(reference_toto, toto_tiny, make_walk, spacewise_first):
    config = toto_tiny | {"spacewise_first": spacewise_first}
    reference = reference_toto(config)
    network = TotoNetwork(TotoConfig.from_published(config))
    load_strictly(network, weights_of(reference), "Toto")
    inputs, mask = padded(torch.tensor(make_walk(256, seed=1).T[None, :5], dtype=torch.float32), 256)
    theirs = reference.model(inputs, mask.bool().expand_as(inputs), torch.zeros_like(inputs), None, 256)
    projected, _, _ = TotoDecoder(network).eval()(*patched(inputs, mask))
    assert relative(TotoNetwork.mixture(projected).loc, theirs.distribution.component_distribution.loc[:, :, -64:]) <= (
        TOLERANCE
    )


def test_every_wrong_tensor_is_named(reference_toto, toto_tiny):
    weights = weights_of(reference_toto(toto_tiny))
    weights["surprise"] = torch.zeros(1)
    del weights["unembed.bias"]
    weights["patch_embed.projection.weight"] = torch.zeros(3, 64)
    with pytest.raises(WeightsMismatch) as error:
        TotoForecaster.from_weights({"network": toto_tiny, "max_context": 512}, weights, "cpu")
    for part in ("unexpected surprise", "missing unembed.bias", "[3, 64]"):
        assert part in str(error.value)


def test_a_tensor_that_is_not_finite_is_named(reference_toto, toto_tiny):
    weights = weights_of(reference_toto(toto_tiny))
    weights["unembed.weight"] = weights["unembed.weight"] * torch.nan
    with pytest.raises(WeightsMismatch, match=r"unembed\.weight holds NaN"):
        TotoForecaster.from_weights({"network": toto_tiny, "max_context": 512}, weights, "cpu")


@pytest.mark.parametrize(
    "change", [{"scaler_cls": "other"}, {"stride": 32}, {"fancy": 1}, {"output_distribution_classes": ["normal"]}]
)
def test_unknown_architecture_is_refused(toto_tiny, change):
    with pytest.raises(ValueError, match="Toto config"):
        TotoConfig.from_published(toto_tiny | change)
