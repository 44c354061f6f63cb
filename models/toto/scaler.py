"""Causal patch scaling: every patch is standardised by the statistics of all values up to its end."""

import torch
from torch import Tensor

MINIMUM_VARIANCE = 0.1


def causal_patch_scale(values: Tensor, weights: Tensor, patch: int, exponent: float | None) -> tuple[Tensor, Tensor]:
    """Mean and scale per patch, both `[B, V, P]` in float32, of `values` `[B, V, T]`.

    `weights` `[B, 1, T]` is 1 for real candles and 0 for padding, whose values must be 0. Variances follow
    Welford's recurrence in float64 with Bessel's correction, plus 0.1. `exponent` e bounds the scale to
    10^-e … 10^e of the scale of the whole context (`stabilize_with_global`); None leaves it free.
    """
    x, w = values.double(), weights.double()
    count = w.cumsum(-1).clamp_min(1.0)
    mean = (x * w).cumsum(-1) / count
    before = torch.cat([torch.zeros_like(mean[..., :1]), mean[..., :-1]], dim=-1)
    squares = ((x - before) * (x - mean) * w).cumsum(-1)
    ends = slice(patch - 1, None, patch)
    scale = (squares[..., ends] / (count[..., ends] - 1).clamp_min(1.0) + MINIMUM_VARIANCE).sqrt()
    if exponent is not None:
        total = w.sum(-1, keepdim=True).clamp_min(1.0)
        centre = (x * w).sum(-1, keepdim=True) / total
        overall = ((((x - centre) * w) ** 2).sum(-1, keepdim=True) / total + MINIMUM_VARIANCE).sqrt()
        floor = (overall * 10.0**-exponent).clamp_min(MINIMUM_VARIANCE)
        scale = torch.minimum(torch.maximum(scale, floor), overall * 10.0**exponent)
    return mean[..., ends].float(), scale.float()
