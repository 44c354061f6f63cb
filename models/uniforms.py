"""Seed to uniforms: the only source of randomness. Networks receive these as an input."""

import hashlib

import numpy as np

from models.candles import Floats

MAX_SEED = 2**63 - 1


def derive_seed(*facts: object) -> int:
    """A seed in [0, 2^63) that is a pure function of `facts` (their str), equal on every machine."""
    text = "\x1f".join(str(fact) for fact in facts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") & MAX_SEED


def draw_uniforms(seed: int, samples: int, steps: int, draws: int) -> Floats:
    """Uniforms in [0, 1) of shape `[samples, steps, draws]`.

    Counter-based (Philox), so the first n paths are the same whatever `samples` is.
    """
    return np.random.Generator(np.random.Philox(key=seed)).random((samples, steps, draws))
