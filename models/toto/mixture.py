"""Exact statistics of Student-T mixtures: density, distribution function, quantiles."""

import math

import numpy as np
import torch
from torch import Tensor

from models.toto.network import Mixture

_NODES, _WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(24))
_NEGLIGIBLE = 37.0  # exp(-37) < 1e-16


def _log_constant(df: Tensor) -> Tensor:
    return torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - 0.5 * math.log(math.pi)


def student_t_cdf(z: Tensor, df: Tensor) -> Tensor:
    """P(T <= z) for T ~ Student-T with `df` >= 2, to about 1e-10 in float64.

    With z = sqrt(df) tan(a) the density becomes C cos(a)^(df - 1), smooth on a finite interval: Gauss-Legendre
    quadrature from 0 to atan(z / sqrt(df)), cut where the integrand is below 1e-16.
    """
    power = df - 1
    reach = torch.acos(torch.exp(-_NEGLIGIBLE / power))
    angle = torch.minimum(torch.atan(z.abs() / df.sqrt()), reach)
    nodes, weights = _NODES.to(z), _WEIGHTS.to(z)
    points = angle.unsqueeze(-1) * (nodes + 1) / 2
    integral = ((power.unsqueeze(-1) * points.cos().log()).exp() * weights).sum(-1) * angle / 2
    return 0.5 + torch.sign(z) * integral * _log_constant(df).exp()


def log_density(mixture: Mixture, y: Tensor) -> Tensor:
    """Log density of the mixture at `y` `[...]`, natural units of `y`."""
    z = (y.unsqueeze(-1) - mixture.loc) / mixture.scale
    constant = _log_constant(mixture.df) - 0.5 * mixture.df.log() - mixture.scale.log()
    parts = constant - (mixture.df + 1) / 2 * torch.log1p(z**2 / mixture.df)
    total: Tensor = torch.logsumexp(mixture.log_weights + parts, dim=-1)
    return total


def cdf(mixture: Mixture, y: Tensor) -> Tensor:
    """P(Y <= y) at `y` `[...]`."""
    z = (y.unsqueeze(-1) - mixture.loc) / mixture.scale
    return (mixture.log_weights.exp() * student_t_cdf(z, mixture.df)).sum(-1)


def mean(mixture: Mixture) -> Tensor:
    """Expectation `[...]`; it exists because df > 2."""
    return (mixture.log_weights.exp() * mixture.loc).sum(-1)


def _rough_cdf(mixture: Mixture, y: Tensor) -> Tensor:
    """The distribution function to about 1e-3, through Wallace's normal approximation of Student-T (1959)."""
    z, df = (y.unsqueeze(-1) - mixture.loc) / mixture.scale, mixture.df
    normal = torch.sign(z) * (8 * df + 1) / (8 * df + 3) * (df * torch.log1p(z**2 / df)).sqrt()
    total: Tensor = (mixture.log_weights.exp() * torch.special.ndtr(normal)).sum(-1)
    return total


def _solve(mixture: Mixture, q: Tensor, y: Tensor, low: Tensor, high: Tensor, *, rough: bool) -> Tensor:
    """`y` with cdf(y) = q: Newton's steps, halving the bracket [low, high] wherever one would leave it."""
    distribution, tolerance, limit = (_rough_cdf, 1e-4, 40) if rough else (cdf, 1e-10, 80)
    for _ in range(limit):
        excess = distribution(mixture, y) - q
        unsolved = excess.abs() > tolerance  # a root that is found stays put: no neighbour changes its bits
        if not bool(unsolved.any()):
            break
        low, high = torch.where(excess > 0, low, y), torch.where(excess > 0, y, high)
        proposed = y - excess / log_density(mixture, y).exp()
        following = torch.where((proposed > low) & (proposed < high), proposed, (low + high) / 2)
        y = torch.where(unsolved, following, y)
    return y


def quantiles(mixture: Mixture, levels: tuple[float, ...]) -> Tensor:
    """Quantiles `[Q, ...]` in float64, exact to 1e-10 in probability.

    A mixture's quantile lies between the extreme quantiles of its components, and a Student-T quantile with
    df >= 2 between 0 and that of df = 2, (2q - 1) / sqrt(2 q (1 - q)): a bracket in closed form. The root of
    an approximate distribution function starts the exact search two or three steps from its end.
    """
    wide = Mixture(*(p.double().unsqueeze(0) for p in mixture))
    shape = (len(levels), *mixture.loc.shape[:-1])
    q = torch.tensor(levels, dtype=torch.float64, device=mixture.loc.device)
    q = q.view(-1, *[1] * (len(shape) - 1)).expand(shape)
    farthest = ((2 * q - 1) / (2 * q * (1 - q)).sqrt()).unsqueeze(-1) * wide.scale
    low = (wide.loc + farthest.clamp_max(0)).amin(-1)
    high = (wide.loc + farthest.clamp_min(0)).amax(-1)
    start = _solve(wide, q, mean(wide).expand(shape).clamp(low, high), low, high, rough=True)
    return _solve(wide, q, start, low, high, rough=False)
