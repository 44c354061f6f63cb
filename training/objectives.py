"""What each network is trained for: likelihood of the next patches, of the next tokens, and reconstruction."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.calendars import calendar_features
from models.candles import CLOSE, VARIATES, VOLUME, Floats
from models.kronos.forecaster import normalise
from models.kronos.network import KronosPredictor
from models.kronos.quantizer import entropy_penalty, quantize
from models.kronos.tokenizer import KronosTokenizer
from models.toto.network import TotoNetwork
from models.toto.transform import Transform
from training.augment import aggregate, mirror, scale_moves
from training.initial import frozen_location
from training.loop import Batch
from training.losses import Loss, nll
from training.windows import WindowSampler


@dataclass
class NextPatch:
    """Loss, by default the likelihood, of every next patch of a window, at `steps_drawn` of its steps per update.

    Unembedding and head are one linear map, so a step that is not drawn costs nothing.
    """

    network: TotoNetwork
    samplers: dict[int, WindowSampler]  # bars merged into one -> windows
    transform: Transform
    context: int
    rng: np.random.Generator
    pointwise: Loss = nll
    holds_location: bool = True  # as the random walk has it
    steps_drawn: int = 16
    close_weight: float = 2.0
    volume_weight: float = 0.2

    def __post_init__(self) -> None:
        held = frozen_location(self.network) if self.holds_location else []
        self._frozen = [(p, p.detach().clone(), mask) for p, mask in held]

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.network.parameters()

    def draw(self, rows: int) -> Batch:
        """Encoded candles `[B, V, T + S]`, and the steps of a patch `[B, steps_drawn]`, the same in every row."""
        bars = int(self.rng.choice(list(self.samplers)))
        candles = aggregate(self.samplers[bars].draw(rows, self.rng).candles, bars)
        candles = mirror(candles, self.rng.random(rows) < 0.5)
        encoded = self.transform.encode(candles, self.context)
        values = torch.from_numpy(encoded.astype(np.float32)).transpose(1, 2)
        steps = np.sort(self.rng.choice(self.network.config.patch_size, self.steps_drawn, replace=False))
        return values, torch.from_numpy(steps).expand(rows, -1)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """By variate, weighted."""
        values, steps = batch[0], batch[1][0]
        patch = self.network.config.patch_size
        context = values[..., : self.context]
        weights = torch.ones_like(context[:, :1])
        loc, scale = self.network.scale(context, weights)
        hidden = self.network.embed(context, weights, loc, scale)  # [B, V, P, D]
        head, bias = self.network.composed_head()
        projected = torch.einsum("bvpd,skd->bvpsk", hidden, head[steps]) + bias[steps]
        targets = values[..., patch:].unflatten(-1, (-1, patch))[..., steps]  # [B, V, P, S]
        scaled = (targets - loc.unsqueeze(-1)) / scale.unsqueeze(-1)
        variate = torch.ones(len(VARIATES))
        variate[CLOSE], variate[VOLUME] = self.close_weight, self.volume_weight
        losses = self.pointwise(self.network.mixture(projected.float()), scaled).mean((0, 2, 3))
        return dict(zip(VARIATES, (losses * variate / variate.sum()).unbind(), strict=True))

    def after_step(self) -> None:
        with torch.no_grad():
            for parameter, start, mask in self._frozen:
                parameter.copy_(torch.where(mask, start, parameter))


@dataclass
class _KronosWindows:
    """Normalised windows: statistics from the lookback only, every bar mirrored or not by the toss of a coin.

    What is left to learn is volatility, shapes and gaps; a few years of a few symbols would teach a direction
    that does not last.
    """

    sampler: WindowSampler
    lookback: int
    rng: np.random.Generator

    def draw(self, rows: int) -> tuple[Tensor, Tensor]:
        """Candles `[B, L, 6]` and calendar features `[B, L, 5]`."""
        windows = self.sampler.draw(rows, self.rng)
        signs = np.where(self.rng.random(windows.candles.shape[:2]) < 0.5, -1.0, 1.0)
        candles = scale_moves(windows.candles, signs)
        stamps = np.stack([calendar_features(local) for local in windows.local_times])
        return torch.from_numpy(normalised_windows(candles, self.lookback)), torch.from_numpy(stamps)


def normalised_windows(candles: Floats, lookback: int) -> np.ndarray:
    """`[B, L, 6]` windows in float32, each standardised by its first `lookback` candles as serving does."""
    return np.stack([normalise(window, window[:lookback]) for window in candles]).astype(np.float32)


class TokenizerReconstruction:
    """Reconstruction from the coarse and from all bits, plus commitment and entropy of the code.

    loss = mse(coarse) + mse(all) + beta E|code - z|^2 + zeta (gamma0 H(bits|z) - gamma H(bits)), as upstream.
    """

    def __init__(self, network: KronosTokenizer, sampler: WindowSampler, lookback: int, rng: np.random.Generator):
        self.network, self.rng = network, rng
        self._windows = _KronosWindows(sampler, lookback, rng)

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.network.parameters()

    def draw(self, rows: int) -> Batch:
        return self._windows.draw(rows)[:1]

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """By term. The codebook's entropy is that of the batch it is given, and no mean over its rows."""
        (candles,) = batch
        config = self.network.config
        from_coarse, from_all, latent = self.network(candles)
        latent = latent.float()
        unit = F.normalize(latent, dim=-1)
        commitment = (quantize(latent).detach() - unit).square().sum(-1).mean()
        entropy = entropy_penalty(unit, config.group_size, per_sample=config.gamma0, codebook=config.gamma)
        return {
            "mse_coarse": F.mse_loss(from_coarse.float(), candles),
            "mse_all": F.mse_loss(from_all.float(), candles),
            "commitment": config.beta * commitment,
            "entropy": config.zeta * entropy,
        }

    def after_step(self) -> None: ...


class NextToken:
    """Teacher-forced cross-entropy of both halves of the next token; targets inside the lookback count little."""

    def __init__(
        self,
        network: KronosPredictor,
        tokenizer: KronosTokenizer,
        sampler: WindowSampler,
        lookback: int,
        rng: np.random.Generator,
        lookback_weight: float = 0.05,
    ):
        self.network, self.rng = network, rng
        self._tokenizer = tokenizer.eval()
        self._windows = _KronosWindows(sampler, lookback, rng)
        self._lookback, self._lookback_weight = lookback, lookback_weight

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.network.parameters()

    def draw(self, rows: int) -> Batch:
        return self._windows.draw(rows)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Of coarse and fine tokens, half the mean entropy each."""
        candles, stamps = batch
        with torch.no_grad():
            coarse, fine = self._tokenizer.encode(candles)
        logits = self.network(coarse[:, :-1], fine[:, :-1], stamps[:, :-1], coarse[:, 1:])
        weight = torch.full((candles.shape[1] - 1,), self._lookback_weight)
        weight[self._lookback - 1 :] = 1.0
        parts = {}
        for name, part, target in zip(("coarse", "fine"), logits, (coarse, fine), strict=True):
            entropy = F.cross_entropy(part.flatten(0, 1).float(), target[:, 1:].flatten(), reduction="none")
            parts[name] = (entropy.view(len(target), -1).mean(0) / 2 * weight).sum() / weight.sum()
        return parts

    def after_step(self) -> None: ...
