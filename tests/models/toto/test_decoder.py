"""Toto's pure functions: exportable, the same in any precision of the weights, draws that follow the mixture."""

import copy

import numpy as np
import pytest
import torch
from scipy import stats

from models.toto.decoder import TotoDecoder, draw_from
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
    return values, weights


class Function(torch.nn.Module):
    """One of a decoder's functions as the module that torch.export wants."""

    def __init__(self, decoder, name):
        super().__init__()
        self.decoder, self.name = decoder, name

    def forward(self, *inputs):
        return getattr(self.decoder, self.name)(*inputs)


def assert_exports(decoder, name, inputs, dynamic, others):
    """`name` exported with `inputs` gives the eager numbers for `others` too, whose shapes differ."""
    function = Function(decoder, name)
    with torch.inference_mode():
        exported = torch.export.export(function, inputs, dynamic_shapes=dynamic).module()
        for given in (inputs, others):
            torch.testing.assert_close(exported(*given), function(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["forward", "prefill"])
def test_reading_a_context_exports_with_any_batch_and_number_of_patches(decoder, make_walk, name):
    rows, patches = torch.export.Dim("rows", min=1, max=64), torch.export.Dim("patches", min=4, max=64)
    shape = {0: rows, 2: 64 * patches}
    given, others = series(make_walk, 2, 320, 70), series(make_walk, 4, 512)
    assert_exports(decoder, name, given, {"inputs": (shape, shape)}, others)


@torch.inference_mode()
def test_drawing_and_stepping_export_for_any_index(decoder, make_walk):
    head, loc, scale, prefix, reached = decoder.prefill(*series(make_walk, 1, 256))
    uniforms = torch.rand(1, 5, PATHS, 64, 2, dtype=torch.float64)
    drawing = (head.unsqueeze(2), loc.unsqueeze(2), scale.unsqueeze(2), uniforms)
    assert_exports(decoder, "draw", drawing, None, (*drawing[:3], uniforms.flip(-1)))
    cache = decoder.empty_cache(prefix, PATHS, 2)
    stepping = (decoder.draw(*drawing), reached, prefix, cache)
    assert_exports(
        decoder, "step", (*stepping, torch.tensor(0)), None, (stepping[0] + 1, *stepping[1:], torch.tensor(1))
    )


@torch.inference_mode()
def test_cache_slots_that_are_not_written_yet_change_nothing(decoder, make_walk):
    _, _, _, prefix, reached = decoder.prefill(*series(make_walk, 1, 256))
    values = torch.full((1, 5, PATHS, 64), 100.0)
    empty, filled = decoder.empty_cache(prefix, PATHS, 2), decoder.empty_cache(prefix, PATHS, 2)
    for slots in filled:
        slots.fill_(7.0)
    index = torch.tensor(0)
    one, other = (decoder.step(values, reached, prefix, cache, index)[0] for cache in (empty, filled))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@torch.inference_mode()
def test_padding_patches_change_no_step(decoder, make_walk):
    values, weights = series(make_walk, 1, 256)
    drawn, heads = torch.full((1, 5, PATHS, 64), 100.0), []
    for padding in (0, 256):
        prefilled = decoder.prefill(*(torch.nn.functional.pad(part, (padding, 0)) for part in (values, weights)))
        prefix, reached = prefilled[3], prefilled[4]
        cache = decoder.empty_cache(prefix, PATHS, 1)
        heads.append(decoder.step(drawn, reached, prefix, cache, torch.tensor(0))[0])
    assert float((heads[0] - heads[1]).abs().max() / heads[0].abs().max()) <= 1e-5


@torch.inference_mode()
def test_half_precision_weights_keep_statistics_and_outputs_in_single_precision(decoder, make_walk):
    given, half = series(make_walk, 2, 320, 70), copy.deepcopy(decoder).to(torch.bfloat16)
    whole, rough = decoder.prefill(*given), half.prefill(*given)
    for expected, found in zip(whole[1:3], rough[1:3], strict=True):
        assert torch.equal(expected, found)
    assert rough[0].dtype == torch.float32
    assert float((rough[0] - whole[0]).abs().max() / whole[0].abs().max()) < 0.05
    torch.testing.assert_close(half(*given)[0], rough[0], rtol=0, atol=0)
    drawn = torch.full((2, 5, PATHS, 64), 100.0)
    after, rough_after = (
        made.step(drawn, read[4], read[3], made.empty_cache(read[3], PATHS, 1), torch.tensor(0))
        for made, read in ((decoder, whole), (half, rough))
    )
    assert rough_after[0].dtype == torch.float32
    assert float((rough_after[0] - after[0]).abs().max() / after[0].abs().max()) < 0.05


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
