"""Uniforms to tokens."""

import numpy as np
import pytest
import torch

from models.kronos.sampling import sample


def draw(logits, uniforms, *, temperature=1.0, top_k=0, top_p=1.0):
    """Tokens of one row of logits at many uniforms."""
    logits = torch.tensor(logits, dtype=torch.float32).expand(1, len(uniforms), -1)
    controls = (torch.tensor([temperature]), torch.tensor([top_k]), torch.tensor([top_p]))
    return sample(logits, torch.tensor(uniforms, dtype=torch.float32)[None], *controls)[0].numpy()


GRID = (np.arange(20_000) + 0.5) / 20_000
LOGITS = np.log([0.1, 0.4, 0.05, 0.3, 0.15])


def shares(tokens):
    return np.bincount(tokens, minlength=5) / len(tokens)


def test_unfiltered_shares_are_the_softmax():
    np.testing.assert_allclose(shares(draw(LOGITS, GRID)), [0.1, 0.4, 0.05, 0.3, 0.15], atol=1e-3)


def test_temperature_sharpens():
    powered = np.array([0.1, 0.4, 0.05, 0.3, 0.15]) ** 2
    np.testing.assert_allclose(shares(draw(LOGITS, GRID, temperature=0.5)), powered / powered.sum(), atol=1e-3)


def test_top_k_keeps_the_k_likeliest():
    np.testing.assert_allclose(shares(draw(LOGITS, GRID, top_k=2)), [0, 4 / 7, 0, 3 / 7, 0], atol=1e-3)


def test_top_p_keeps_the_smallest_set_that_exceeds_it():
    np.testing.assert_allclose(shares(draw(LOGITS, GRID, top_p=0.75)), [0, 0.4 / 0.85, 0, 0.3 / 0.85, 0.15 / 0.85], atol=1e-3)


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
