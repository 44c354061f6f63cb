"""Exact statistics of Student-T mixtures: density, distribution function, quantiles."""

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

from models.toto.network import Mixture
from models.toto.student_t import TERMS, centred_cdf, coefficients, stretch

_TOLERANCE: Final = 5e-10  # in probability
_STEPS: Final = 150  # every second one halves the bracket at least
_FACTS: Final = 7  # of a component, beside the coefficients of its distribution function
_AT_ONCE: Final = 2**16  # components, so that their parameters stay in the processor's cache
_LOGISTIC: Final = 1.7  # a Gaussian's quantile is about logit(q) / 1.7


def log_density(mixture: Mixture, y: Tensor) -> Tensor:
    """Log density of the mixture at `y` `[...]`, natural units of `y`."""
    df = mixture.df
    z = (y.unsqueeze(-1) - mixture.loc) / mixture.scale
    constant = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - 0.5 * (math.pi * df).log() - mixture.scale.log()
    parts = constant - (df + 1) / 2 * torch.log1p(z**2 / df)
    total: Tensor = torch.logsumexp(mixture.log_weights + parts, dim=-1)
    return total


def mean(mixture: Mixture) -> Tensor:
    """Expectation `[...]`; it exists because df > 2."""
    return (mixture.log_weights.exp() * mixture.loc).sum(-1)


def cdf(mixture: Mixture, y: Tensor) -> Tensor:
    """P(Y <= y) at `y` `[...]`, to 1e-9."""
    below, _, _ = _evaluate(_table(mixture), y.double())
    return below


def quantiles(mixture: Mixture, levels: tuple[float, ...]) -> Tensor:
    """Quantiles `[Q, ...]` in float64, exact to 1e-9 in probability."""
    flat = Mixture(*(parameter.flatten(0, -2) for parameter in mixture))
    rows = max(1, _AT_ONCE // flat.loc.shape[1])
    solved = [_solve(Mixture(*part), levels) for part in zip(*(p.split(rows) for p in flat), strict=True)]
    return torch.cat(solved, dim=1).unflatten(1, mixture.loc.shape[:-1])


def _table(mixture: Mixture) -> Tensor:
    """What `_evaluate` needs of mixtures `[..., K]`, `[_FACTS + TERMS, ..., K]` in float64."""
    df, loc, scale, log_weights = (parameter.double() for parameter in mixture)
    root, weights = df.sqrt(), log_weights.exp()
    table = torch.empty(_FACTS + TERMS, *df.shape, dtype=torch.float64)
    peak = coefficients(root, out=table[_FACTS:])
    densities, inverse = weights * peak / scale, 1 / (scale * root)
    facts = (loc, inverse, df / 2, stretch(root), weights, densities, (df + 1) * inverse * densities)
    for place, fact in zip(table, facts, strict=False):
        place.copy_(fact)
    return table


def _evaluate(table: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distribution function, density and its derivative at `y`, which broadcasts to `table` `[7 + TERMS, ..., K]`."""
    loc, inverse, half_df, k, weights, densities, slopes, *h = table.unbind(0)
    assert len(h) == TERMS
    a = (y.unsqueeze(-1) - loc).mul_(inverse)
    centred, decay, root = centred_cdf(a, half_df, k, tuple(h))
    decay.mul_(root)
    slope = a.mul_(root).mul_(root).mul_(decay).mul_(slopes).sum(-1).neg_()
    return centred.mul_(weights).sum(-1).add_(0.5), decay.mul_(densities).sum(-1), slope


class _Search(NamedTuple):
    """Roots on their way, each tensor of one shape."""

    q: Tensor  # the level
    y: Tensor
    low: Tensor  # the root lies between
    high: Tensor
    miss: Tensor  # |cdf(y) - q| one step before


def _solve(mixture: Mixture, levels: tuple[float, ...]) -> Tensor:
    """Quantiles `[Q, M]` of mixtures `[M, K]`: all roots together at first, then only those that are still open."""
    table = _table(mixture)
    q = torch.tensor(levels, dtype=torch.float64).unsqueeze(-1)
    low, high = _bracket(mixture, q)
    y = _start(mixture, q).clamp(low, high)
    search, solved = _advance(table, _Search(q.expand_as(low), y, low, high, torch.ones_like(low)))
    while 2 * int(solved.sum()) < solved.numel():
        search, solved = _advance(table, search)
    roots = search.y.flatten()
    left = (~solved).flatten().nonzero().squeeze(-1)
    search = _Search(*(field.flatten()[left] for field in search))
    for _ in range(_STEPS):
        if not left.numel():
            break
        search, solved = _advance(table[:, left % mixture.loc.shape[0]], search)
        roots[left] = search.y
        kept = (~solved).nonzero().squeeze(-1)
        left, search = left[kept], _Search(*(field[kept] for field in search))
    return roots.view(low.shape)


def _bracket(mixture: Mixture, q: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds `[Q, M]` of the quantiles at levels `q` `[Q, 1]`.

    A mixture's quantile lies between the extreme quantiles of its components, and a Student-T quantile with
    df >= 2 between 0 and that of df = 2, (2q - 1) / sqrt(2 q (1 - q)).
    """
    farthest = ((2 * q - 1) / (2 * q * (1 - q)).sqrt()).unsqueeze(-1) * mixture.scale
    return (mixture.loc + farthest.clamp_max(0)).amin(-1), (mixture.loc + farthest.clamp_min(0)).amax(-1)


def _start(mixture: Mixture, q: Tensor) -> Tensor:
    """About the quantiles `[Q, M]`: those of one bell as wide as the mixture."""
    weights, centre = mixture.log_weights.exp(), mean(mixture)
    variance = (weights * (mixture.scale**2 + (mixture.loc - centre.unsqueeze(-1)) ** 2)).sum(-1)
    return centre + torch.logit(q) / _LOGISTIC * variance.sqrt()


def _advance(table: Tensor, search: _Search) -> tuple[_Search, Tensor]:
    """One step, and which searches began it at their root, where they stay.

    Halley's method on the logit of the distribution function, which is nearly straight where one bell
    dominates; the bracket is halved where a step would leave it or the last one has not halved the miss.
    """
    q, y, low, high, before = search
    below, density, slope = _evaluate(table, y)
    excess = below - q
    low, high = torch.where(excess > 0, low, y), torch.where(excess > 0, y, high)
    variance = below * (1 - below)
    newton = (torch.logit(below) - torch.logit(q)) * variance / density
    bend = slope / density - density * (1 - 2 * below) / variance
    proposed = y - newton / (1 - (newton * bend / 2).clamp(-0.8, 0.8))
    miss = excess.abs()
    trusted = (proposed > low) & (proposed < high) & (2 * miss < before)
    solved = miss <= _TOLERANCE
    following = torch.where(solved, y, torch.where(trusted, proposed, (low + high) / 2))
    return _Search(q, following, low, high, miss), solved
