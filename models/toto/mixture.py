"""Exact statistics of Student-T mixtures: density, distribution function, quantiles."""

import math
from typing import Final, NamedTuple

import torch
from torch import Tensor

from models.toto.network import Mixture
from models.toto.student_t import TERMS, centred_cdf, coefficients, stretch

_TOLERANCE: Final = 5e-10  # in probability
_STEPS: Final = 150  # every second one halves the bracket at least
_FACTS: Final = 8  # of a component, beside the coefficients of its distribution function
_LARGEST_JERK: Final = 1.5  # third derivative of a Student-T's distribution function with df >= 2, over its peak
_LOGISTIC: Final = 1.7  # a Gaussian's quantile is about logit(q) / 1.7


def log_density(mixture: Mixture, y: Tensor) -> Tensor:
    """Log density of the mixture at `y` `[...]`, natural units of `y`."""
    df = mixture.df
    z = (y.unsqueeze(-1) - mixture.loc) / mixture.scale
    constant = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - 0.5 * (math.pi * df).log() - mixture.scale.log()
    parts = constant - (df + 1) / 2 * torch.log1p(z**2 / df)
    total: Tensor = torch.logsumexp(mixture.log_weights + parts, dim=-1)
    return total


class Tabled(NamedTuple):
    """Mixtures ready to be evaluated, float64."""

    facts: Tensor  # [_FACTS + TERMS, ..., K]
    jerk: Tensor  # [...] a bound of the third derivative of the distribution function

    def part(self, index: int | slice) -> "Tabled":
        """Some of the mixtures, by their first axis."""
        return Tabled(self.facts[:, index], self.jerk[index])


def tabulate(mixture: Mixture) -> Tabled:
    """Prepare mixtures `[..., K]`."""
    df, loc, scale, log_weights = (parameter.double() for parameter in mixture)
    root, weights = df.sqrt(), log_weights.exp()
    table = torch.empty(_FACTS + TERMS, *df.shape, dtype=torch.float64, device=df.device)
    peak = coefficients(root, out=table[_FACTS:])
    densities, inverse = weights * peak / scale, 1 / (scale * root)
    slopes = (df + 1) * inverse * densities
    for place, fact in zip(
        table, (loc, inverse, df / 2, stretch(root), weights, densities, slopes, scale), strict=False
    ):
        place.copy_(fact)
    return Tabled(table, (densities / (scale * scale)).sum(-1) * _LARGEST_JERK)


def mean(table: Tabled) -> Tensor:
    """Expectation `[...]`; it exists because df > 2."""
    expected: Tensor = (table.facts[4] * table.facts[0]).sum(-1)
    return expected


def cdf(table: Tabled, y: Tensor) -> Tensor:
    """P(Y <= y) at `y` `[...]`, to 1e-9."""
    below, _, _ = _evaluate(table.facts, y)
    return below


def quantiles(table: Tabled, levels: tuple[float, ...]) -> Tensor:
    """Quantiles `[Q, ...]`, exact to 1e-9 in probability."""
    flat = Tabled(table.facts.flatten(1, -2), table.jerk.flatten())
    found: Tensor = _solve(flat, levels).unflatten(1, table.jerk.shape)
    return found


