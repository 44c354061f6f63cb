"""What a mixture of Student-Ts may be fitted by: losses of every target, in the units of the scaler."""

from collections.abc import Callable, Mapping
from typing import Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.toto.mixture import cdf, log_density, quantiles, tabulate
from models.toto.network import Mixture

LossName = Literal["nll", "robust", "huber", "pinball", "gaussian"]
Loss = Callable[[Mixture, Tensor], Tensor]  # mixtures [..., K], targets [...] -> [...]

_LIKELIHOOD_SHARE: Final = 0.575  # the published model's weight of the likelihood, beside the robust loss
_ROBUST_SCALE: Final = 0.1
_LEVELS: Final = tuple(round(k / 10, 1) for k in range(1, 10))


def nll(mixture: Mixture, y: Tensor) -> Tensor:
    """Negative log-likelihood."""
    return -log_density(mixture, y)


def robust(mixture: Mixture, y: Tensor) -> Tensor:
    """As Toto was trained: likelihood, and the Cauchy case of the general robust loss of the mean (Barron 2019,
    arXiv 1701.03077)."""
    miss = (_mean(mixture) - y) / _ROBUST_SCALE
    return _LIKELIHOOD_SHARE * nll(mixture, y) + (1 - _LIKELIHOOD_SHARE) * torch.log1p(0.5 * miss**2)


def huber(mixture: Mixture, y: Tensor) -> Tensor:
    """Of the mean alone: nothing is learned about the spread."""
    return F.huber_loss(_mean(mixture), y, reduction="none")


def gaussian(mixture: Mixture, y: Tensor) -> Tensor:
    """Negative log-likelihood of the Gaussian that has the mixture's mean and variance."""
    mean, weights = _mean(mixture), mixture.log_weights.exp()
    spread = mixture.scale**2 * mixture.df / (mixture.df - 2) + (mixture.loc - mean.unsqueeze(-1)) ** 2
    return F.gaussian_nll_loss(mean, y, (weights * spread).sum(-1), full=True, reduction="none")


def pinball(mixture: Mixture, y: Tensor) -> Tensor:
    """Mean over the levels 0.1 … 0.9. Degrees of freedom get no gradient from it."""
    levels = torch.tensor(_LEVELS, device=y.device).view(-1, *[1] * y.ndim)
    miss = y - _moving_quantiles(mixture)
    return torch.maximum(levels * miss, (levels - 1) * miss).mean(0)


def _moving_quantiles(mixture: Mixture) -> Tensor:
    """`[Q, ...]` quantiles with their gradients: dq = -dF(q) / f(q), F the distribution function, f the density."""
    _, loc, scale, log_weights = mixture
    with torch.no_grad():
        q = quantiles(tabulate(mixture), _LEVELS).float()
        density = log_density(mixture, q).exp()
        df, loc_, scale_ = (part.unsqueeze(-1).expand(len(q), *part.shape, 1) for part in mixture[:3])
        alone = Mixture(df, loc_, scale_, torch.zeros_like(df))  # each component as a mixture of its own
        at = q.unsqueeze(-1).expand(len(q), *loc.shape)
        below, peak = cdf(tabulate(alone), at).float(), log_density(alone, at).exp()
    moved = (q.unsqueeze(-1) - loc) / scale  # a component's F depends on loc and scale through this alone
    weights = log_weights.exp()
    change = weights * below + weights.detach() * peak * scale.detach() * moved
    total = change.sum(-1)
    return q - (total - total.detach()) / density


def _mean(mixture: Mixture) -> Tensor:
    expected: Tensor = (mixture.log_weights.exp() * mixture.loc).sum(-1)
    return expected


LOSSES: Final[Mapping[LossName, Loss]] = {
    "nll": nll,
    "robust": robust,
    "huber": huber,
    "pinball": pinball,
    "gaussian": gaussian,
}
