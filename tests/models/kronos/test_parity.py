"""Kronos against the reference implementation: the same random weights, the same candles."""

import numpy as np
import pandas as pd
import pytest
import torch

from bench.published import kronos_weights as weights_of
from models.calendars import calendar_features
from models.forecaster import forecast
from models.kronos.decoder import Tokens
from models.kronos.forecaster import KronosForecaster, normalise
from models.layers import WeightsMismatch

HORIZON = 30


@pytest.fixture(scope="module", params=["mini", "small"])
def pair(request, reference_kronos, kronos_config):
    config = kronos_config[request.param]
    tokenizer, predictor = reference_kronos(config)
    return (tokenizer, predictor), KronosForecaster.from_weights(config, weights_of(tokenizer, predictor), "cpu")


def reference_forecast(networks, item, **settings):
    from model import KronosPredictor

    columns = ["open", "high", "low", "close", "volume", "amount"]
    index = pd.Series(pd.to_datetime(item.local_times, unit="ms"))
    context = len(item.candles)
    return (
        KronosPredictor(networks[1], networks[0], device="cpu", max_context=512)
        .predict(
            pd.DataFrame(item.candles, columns=columns),
            index[:context],
            index[context:].reset_index(drop=True),
            item.horizon,
            verbose=False,
            **settings,
        )[columns]
        .to_numpy()
    )


@torch.inference_mode()
def test_tokens_equal_the_reference(pair, make_walk):
    (tokenizer, _), ours = pair
    for length in (64, 128):
        x = torch.tensor(normalise(walk := make_walk(length, seed=length), walk), dtype=torch.float32)[None]
        theirs = tokenizer.encode(x, half=True)
        coarse, fine = ours.decoder.tokenize(x, torch.zeros(1, dtype=torch.int64))
        assert torch.equal(coarse, theirs[0])
        assert torch.equal(fine, theirs[1])


@torch.inference_mode()
def test_detokenised_candles_equal_the_reference(pair):
    (tokenizer, _), ours = pair
    tokens = torch.randint(0, 1024, (2, 1, 96), generator=torch.Generator().manual_seed(0))
    theirs = tokenizer.decode(list(tokens), half=True)[:, 64:]
    context, drawn = Tokens(*tokens[..., :64]), Tokens(*tokens[..., None, 64:])
    candles, last = ours.decoder.detokenize(context, drawn, torch.zeros(1, dtype=torch.int64))
    np.testing.assert_allclose(candles[:, 0].numpy(), theirs.numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(last.numpy(), tokenizer.decode(list(tokens[..., :64]), half=True)[:, -1], atol=1e-5)


@torch.inference_mode()
def test_first_logits_equal_the_reference(pair, make_request):
    (tokenizer, predictor), ours = pair
    item = make_request(128, HORIZON, seed=21)
    x = torch.tensor(normalise(item.candles, item.candles), dtype=torch.float32)[None]
    stamps = torch.from_numpy(calendar_features(item.local_times[:128]))[None]
    tokens = tokenizer.encode(x, half=True)
    theirs, context = predictor.decode_s1(*tokens, stamps)
    theirs = theirs[..., ours.decoder.coarse_order]  # ours rise with the decoded close
    prefix = ours.decoder.prefill(Tokens(*tokens), stamps, torch.zeros(1, dtype=torch.int64))
    np.testing.assert_allclose(prefix.hidden.numpy(), context[:, -1].numpy(), rtol=1e-4, atol=1e-5)
    logits = ours.decoder.coarse_head(prefix.hidden)
    assert float((logits - theirs[:, -1]).abs().max() / theirs.abs().max()) <= 1e-5


@pytest.mark.parametrize("length", [64, 100, pytest.param(400, marks=pytest.mark.long)])
def test_greedy_forecast_equals_the_reference(pair, make_request, length):
    networks, ours = pair
    item = make_request(length, HORIZON, seed=length, samples=1, top_k=1)
    theirs = reference_forecast(networks, item, T=1.0, top_k=1, top_p=1.0, sample_count=1)
    batch = ours.prepare([item])
    path = ours.run(batch)["candles"][0, 0, :HORIZON].double().numpy()
    restored = path * (item.candles.std(axis=0) + 1e-5) + item.candles.mean(axis=0)
    # Different tokens would differ by whole percents: agreement this close means every token is the same.
    np.testing.assert_allclose(restored, theirs, rtol=1e-5)


@pytest.mark.long
def test_sampled_forecast_has_the_reference_distribution(reference_kronos, kronos_config, make_request):
    config = kronos_config["mini"]
    tokenizer, predictor = reference_kronos(config)
    ours = KronosForecaster.from_weights(config, weights_of(tokenizer, predictor), "cpu")
    item = make_request(64, 4, seed=31, samples=512, top_p=0.9, stratified=False)  # the error below is theirs
    batch = ours.prepare([item])
    paths = ours.run(batch)["candles"][0, :, :4].double().numpy() * (item.candles.std(0) + 1e-5) + item.candles.mean(0)
    torch.manual_seed(1)
    means = [reference_forecast((tokenizer, predictor), item, T=1.0, top_p=0.9, sample_count=128) for _ in range(4)]
    expected = np.mean(means, axis=0)  # of 512 paths, as ours
    error = paths.std(axis=0) * np.sqrt(2 / 512)
    assert (np.abs(paths.mean(axis=0) - expected) <= 4.5 * error).all()


def test_every_wrong_tensor_is_named(reference_kronos, kronos_config):
    config = kronos_config["mini"]
    weights = weights_of(*reference_kronos(config))
    del weights["predictor.head.proj_s2.bias"]
    weights["tokenizer.extra"] = torch.zeros(2)
    with pytest.raises(WeightsMismatch, match=r"missing predictor.head.proj_s2.bias.*unexpected tokenizer.extra"):
        KronosForecaster.from_weights(config, weights, "cpu")


def test_config_with_an_unknown_key_is_refused(kronos_config):
    config = kronos_config["mini"] | {"predictor": kronos_config["mini"]["predictor"] | {"moe": 8}}
    with pytest.raises(ValueError, match="moe"):
        KronosForecaster.from_weights(config, {}, "cpu")


def test_forecast_runs_through_the_contract(pair, make_request):
    _, ours = pair
    result = forecast(ours, [make_request(64, HORIZON, seed=1, samples=8, with_paths=True)])[0]
    assert result.point.shape == (HORIZON, 5)
    assert result.paths is not None
    assert result.paths.shape == (8, HORIZON, 5)
