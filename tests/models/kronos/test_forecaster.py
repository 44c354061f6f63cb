"""Kronos' promises: the same paths in any batch, valid candles, statistics of the lookback only."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.candles import CLOSE, TooFewCandles, check_candles, with_amount
from models.forecaster import Abandoned, ModelError, forecast
from models.kronos.decoder import Tokens
from models.kronos.forecaster import KronosForecaster, normalise
from models.kronos.network import KronosPredictor, PredictorConfig
from models.kronos.tokenizer import KronosTokenizer, TokenizerConfig


def build(config, **options):
    torch.manual_seed(2)
    tokenizer = KronosTokenizer(TokenizerConfig.from_published(config["tokenizer"]))
    predictor = KronosPredictor(PredictorConfig.from_published(config["predictor"]))
    return KronosForecaster(tokenizer, predictor, max_context=config["context"], **options)


@pytest.fixture(scope="module")
def kronos(kronos_config):
    return build(kronos_config["mini"])


def test_paths_have_the_same_bits_alone_and_in_a_batch(kronos, make_request):
    item = make_request(64, 12, seed=5, samples=8, top_p=0.9, with_paths=True)
    alone = forecast(kronos, [item])[0]
    for rows in (1, 3, 7, 15):
        settings = [{"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.5}, {}]
        others = [
            make_request(64 - i, 9 + i % 4, seed=50 + i, samples=5 + i % 4, **settings[i % 4]) for i in range(rows)
        ]
        place = rows // 2
        together = forecast(kronos, [*others[:place], item, *others[place:]])[place]
        assert together.paths.tobytes() == alone.paths.tobytes()
        assert together.quantiles["close"].tobytes() == alone.quantiles["close"].tobytes()


def test_same_seed_same_paths_other_seed_other_paths(kronos, make_request):
    item = make_request(64, 8, seed=5, samples=8, with_paths=True)
    first, second = forecast(kronos, [item])[0], forecast(kronos, [item])[0]
    assert first.paths.tobytes() == second.paths.tobytes()
    assert forecast(kronos, [replace(item, seed=6)])[0].paths.tobytes() != first.paths.tobytes()


def test_padding_candles_change_nothing(kronos, make_request):
    item = make_request(64, 8, seed=9, samples=4, top_k=1, with_paths=True)
    longer = make_request(128, 8, seed=10, samples=4, top_k=1)
    alone = forecast(kronos, [item])[0]
    batch = kronos.prepare([item, longer])
    padded = kronos.finish(kronos.run(batch), batch)[0]
    np.testing.assert_allclose(padded.paths, alone.paths, rtol=1e-5)


def test_more_independent_paths_begin_with_the_same_paths(kronos, make_request):
    settings = {"stratified": False, "with_paths": True}
    few = forecast(kronos, [make_request(64, 8, seed=9, samples=4, **settings)])[0].paths
    many = forecast(kronos, [make_request(64, 8, seed=9, samples=16, **settings)])[0].paths
    np.testing.assert_allclose(many[:4], few, rtol=1e-5)


def test_stratified_paths_have_the_spread_and_less_error_than_independent_ones(kronos, make_request):
    def closes(seed, **settings):
        item = replace(make_request(64, 4, seed=9, samples=16, top_p=1.0, with_paths=True, **settings), seed=seed)
        return np.log(forecast(kronos, [item])[0].paths[:, :, CLOSE])

    found = {on: np.array([closes(seed, stratified=on) for seed in range(24)]) for on in (True, False)}
    spread = {on: values.reshape(-1, 4).std(axis=0) for on, values in found.items()}
    np.testing.assert_allclose(spread[True], spread[False], rtol=0.2)  # 384 paths each: a standard error of 5 %
    error = {on: values.mean(axis=1).std(axis=0).mean() for on, values in found.items()}
    assert error[True] < 0.8 * error[False]


@torch.inference_mode()
def test_heads_are_in_the_order_of_the_closes_that_tokens_decode_to(kronos):
    decoder, bits = kronos.decoder, kronos.decoder.tokens.s1_bits
    assert sorted(decoder.coarse_order.tolist()) == sorted(decoder.fine_order.tolist()) == list(range(2**bits))
    pad = torch.zeros(2**bits, dtype=torch.int64)
    for fine in (0, 300, 1023):
        context = Tokens(decoder.coarse_order[:, None], torch.full((2**bits, 1), fine))
        closes = decoder.detokenize(context, Tokens(*(part[..., None] for part in context)), pad).last[:, CLOSE]
        ranks = closes.argsort().argsort().double()
        assert np.corrcoef(ranks.numpy(), np.arange(2**bits))[0, 1] > 0.9


def test_every_path_is_made_of_valid_candles(kronos, make_request):
    result = forecast(kronos, [make_request(64, 16, seed=11, samples=16, temperature=3.0, with_paths=True)])[0]
    check_candles(with_amount(result.paths.reshape(-1, 5)))
    check_candles(with_amount(result.point))


def test_paths_that_need_too_much_memory_are_refused_and_batches_stay_small(kronos, make_request):
    small, large = make_request(64, 8, seed=1, samples=4), make_request(64, 200, seed=1, samples=256)
    kronos.check(small)
    kronos.check(large)
    assert kronos.max_rows(small) > 1000 > 4 > kronos.max_rows(large)
    with pytest.raises(ModelError, match="memory"):
        kronos.check(make_request(64, 1900, seed=1, samples=512))


def test_requests_beyond_the_limits_are_refused(kronos, make_request):
    with pytest.raises(TooFewCandles):
        kronos.check(make_request(1, 8, seed=1))
    with pytest.raises(ModelError, match="2046 steps"):
        kronos.check(make_request(64, 2047, seed=1))
    with pytest.raises(ModelError, match="1900 steps ahead the model sees 148 candles"):
        kronos.check(make_request(149, 1900, seed=1, samples=4))


def test_aggregate_below_zero_is_floored(kronos, make_request):
    item = make_request(64, 8, seed=1, samples=8, temperature=5.0, aggregate="mean_minus_std_10")
    assert (forecast(kronos, [item])[0].point > 0).all()


def test_prices_below_the_networks_resolution_are_answered_with_a_warning(kronos, make_request):
    item = make_request(64, 4, seed=1, samples=64)
    tiny = replace(item, candles=item.candles * np.array([1e-8, 1e-8, 1e-8, 1e-8, 1, 1e-8]))
    assert not forecast(kronos, [item])[0].warnings
    assert "does not resolve" in forecast(kronos, [tiny])[0].warnings[0]


def test_unreachable_quantile_is_answered_with_a_warning(kronos, make_request):
    result = forecast(kronos, [make_request(64, 4, seed=1, samples=4, levels=(0.01, 0.5))])[0]
    assert "0.01" in result.warnings[0]
    assert not forecast(kronos, [make_request(64, 4, seed=1, samples=128, levels=(0.01, 0.5))])[0].warnings


def test_anchored_paths_follow_the_true_last_close(kronos_config, make_request):
    plain, anchored = build(kronos_config["mini"]), build(kronos_config["mini"], anchor=True)
    item = make_request(64, 4, seed=3, samples=4, top_k=1, with_paths=True)
    one, other = forecast(plain, [item])[0].paths, forecast(anchored, [item])[0].paths
    batch = plain.prepare([item])
    last = plain.run(batch)["last"][0].double().numpy() * (item.candles.std(0) + 1e-5) + item.candles.mean(0)
    np.testing.assert_allclose(other[..., :4], one[..., :4] * item.last_close / last[3], rtol=1e-9)


def test_normalisation_sees_the_context_alone(make_walk):
    candles = make_walk(94, seed=4)
    changed = candles.copy()
    changed[64:] *= 5
    np.testing.assert_array_equal(normalise(changed, changed[:64])[:64], normalise(candles, candles[:64])[:64])


def test_step_returns_are_relative_to_the_candle_before(kronos, make_request):
    item = make_request(64, 4, seed=3, samples=9, levels=(0.5,), with_paths=True)
    result = forecast(kronos, [item])[0]
    closes = np.column_stack([np.full(9, item.last_close), result.paths[..., 3]])
    np.testing.assert_allclose(result.step_return_quantiles[0], np.median(np.diff(np.log(closes)), axis=0), rtol=1e-9)


def test_paths_that_nobody_waits_for_are_not_drawn_to_their_end(kronos, make_request):
    answers = iter([True, True, False])
    with pytest.raises(Abandoned):
        kronos.run(kronos.prepare([make_request(70, 10, seed=1)]), lambda: next(answers))


def test_rows_encoded_ahead_make_the_same_batch(kronos, make_request):
    items = [make_request(length, 6, seed=length) for length in (40, 64, 50)]
    ahead = kronos.prepare(items, [kronos.encode(item) for item in items])
    for name, tensor in kronos.prepare(items).tensors.items():
        assert torch.equal(tensor, ahead.tensors[name]), name
