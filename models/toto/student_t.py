"""Student-T's distribution function as a polynomial: a few dozen elementwise operations, exact to 1e-9.

The upper tail is P(T > z) = (1 + z^2 / df)^(-df / 2) h, where h varies slowly. With w = z / sqrt(df + z^2) and
the stretch v = (1 + k) w / (1 + k w), k growing with the root of df, h is a polynomial in v whose coefficients
are polynomials in 1 / sqrt(df). Both are fitted to quadratures when this module is imported.
"""

import math
from typing import Final

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from models.candles import Floats

TERMS: Final = 14  # of h
_ROOT_TERMS: Final = 12
_STRETCH: Final = 0.4
_SMALLEST_ROOT: Final = math.sqrt(2)  # df >= 2
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(80)
_FARTHEST: Final = 10.0  # standard deviations after which a Gaussian integrand is nothing


def stretch(root: Tensor) -> Tensor:
    """The k of components whose square root of df is `root`."""
    return (root - _SMALLEST_ROOT) * _STRETCH


def coefficients(root: Tensor, out: Tensor) -> Tensor:
    """Write the coefficients of h, the constant first, for `root` `[...]` into `out` `[TERMS, ...]`, float64.

    Returns the density at 0 `[...]`.
    """
    x = (2 * _SMALLEST_ROOT / root - 1).flatten()  # in [-1, 1]
    fitted = _COEFFICIENTS.to(x.device)
    powers = torch.empty(_ROOT_TERMS, x.numel(), dtype=x.dtype, device=x.device)
    powers[0] = 1
    for index in range(1, _ROOT_TERMS):
        torch.mul(powers[index - 1], x, out=powers[index])
    torch.mm(fitted[:TERMS], powers, out=out.view(TERMS, -1))
    return (fitted[TERMS] @ powers).view_as(root)


def centred_cdf(a: Tensor, half_df: Tensor, k: Tensor, h: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """P(T <= z) - 1/2 at `a` = z / sqrt(df), (1 + a^2)^(-df / 2) and (1 + a^2)^(-1 / 2).

    The product of the last two is the density over its peak. The other arguments are df / 2, `stretch` and `h`
    the first TERMS of `coefficients`, all of shapes that broadcast to that of `a`.
    """
    square = a * a
    root = (square + 1).rsqrt_()
    decay = square.log1p_().mul_(half_df).neg_().exp_()
    w = (a * root).abs_()
    stretched = k * w
    x = (stretched + w).mul_(2).div_(stretched.add_(1)).sub_(1)  # 2 v - 1
    tail = torch.addcmul(h[-2], h[-1], x)
    for coefficient in h[-3::-1]:
        torch.addcmul(coefficient, tail, x, out=tail)
    return tail.mul_(decay).neg_().add_(0.5).copysign_(a), decay, root


def _exact(z: Floats, df: Floats) -> tuple[Floats, Floats]:
    """h and the density at 0 by Gauss-Legendre quadrature; `z` and `df` are `[n]`."""
    halves = torch.from_numpy(df / 2)
    constant = (torch.lgamma(halves + 0.5) - torch.lgamma(halves)).exp().numpy() / math.sqrt(math.pi)
    half, spread = df[:, None] / 2, np.log1p(z * z / df)
    # Near the centre from the middle, z = sqrt(df) tan(a); far from it outwards, 1 + t^2 / df growing by exp(p^2).
    reach = np.arctan(np.minimum(z, 1) / np.sqrt(df))
    angles = reach[:, None] * (_NODES + 1) / 2
    middle = constant * reach / 2 * (np.cos(angles) ** (2 * half - 1) @ _WEIGHTS)
    p = _FARTHEST / 2 * (_NODES + 1)
    grown = np.sqrt(-np.expm1(-(p**2) / (2 * half) - np.maximum(spread, np.log1p(1 / df))[:, None]))
    outer = constant / df * _FARTHEST / 2 * (np.exp(-(p**2) / 2) * p / grown @ _WEIGHTS)
    near = (0.5 - middle) * np.exp(np.minimum(df / 2 * spread, 1))
    return np.where(z < 1, near, outer), constant / np.sqrt(df)


def _fitted() -> Tensor:
    """`[TERMS + 1, _ROOT_TERMS]`: what turns powers of the root into `coefficients`."""
    at, roots_at = (chebyshev.chebpts1(count) for count in (TERMS, _ROOT_TERMS))
    x, root = (grid.ravel() for grid in np.meshgrid(at, 2 * _SMALLEST_ROOT / (roots_at + 1), indexing="ij"))
    k = (root - _SMALLEST_ROOT) * _STRETCH
    w = (x + 1) / 2 / (1 + k - k * (x + 1) / 2)
    h, peak = (found.reshape(TERMS, -1) for found in _exact(w * root / np.sqrt(1 - w * w), root**2))
    by_root = np.vstack([_monomials(at, h), peak[:1]])
    return torch.from_numpy(np.ascontiguousarray(_monomials(roots_at, by_root.T).T))


def _monomials(points: Floats, values: Floats) -> Floats:
    """Coefficients `[n, m]` of the polynomials through `values` `[n, m]` at Chebyshev's `points` `[n]`."""
    by_chebyshev = np.linalg.solve(chebyshev.chebvander(points, len(points) - 1), values)
    return np.stack([chebyshev.cheb2poly(column) for column in by_chebyshev.T], axis=1)


_COEFFICIENTS: Final = _fitted()