def _evaluate(table: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distribution function, density and its derivative at `y`, which broadcasts to `table` `[7 + TERMS, ..., K]`."""
    loc, inverse, half_df, k, weights, densities, slopes, _, *h = table.unbind(0)
    assert len(h) == TERMS
    a = (y.unsqueeze(-1) - loc).mul_(inverse)
    centred, decay, root = centred_cdf(a, half_df, k, tuple(h))
    decay.mul_(root)
    slope = a.mul_(root).mul_(root).mul_(decay).mul_(slopes).sum(-1).neg_()
    return centred.mul_(weights).sum(-1).add_(0.5), decay.mul_(densities).sum(-1), slope


class _Search(NamedTuple):
    """Roots on their way, each tensor of one shape."""

    q: Tensor  # the level
    logit: Tensor  # of the level
    jerk: Tensor
    y: Tensor
    low: Tensor  # the root lies between
    high: Tensor
    miss: Tensor  # |cdf(y) - q| one step before


def _solve(table: Tabled, levels: tuple[float, ...]) -> Tensor:
    """Quantiles `[Q, M]` of mixtures `[M]`: all roots together at first, then only those that are still open."""
    q = torch.tensor(levels, dtype=torch.float64, device=table.jerk.device).unsqueeze(-1)
    low, high = _bracket(table.facts, q)
    y = _start(table, q).clamp(low, high)
    q, logit, jerk = (part.expand_as(low) for part in (q, torch.logit(q), table.jerk))
    search, solved = _advance(table.facts, _Search(q, logit, jerk, y, low, high, torch.ones_like(low)))
    for _ in range(_STEPS):  # enough for any root; where a parameter is no number there is none
        if 2 * int(solved.sum()) >= solved.numel():
            break
        found, before = search.y, solved
        search, solved = _advance(table.facts, search)
        search = search._replace(y=torch.where(before, found, search.y))  # a root moves for its own sake alone
        solved |= before
    roots = search.y.flatten()
    left = (~solved).flatten().nonzero().squeeze(-1)
    fields = torch.stack(search).flatten(1).index_select(1, left)
    for _ in range(_STEPS):
        if not left.numel():
            break
        facts = table.facts.index_select(1, left % len(table.jerk))
        search, solved = _advance(facts, _Search(*fields.unbind(0)))
        roots[left] = search.y
        kept = (~solved).nonzero().squeeze(-1)
        left, fields = left[kept], torch.stack(search).index_select(1, kept)
    return roots.view(low.shape)


def _bracket(facts: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds `[Q, M]` of the quantiles at levels `q` `[Q, 1]`.

    A mixture's quantile lies between the extreme quantiles of its components, and a Student-T quantile with
    df >= 2 between 0 and that of df = 2, (2q - 1) / sqrt(2 q (1 - q)).
    """
    loc, scale = facts[0], facts[7]
    farthest = ((2 * q - 1) / (2 * q * (1 - q)).sqrt()).unsqueeze(-1)
    low = torch.addcmul(loc, farthest.clamp_max(0), scale).amin(-1)
    return low, torch.addcmul(loc, farthest.clamp_min(0), scale).amax(-1)


def _start(table: Tabled, q: Tensor) -> Tensor:
    """About the quantiles `[Q, M]`: those of one bell as wide as the mixture."""
    loc, weights, scale = table.facts[0], table.facts[4], table.facts[7]
    centre = mean(table)
    variance = (weights * (scale.square() + (loc - centre.unsqueeze(-1)).square_())).sum(-1)
    return torch.addcmul(centre, torch.logit(q) / _LOGISTIC, variance.sqrt())


def _advance(facts: Tensor, search: _Search) -> tuple[_Search, Tensor]:
    """One step, and which searches are at their root after it.

    Halley's method on the logit of the distribution function, which is nearly straight where one bell
    dominates; the bracket is halved where a step would leave it or the last one has not halved the miss.
    A search ends where it already stood at its root, or where Taylor's remainder says that the step led there.
    """
    q, logit, jerk, y, low, high, before = search
    below, density, slope = _evaluate(facts, y)
    excess = below - q
    above = excess > 0
    low, high = torch.where(above, low, y), torch.where(above, y, high)
    variance = below * (1 - below)
    newton = (torch.logit(below) - logit) * variance / density
    bend = slope / density - density * (1 - 2 * below) / variance
    move = newton / (newton * bend / 2).clamp(-0.8, 0.8).sub_(1)
    proposed, miss = y + move, excess.abs()
    trusted = (proposed > low) & (proposed < high) & (2 * miss < before)
    left = (excess + move * (density + slope * move / 2)).abs() + jerk * move.abs().pow(3) / 6
    stays = miss <= _TOLERANCE
    solved = stays | (trusted & (left <= _TOLERANCE))
    following = torch.where(stays, y, torch.where(trusted, proposed, (low + high) / 2))
    return _Search(q, logit, jerk, following, low, high, miss), solved
