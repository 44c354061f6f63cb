"""Causal patch scaling: every patch is standardised by the statistics of all values up to its end."""

from typing import NamedTuple

import torch
from torch import Tensor

MINIMUM_VARIANCE = 0.1


class Statistics(NamedTuple):
    """What the scale of the next patch needs of all values before it, float64; more axes may follow the first two."""

    seen: Tensor  # [B, 1] values
    mean: Tensor  # [B, V]
    squares: Tensor  # [B, V] summed squared deviations
    floor: Tensor  # [B, V] bounds of the scale, from the context alone
    ceiling: Tensor  # [B, V]


def causal_patch_scale(
    values: Tensor, weights: Tensor, patch: int, exponent: float | None
) -> tuple[Tensor, Tensor, Statistics]:
    """Mean and scale per patch, both `[B, V, P]` in float32, of `values` `[B, V, T]`, and what `extend` starts from.

    `weights` `[B, 1, T]` is 1 for real candles and 0 for padding, whose values must be 0. Variances follow
    Welford's recurrence in float64 with Bessel's correction, plus 0.1. `exponent` e bounds the scale to
    10^-e … 10^e of the scale of the whole context (`stabilize_with_global`); None leaves it free.
    """
    x, w = values.double(), weights.double()
    total = w.cumsum(-1)
    count = total.clamp_min(1.0)
    mean = (x * w).cumsum(-1) / count
    before = torch.cat([torch.zeros_like(mean[..., :1]), mean[..., :-1]], dim=-1)
    squares = ((x - before) * (x - mean) * w).cumsum(-1)
    ends = slice(patch - 1, None, patch)
    floor, ceiling = _bounds(x, w, exponent)
    scale = _scale(count[..., ends], squares[..., ends], floor.unsqueeze(-1), ceiling.unsqueeze(-1))
    reached = Statistics(total[..., -1], mean[..., -1], squares[..., -1], floor, ceiling)
    return mean[..., ends].float(), scale.float(), reached


def extend(reached: Statistics, patch: Tensor) -> tuple[Tensor, Tensor, Statistics]:
    """Location and scale `[B, V, …]` in float32 of one more `patch` `[B, V, …, S]` of real values.

    Two sets of deviations merge as in Chan, Golub and LeVeque (1979). The bounds stay those of the context.
    """
    x, new = patch.double(), patch.shape[-1]
    count = reached.seen + new
    centre = x.mean(-1)
    shift = centre - reached.mean
    mean = reached.mean + shift * (new / count)
    inside = (x - centre.unsqueeze(-1)).square().sum(-1)
    squares = reached.squares + inside + shift.square() * (reached.seen * new / count)
    merged = Statistics(count, mean, squares, reached.floor, reached.ceiling)
    return mean.float(), _scale(count, squares, reached.floor, reached.ceiling).float(), merged


def _scale(count: Tensor, squares: Tensor, floor: Tensor, ceiling: Tensor) -> Tensor:
    free = (squares / (count - 1).clamp_min(1.0) + MINIMUM_VARIANCE).sqrt()
    return torch.minimum(torch.maximum(free, floor), ceiling)


def _bounds(x: Tensor, w: Tensor, exponent: float | None) -> tuple[Tensor, Tensor]:
    """Smallest and largest scale `[B, V]` of any patch."""
    total = w.sum(-1, keepdim=True).clamp_min(1.0)
    centre = (x * w).sum(-1, keepdim=True) / total
    overall = ((((x - centre) * w) ** 2).sum(-1) / total.squeeze(-1) + MINIMUM_VARIANCE).sqrt()
    if exponent is None:
        return torch.zeros_like(overall), torch.full_like(overall, torch.inf)
    return (overall * 10.0**-exponent).clamp_min(MINIMUM_VARIANCE), overall * 10.0**exponent
