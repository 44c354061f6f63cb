"""Toto's pure functions: the same in any precision of the weights, draws that follow the mixture."""

import numpy as np
import pytest
import torch
from scipy import stats

from models.toto.decoder import Cache, Patch, TotoDecoder, draw_from
from models.toto.mixture import cdf, tabulate
from models.toto.network import Mixture, TotoConfig, TotoNetwork

PATHS = 4


@pytest.fixture(scope="module")
def decoder(toto_tiny):
    torch.manual_seed(2)
    return TotoDecoder(TotoNetwork(TotoConfig.from_published(toto_tiny))).eval()


def series(make_walk, rows, length, padding=0):
    """Values and weights of `rows` series, the first `padding` candles of each missing."""
    walks = np.stack([make_walk(length, seed=20 + row).T[:5] for row in range(rows)])
    values, weights = torch.tensor(walks, dtype=torch.float32), torch.ones(rows, 1, length)
    values[..., :padding], weights[..., :padding] = 0, 0
    return patched(values, weights)


def relative(found, expected):
    found, expected = found.ahead.outputs, expected.ahead.outputs
    return float((found - expected).abs().max() / expected.abs().max())


def patched(*parts):
    return [part.unflatten(-1, (-1, 64)) for part in parts]


@torch.inference_mode()
def test_cache_slots_that_are_not_written_yet_change_nothing(decoder, make_walk):
    _, prefix, reached = decoder.prefill(*series(make_walk, 1, 256))
    drawn = Patch(torch.full((1, 5, PATHS, 64), 100.0))
    empty, filled = Cache.empty(prefix, PATHS, 2), Cache.empty(prefix, PATHS, 2)
    for slots in filled:
        slots.fill_(7.0)
    index = torch.tensor(0)
    one, other = (decoder.step(drawn, reached, prefix, cache, index).ahead.outputs for cache in (empty, filled))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@torch.inference_mode()
def test_padding_patches_change_no_step(decoder, make_walk):
    values, weights = series(make_walk, 1, 256)
    drawn, heads = Patch(torch.full((1, 5, PATHS, 64), 100.0)), []
    for padding in (0, 4):
        padded = (torch.nn.functional.pad(part, (0, 0, padding, 0)) for part in (values, weights))
        _, prefix, reached = decoder.prefill(*padded)
        cache = Cache.empty(prefix, PATHS, 1)
        heads.append(decoder.step(drawn, reached, prefix, cache, torch.tensor(0)).ahead.outputs)
    assert float((heads[0] - heads[1]).abs().max() / heads[0].abs().max()) <= 1e-5


@torch.inference_mode()
def test_half_precision_weights_keep_statistics_and_outputs_in_single_precision(decoder, make_walk):
    given, half = series(make_walk, 2, 320, 70), decoder.reduced(torch.bfloat16)
    whole, rough = decoder.prefill(*given), half.prefill(*given)
    for expected, found in zip(whole.ahead[1:], rough.ahead[1:], strict=True):
        assert torch.equal(expected, found)
    assert rough.ahead.outputs.dtype == torch.float32
    assert relative(rough, whole) < 0.05
    torch.testing.assert_close(half(*given).outputs, rough.ahead.outputs, rtol=0, atol=0)
    drawn = Patch(torch.full((2, 5, PATHS, 64), 100.0))
    after, rough_after = (
        made.step(drawn, read.reached, read.prefix, Cache.empty(read.prefix, PATHS, 1), torch.tensor(0))
        for made, read in ((decoder, whole), (half, rough))
    )
    assert rough_after.ahead.outputs.dtype == torch.float32
    assert relative(rough_after, after) < 0.05


def test_draws_follow_the_mixture():
    count, one = 20_000, torch.ones(1, dtype=torch.float64)
    mixture = Mixture(
        torch.tensor([2.2, 5.0, 50.0]).double(),
        torch.tensor([-3.0, 0.0, 2.0]).double(),
        torch.tensor([0.2, 1.0, 0.5]).double(),
        torch.tensor([0.5, 0.2, 0.3]).double().log(),
    )
    many = Mixture(*(parameter.expand(count, -1) for parameter in mixture))
    uniforms = torch.rand(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = cdf(tabulate(many), draw_from(many, uniforms)).numpy()
    assert stats.kstest(found, "uniform").pvalue > 0.01
    edges = draw_from(Mixture(*(p.expand(3, -1) for p in mixture)), torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 0.5]]))
    assert torch.isfinite(edges * one).all()
