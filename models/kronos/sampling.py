"""Logits and uniforms to tokens: temperature, top-k and top-p per row, without a random generator or a sort."""

from typing import Final

import torch
from torch import Tensor

_STEPS: Final = 2**16  # a token's probability is compared in steps of the row's largest / 2^16
_BINS: Final = 2**8  # two looks of 2^8 bins each find one step of 2^16
_UNIT: Final = 2.0**30  # probabilities are summed as whole multiples of the row's largest / 2^30 ...
_ONE: Final = 2**44  # ... and counted in the bits above all of these sums


def sample(logits: Tensor, uniforms: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Indices `[B, S]` by inverting, at `uniforms` `[B, S]`, the distribution function over `logits` `[B, S, tokens]`.

    `temperature`, `top_k` (0: off) and `top_p` (1: off) are `[B]`. Top-k comes first; top-p keeps the smallest set
    of what is left whose probability exceeds it (Holtzman et al. 2019, arXiv 1904.09751). Tokens tie, and are kept
    or dropped together, where floor(2^16 p / largest p of the row) is equal: less than 2^-16 of the largest apart.

    The threshold comes from whole numbers alone, whose sums do not depend on their order, in a fixed number of
    operations: a row has the same bits in any batch, and filters that are off those of no filters.
    """
    probs = (logits / temperature.view(-1, 1, 1)).softmax(-1)  # the same bits wherever a row lies
    if _may_filter(top_k, top_p):
        share = probs / probs.amax(-1, keepdim=True)
        step = (share * _STEPS).floor()
        kept = step >= _threshold(share, step, top_k.view(-1, 1, 1), top_p.view(-1, 1, 1))
        probs = torch.where(kept, probs, 0.0)
    mass = probs.cumsum(-1)
    target = uniforms.unsqueeze(-1) * mass[..., -1:]
    return (mass <= target).sum(-1).clamp_max(logits.shape[-1] - 1)


def _may_filter(top_k: Tensor, top_p: Tensor) -> bool:
    """Whether any row might have a filter: half of a step's work, which is asked for where asking costs nothing."""
    if torch.compiler.is_compiling() or type(top_p) is not Tensor or top_p.device.type != "cpu":
        return True  # being traced, without numbers, or on a device that would have to be waited for
    return bool(((top_k > 0) | (top_p < 1)).any())


def _threshold(share: Tensor, step: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The smallest step that is kept, `[B, S, 1]`."""
    tokens = share.shape[-1]
    entries = (share * _UNIT).long() + _ONE
    overview = _tally(((_STEPS - step) / _BINS).ceil(), entries)
    wanted = torch.where(top_k > 0, top_k.clamp_max(tokens), tokens) * _ONE

    edge = _edge(overview < wanted)
    tally = _tally(edge - step, entries)
    place = (tally < wanted).sum(-1, keepdim=True).clamp_max(_BINS + 1)
    by_count = edge - place

    enough = (top_p.double() * (tally.gather(-1, place) % _ONE)).long()
    edge = _edge(overview % _ONE <= enough)
    by_mass = edge - (_tally(edge - step, entries) % _ONE <= enough).sum(-1, keepdim=True)
    return torch.maximum(by_count, torch.where(top_p < 1, by_mass, 0))


def _tally(depth: Tensor, entries: Tensor) -> Tensor:
    """Summed `entries` of the tokens no deeper than 0, 1, ... bins, and of all: `[B, S, bins + 2]`."""
    bins = depth.long().clamp(0, _BINS + 1)  # in this order a logit that is no number still has a bin
    empty = entries.new_zeros(*entries.shape[:-1], _BINS + 2)
    return empty.scatter_add(-1, bins, entries).cumsum(-1)


def _edge(short: Tensor) -> Tensor:
    """The step above the bin of the overview that is the first not to fall `short`."""
    return _STEPS + _BINS - _BINS * short.sum(-1, keepdim=True)
