"""Logits and uniforms to tokens: temperature, top-k and top-p per row, without a random generator."""

from typing import NamedTuple

import torch
from torch import Tensor


class Filters(NamedTuple):
    """Per symbol, `[B]` each."""

    top_k: Tensor  # 0: off
    top_p: Tensor  # 1: off


def sample(logits: Tensor, uniforms: Tensor, temperature: Tensor, filters: Filters | None) -> Tensor:
    """Tokens `[B, S]` by inverting, at `uniforms` `[B, S]`, the distribution function over token indices.

    `logits` `[B, S, tokens]`, `temperature` `[B]`. `filters` None gives every row the bits that filters which
    are all off would give it: a batch without filters need not rank its tokens.
    """
    probs = (logits / temperature.view(-1, 1, 1)).softmax(-1)
    if filters is not None:
        probs = torch.where(probs >= _threshold(probs, filters), probs, 0.0)
    mass = probs.cumsum(-1)
    target = uniforms.unsqueeze(-1) * mass[..., -1:]
    return (mass <= target).sum(-1).clamp_max(logits.shape[-1] - 1)


def _threshold(probs: Tensor, filters: Filters) -> Tensor:
    """The smallest probability that is kept, `[B, S, 1]`; ties with it are kept, so no order among equals matters.

    Top-k comes first; top-p keeps the smallest set of what is left whose probability exceeds it (Holtzman et
    al. 2019, arXiv 1904.09751).
    """
    top_k, top_p = (control.view(-1, 1, 1) for control in filters)
    ranked = probs.sort(dim=-1, descending=True).values
    rank = torch.arange(probs.shape[-1], device=probs.device)
    ranked = torch.where(rank < torch.where(top_k > 0, top_k, probs.shape[-1]), ranked, 0.0)
    before = ranked.cumsum(-1) - ranked
    enough = top_p * ranked.sum(-1, keepdim=True)
    kept = (top_p >= 1) | (before <= enough) | (rank == 0)
    return torch.where(kept & (ranked > 0), ranked, torch.inf).amin(-1, keepdim=True)
