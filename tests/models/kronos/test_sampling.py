"""Uniforms to tokens."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models.kronos.sampling import sample


def draw(logits, uniforms, *, temperature=1.0, top_k=0, top_p=1.0):
    """Tokens of one row of logits at many uniforms."""
    logits = torch.tensor(logits, dtype=torch.float32).expand(1, len(uniforms), -1)
    controls = torch.tensor([temperature]), torch.tensor([top_k]), torch.tensor([top_p])
    return sample(logits, torch.tensor(uniforms, dtype=torch.float32)[None], *controls)[0].numpy()


def kept_exactly(logits, top_k, top_p):
    """What a sort in double precision keeps, ties and all."""
    probs = np.exp(logits - logits.max())
    ranked = np.sort(probs)[::-1]
    ranked = ranked[ranked >= ranked[top_k - 1]] if top_k else ranked
    before = ranked.cumsum() - ranked
    if top_p < 1:
        ranked = ranked[before <= top_p * ranked.sum()]
    return set(np.flatnonzero(probs >= ranked.min()).tolist())


GRID = (np.arange(20_000) + 0.5) / 20_000
LOGITS = np.log([0.1, 0.4, 0.05, 0.3, 0.15])


def shares(tokens):
    return np.bincount(tokens, minlength=5) / len(tokens)


def test_unfiltered_shares_are_the_softmax():
    np.testing.assert_allclose(shares(draw(LOGITS, GRID)), [0.1, 0.4, 0.05, 0.3, 0.15], atol=1e-3)


@pytest.mark.parametrize("top_k", [0, 256, 1000])
def test_filters_that_are_off_give_the_bits_of_no_filters(top_k):
    generator = torch.Generator().manual_seed(4)
    logits, uniforms = 4 * torch.randn(8, 64, 256, generator=generator), torch.rand(8, 64, generator=generator)
    mass = logits.softmax(-1).cumsum(-1)
    unfiltered = (mass <= uniforms.unsqueeze(-1) * mass[..., -1:]).sum(-1)
    assert torch.equal(sample(logits, uniforms, torch.ones(8), torch.full((8,), top_k), torch.ones(8)), unfiltered)


def test_temperature_sharpens():
    powered = np.array([0.1, 0.4, 0.05, 0.3, 0.15]) ** 2
    np.testing.assert_allclose(shares(draw(LOGITS, GRID, temperature=0.5)), powered / powered.sum(), atol=1e-3)


def test_top_k_keeps_the_k_likeliest():
    np.testing.assert_allclose(shares(draw(LOGITS, GRID, top_k=2)), [0, 4 / 7, 0, 3 / 7, 0], atol=1e-3)


def test_top_p_keeps_the_smallest_set_that_exceeds_it():
    np.testing.assert_allclose(
        shares(draw(LOGITS, GRID, top_p=0.75)), [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85], atol=1e-3
    )


def test_top_k_and_top_p_compose():
    # Of the three likeliest (0.4, 0.3, 0.15 of 0.85) the first already exceeds 0.4.
    assert set(draw(LOGITS, GRID, top_k=3, top_p=0.4)) == {1}
    assert set(draw(LOGITS, GRID, top_k=3, top_p=0.5)) == {1, 3}


def test_top_k_of_one_is_greedy_at_any_uniform():
    assert set(draw(LOGITS, [0.0, 0.5, 1 - 2**-24], top_k=1)) == {1}


def test_tokens_rise_with_the_uniform():
    assert (np.diff(draw(LOGITS, GRID)) >= 0).all()


def test_impossible_token_is_never_drawn_at_the_edges():
    logits = np.array([-np.inf, 0.0, 0.0, -np.inf])
    assert set(draw(logits, [0.0, 0.4999, 0.5, 1 - 2**-24])) == {1, 2}


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 7, "top_p": 0.6}])
def test_filters_equal_the_reference_where_it_applies_them(settings):
    from model.kronos import top_k_top_p_filtering

    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(3))
    expected = logits.clone()
    if "top_k" in settings:
        expected = top_k_top_p_filtering(expected, top_k=settings["top_k"], top_p=1.0)
    if "top_p" in settings:  # the reference skips top-p after top-k; here they compose
        expected = top_k_top_p_filtering(expected, top_k=0, top_p=settings["top_p"])
    allowed = set(torch.nonzero(torch.isfinite(expected[0])).flatten().tolist())
    assert set(draw(logits[0].numpy(), GRID, **settings)) == allowed


@pytest.mark.parametrize("tokens", [32, 1024])
@pytest.mark.parametrize("spread", [0.3, 3.0, 12.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (0, 0.35), (0, 0.999), (20, 1.0), (1, 1.0), (12, 0.7)])
def test_what_is_kept_is_what_a_sort_keeps(tokens, spread, top_k, top_p):
    logits = np.random.default_rng(tokens).normal(0, spread, tokens).astype(np.float32).astype(float)
    expected = sorted(kept_exactly(logits, top_k, top_p))
    mass = np.exp(logits[expected] - logits.max()).cumsum()
    share = np.diff(mass, prepend=0) / mass[-1]
    middles = mass / mass[-1] - share / 2
    large = share > 3e-4  # what ties at the threshold shifts the middles of the others a little
    assert draw(logits, middles[large], top_k=top_k, top_p=top_p).tolist() == np.array(expected)[large].tolist()


def test_tokens_that_tie_at_the_threshold_are_kept_together():
    assert set(draw(np.log([0.2, 0.3, 0.2, 0.1, 0.2]), GRID, top_k=2)) == {0, 1, 2, 4}
    assert set(draw(np.log([0.2, 0.3, 0.2, 0.1, 0.2]), GRID, top_p=0.4)) == {0, 1, 2, 4}


def test_tokens_apart_by_two_steps_of_the_resolution_do_not_tie():
    close = [0.0, np.log(1 - 2 * 2**-16), -1.0]
    assert set(draw(close, GRID, top_k=1)) == {0}


def test_a_filtered_row_has_the_same_bits_in_any_batch():
    generator = torch.Generator().manual_seed(8)
    logits, uniforms = 3 * torch.randn(16, 32, 1024, generator=generator), torch.rand(16, 32, generator=generator)
    temperature, top_k = torch.linspace(0.5, 2, 16), torch.arange(16) % 4 * 9
    top_p = torch.linspace(0.3, 1, 16)
    together = sample(logits, uniforms, temperature, top_k, top_p)
    for row in (0, 7, 15):
        pick = slice(row, row + 1)
        alone = sample(logits[pick], uniforms[pick], temperature[pick], top_k[pick], top_p[pick])
        assert torch.equal(alone, together[pick])


def test_logits_that_are_no_numbers_still_give_a_token():
    # An index outside the vocabulary would end a CUDA process; what the forecast is worth is checked elsewhere.
    assert 0 <= draw([np.nan] * 5, [0.5], top_k=2, top_p=0.5)[0] < 5


def test_shapes_come_from_tensors_without_numbers():
    """ONNX Runtime's outputs are sized by such a run."""
    with FakeTensorMode():
        tokens = sample(torch.zeros(2, 3, 5), torch.zeros(2, 3), *torch.ones(3, 2))
    assert tokens.shape == (2, 3)


def test_sampling_exports_and_the_export_draws_the_same_tokens():
    class Sampler(torch.nn.Module):
        def forward(self, *inputs):
            return sample(*inputs)

    generator = torch.Generator().manual_seed(6)
    logits, uniforms = 3 * torch.randn(2, 8, 64, generator=generator), torch.rand(2, 8, generator=generator)
    inputs = (logits, uniforms, torch.ones(2), torch.tensor([0, 9]), torch.tensor([0.8, 1.0]))
    program = torch.export.export(Sampler(), inputs)  # fails where control flow depends on the data
    assert torch.equal(program.module()(*inputs), sample(*inputs))
