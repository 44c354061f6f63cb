"""Seed to uniforms: the only source of randomness. Networks receive these as an input."""

import hashlib
from typing import Final

import numpy as np

from models.candles import Floats

MAX_SEED = 2**63 - 1
_BELOW_ONE: Final = 1 - 2**-53


def derive_seed(*facts: object) -> int:
    """A seed in [0, 2^63) that is a pure function of `facts` (their str), equal on every machine."""
    text = "\x1f".join(str(fact) for fact in facts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") & MAX_SEED


def draw_uniforms(seed: int, samples: int, steps: int, draws: int, *, stratified: bool = False) -> Floats:
    """Uniforms in [0, 1) of shape `[samples, steps, draws]`, a pure function of the arguments (Philox).

    Independent ones are counted: the first n paths are the same whatever `samples` is. Stratified ones are not,
    since each depends on how many there are.
    """
    generator = np.random.Generator(np.random.Philox(key=seed))
    if not stratified:
        return generator.random((samples, steps, draws))
    pairs = _mirrored_pairs(generator, samples // 2, steps, draws)
    unpaired = generator.random((samples % 2, steps, draws))
    return np.minimum(np.concatenate((pairs, unpaired)), _BELOW_ONE)


def _mirrored_pairs(generator: np.random.Generator, pairs: int, steps: int, draws: int) -> Floats:
    """`[2 pairs, steps, draws]`: one uniform in every stratum of every draw, and 1 - u after every path's u.

    The pairs are dealt the strata anew for every step and draw (a Latin hypercube: McKay et al. 1979): each path by
    itself is uniform and independent from draw to draw, so that the paths spread as they would unstratified.
    """
    jitter, order, side = generator.random((3, pairs, steps, draws))
    lower = (order.argsort(axis=0, kind="stable") + jitter) / max(2 * pairs, 1)
    first = np.where(side < 0.5, lower, 1 - lower)
    return np.stack((first, 1 - first), axis=1).reshape(2 * pairs, steps, draws)
