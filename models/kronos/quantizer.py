"""Binary spherical quantisation: a vector's signs are its token (Zhao et al. 2024, arXiv 2406.07548)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def quantize(z: Tensor) -> Tensor:
    """Signs of `z` `[..., bits]` as +-1 / sqrt(bits), with a straight-through gradient to the unit sphere."""
    unit = F.normalize(z, dim=-1)
    signs = torch.where(unit > 0, 1.0, -1.0)
    code: Tensor = (unit + (signs - unit).detach()) * z.shape[-1] ** -0.5
    return code


def pack_bits(code: Tensor) -> Tensor:
    """Index of each code `[..., bits]`: bit i is set where component i is positive.

    Shifted, not raised to a power: compiled for CPUs, a power of integers comes out as the bits of a double.
    """
    places = torch.arange(code.shape[-1], device=code.device)
    weights = torch.bitwise_left_shift(torch.ones_like(places), places)
    return torch.where(code > 0, weights, 0).sum(-1)


def unpack_bits(index: Tensor, bits: int) -> Tensor:
    """Components `[..., bits]` of +-1 for each index."""
    shifted = torch.bitwise_right_shift(index.unsqueeze(-1), torch.arange(bits, device=index.device))
    return torch.bitwise_and(shifted, 1).float() * 2 - 1


def entropy_penalty(z: Tensor, group: int, *, per_sample: float, codebook: float) -> Tensor:
    """per_sample x E[H(bits | z)] - codebook x H(E[bits]): confident codes, all of them used.

    `z` `[..., bits]` lies on the unit sphere; the codebook's entropy is approximated by groups of `group` bits.
    """
    bits = z.shape[-1]
    on = torch.sigmoid(4 * z * bits**-0.5)
    probabilities = torch.stack((on, 1 - on), dim=-1)
    certain = -(probabilities * (probabilities + 1e-8).log()).sum((-1, -2)).mean()
    codes = unpack_bits(torch.arange(2**group, device=z.device), group) * bits**-0.5
    soft = (2 * z.unflatten(-1, (-1, group)) @ codes.T).softmax(-1)  # [..., groups, 2^group]
    usage = soft.flatten(0, -3).mean(0)
    used = -(usage * (usage + 1e-8).log()).sum(-1).sum()
    penalty: Tensor = per_sample * certain - codebook * used
    return penalty
