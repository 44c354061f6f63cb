"""Losses of a Student-T mixture, against torch's distributions and finite differences."""

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, Normal, StudentT

from models.toto.mixture import quantiles, tabulate
from models.toto.network import Mixture
from training.losses import LOSSES

LEVELS = tuple(k / 10 for k in range(1, 10))


@pytest.fixture
def raw():
    """df, loc, scale, logits, each `[5, 3]`, and targets `[5]`."""
    torch.manual_seed(0)
    parts = (3 + 4 * torch.rand(5, 3), torch.randn(5, 3), 0.3 + torch.rand(5, 3), torch.randn(5, 3))
    return [part.requires_grad_() for part in parts], 2 * torch.randn(5)


def mixture_of(parts):
    return Mixture(*parts[:3], parts[3].log_softmax(-1))


def reference(parts):
    df, loc, scale, logits = parts
    return MixtureSameFamily(Categorical(logits=logits), StudentT(df, loc, scale))


@torch.no_grad()
def pinball(parts, y):
    q = quantiles(tabulate(mixture_of(parts)), LEVELS)
    levels = torch.tensor(LEVELS, dtype=torch.float64)[:, None]
    miss = y.double() - q
    return torch.where(miss > 0, levels * miss, (levels - 1) * miss).mean(0)


SLOW = {
    "nll": lambda parts, y: -reference(parts).log_prob(y),
    "robust": lambda parts, y: (
        -0.575 * reference(parts).log_prob(y) + 0.425 * torch.log1p(((reference(parts).mean - y) / 0.1) ** 2 / 2)
    ),
    "huber": lambda parts, y: torch.nn.HuberLoss(reduction="none")(reference(parts).mean, y),
    "gaussian": lambda parts, y: -Normal(reference(parts).mean, reference(parts).variance.sqrt()).log_prob(y),
    "pinball": pinball,
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_is_that_of_torchs_distributions(raw, name):
    parts, y = raw
    expected = SLOW[name](parts, y).float()
    torch.testing.assert_close(LOSSES[name](mixture_of(parts), y), expected, rtol=1e-4, atol=1e-5)


def test_pinball_moves_location_scale_and_weights_as_differences_say(raw):
    """The quantiles have no formula: their gradient is that of the distribution function they solve."""
    parts, y = raw
    LOSSES["pinball"](mixture_of(parts), y).sum().backward()
    assert parts[0].grad is None
    for part in parts[1:]:
        for place in ((0, 0), (2, 1), (4, 2)):
            change = torch.zeros_like(part)
            change[place] = 1e-2
            with torch.no_grad():
                up, down = ([p + s * change if p is part else p for p in parts] for s in (1, -1))
                slope = float((pinball(up, y) - pinball(down, y)).sum()) / 2e-2
            assert float(part.grad[place]) == pytest.approx(slope, rel=0.02, abs=1e-3)
