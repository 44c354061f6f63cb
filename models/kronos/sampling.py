"""Logits and uniforms to tokens: temperature, top-k and top-p per row, without a random generator."""

import torch
from torch import Tensor


def sample(logits: Tensor, uniforms: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Tokens `[B, S]` by inverting, at `uniforms` `[B, S]`, the distribution function over token indices.

    `logits` `[B, S, tokens]`; `temperature`, `top_k` (0: off) and `top_p` (1: off) are `[B]`. Top-k comes first
    and top-p keeps the smallest set of what is left whose probability exceeds it (Holtzman et al. 2019, arXiv
    1904.09751). Ties with the last kept token are kept, so that no order among equals matters.
    """
    probs = (logits / temperature.view(-1, 1, 1)).softmax(-1)
    ranked = probs.sort(dim=-1, descending=True).values
    rank = torch.arange(logits.shape[-1], device=logits.device)
    limit = torch.where(top_k > 0, top_k, logits.shape[-1]).view(-1, 1, 1)
    ranked = torch.where(rank < limit, ranked, 0.0)
    before = ranked.cumsum(-1) - ranked
    enough = top_p.view(-1, 1, 1) * ranked.sum(-1, keepdim=True)
    kept = (ranked > 0) & ((before <= enough) | (rank == 0))
    threshold = torch.where(kept, ranked, torch.inf).amin(-1, keepdim=True)
    mass = torch.where(probs >= threshold, probs, 0.0).cumsum(-1)
    target = uniforms.unsqueeze(-1) * mass[..., -1:]
    return (mass <= target).sum(-1).clamp_max(logits.shape[-1] - 1)
