"""Student-T mixtures: distribution function, quantiles, mean."""

import numpy as np
import pytest
import torch
from scipy import stats

from models.toto.mixture import cdf, log_density, mean, quantiles, tabulate
from models.toto.network import Mixture


def random_mixture(shape, components, seed):
    g = torch.Generator().manual_seed(seed)
    size = (*shape, components)
    return Mixture(
        2 + 10 * torch.rand(size, generator=g, dtype=torch.float64),
        torch.randn(size, generator=g, dtype=torch.float64),
        0.01 + torch.rand(size, generator=g, dtype=torch.float64),
        torch.randn(size, generator=g, dtype=torch.float64).log_softmax(-1),
    )


@pytest.mark.parametrize("df", [2.0001, 2.1, 2.5, 4, 7.7, 30, 300, 5000, 1e6, 1e9])
def test_student_t_distribution_function_equals_scipy(df):
    z = torch.linspace(-80, 80, 4001, dtype=torch.float64)
    one = torch.ones(len(z), 1, dtype=torch.float64)
    ours = cdf(tabulate(Mixture(one * df, one * 0, one, one * 0)), z).numpy()
    np.testing.assert_allclose(ours, stats.t.cdf(z.numpy(), df), atol=1e-9)


def test_quantiles_invert_the_distribution_function():
    mixture = random_mixture((5, 64), 24, seed=1)
    levels = (0.001, 0.1, 0.5, 0.9, 0.999)
    table = tabulate(mixture)
    found = quantiles(table, levels)
    for level, values in zip(levels, found, strict=True):
        np.testing.assert_allclose(cdf(table, values).numpy(), level, atol=1e-9)


def test_quantiles_of_far_apart_components_are_found():
    mixture = Mixture(
        torch.full((1, 2), 3.0, dtype=torch.float64),
        torch.tensor([[-1e4, 1e4]], dtype=torch.float64),
        torch.tensor([[1e-3, 1e-3]], dtype=torch.float64),
        torch.tensor([[0.3, 0.7]], dtype=torch.float64).log(),
    )
    low, high = quantiles(tabulate(mixture), (0.1, 0.9))[:, 0].tolist()
    assert low == pytest.approx(-1e4, abs=1)
    assert high == pytest.approx(1e4, abs=1)


def test_density_and_mean_equal_scipys():
    mixture = random_mixture((7,), 3, seed=2)
    y = torch.linspace(-3, 3, 7, dtype=torch.float64)
    df, loc, scale, weights = (p.numpy() for p in (*mixture[:3], mixture.log_weights.exp()))
    expected = (weights * stats.t.pdf(y.numpy()[:, None], df, loc, scale)).sum(-1)
    np.testing.assert_allclose(log_density(mixture, y).exp().numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(mean(tabulate(mixture)).numpy(), (weights * loc).sum(-1), rtol=1e-12)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_mixtures_whose_parameters_are_no_numbers_have_no_quantiles(broken):
    shape = (3, 5)
    log_weights = torch.full(shape, 1 / 5).log()
    mixture = Mixture(torch.full(shape, 3.0), torch.zeros(shape), torch.full(shape, broken), log_weights)
    assert not torch.isfinite(quantiles(tabulate(mixture), (0.1, 0.9))).any()
