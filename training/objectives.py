"""What each network is trained for: likelihood of the next patches, of the next tokens, and reconstruction."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.calendars import calendar_features
from models.candles import CLOSE, COLUMNS, VARIATES, VOLUME, Floats
from models.kronos.forecaster import normalise
from models.kronos.network import KronosPredictor
from models.kronos.quantizer import entropy_penalty, quantize
from models.kronos.tokenizer import KronosTokenizer
from models.toto.network import TotoNetwork
from models.toto.transform import Transform
from training.augment import aggregate, mirror, mirrored_bars, scale_moves
from training.initial import frozen_location
from training.loop import Batch
from training.losses import Loss, nll
from training.simulated import partly_simulated
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
    simulated: float = 0.0  # share of the windows
    mirrored: bool = False  # every other window of real candles, by the toss of a coin
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
        if self.mirrored:
            candles = mirror(candles, self.rng.random(rows) < 0.5)
        candles = partly_simulated(candles, self.simulated, self.rng)
        encoded = self.transform.encode(candles, self.context)
        values = torch.from_numpy(encoded.astype(np.float32)).transpose(1, 2)
        steps = np.sort(self.rng.choice(self.network.config.patch_size, self.steps_drawn, replace=False))
        return values, torch.from_numpy(steps).expand(rows, -1)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """By variate, weighted."""
        values, steps = batch[0], batch[1][0]
        patch = self.network.config.patch_size
        context = values[..., : self.context]
        loc, scale = self.network.scale(context)
        hidden = self.network.embed(context, loc, scale)  # [B, V, P, D]
        head, bias = self.network.composed_head(slice(None) if len(steps) == patch else steps)
        projected = torch.einsum("bvpd,skd->bvpsk", hidden, head) + bias
        targets = values[..., patch:].unflatten(-1, (-1, patch))[..., steps]  # [B, V, P, S]
        scaled = (targets - loc.unsqueeze(-1)) / scale.unsqueeze(-1)
        variate = torch.ones(len(VARIATES), device=values.device)
        variate[CLOSE], variate[VOLUME] = self.close_weight, self.volume_weight
        losses = self.pointwise(self.network.mixture(projected.float()), scaled).mean((0, 2, 3))
        return dict(zip(VARIATES, (losses * variate / variate.sum()).unbind(), strict=True))

    def after_step(self) -> None:
        with torch.no_grad():
            for parameter, start, mask in self._frozen:
                parameter.copy_(torch.where(mask, start, parameter))


@dataclass
class _KronosWindows:
    """Normalised windows: statistics from the lookback only, every bar `mirrored` or not by the toss of a coin.

    What is left to learn is then volatility, shapes and gaps; a few years of a few symbols would teach a direction
    that does not last.
    """

    sampler: WindowSampler
    lookback: int
    rng: np.random.Generator
    mirrored: bool
    simulated: float  # share of the windows, at the times of real ones

    def draw(self, rows: int) -> tuple[Floats, Tensor]:
        """Candles `[B, L, 6]` in their own units, and calendar features `[B, L, 5]`."""
        windows = self.sampler.draw(rows, self.rng)
        signs = np.where(self.rng.random(windows.candles.shape[:2]) < 0.5, -1.0, 1.0)
        candles = partly_simulated(windows.candles, self.simulated, self.rng)
        candles = scale_moves(candles, signs) if self.mirrored else candles
        stamps = np.stack([calendar_features(local) for local in windows.local_times])
        return candles, torch.from_numpy(stamps)


def normalised_windows(candles: Floats, lookback: int) -> np.ndarray:
    """`[B, L, 6]` windows in float32, each standardised by its first `lookback` candles as serving does."""
    return np.stack([normalise(window, window[:lookback]) for window in candles]).astype(np.float32)


class TokenizerReconstruction:
    """Reconstruction from the coarse and from all bits, plus commitment and entropy of the code.

    loss = mse(coarse) + mse(all) + beta E|code - z|^2 + zeta (gamma0 H(bits|z) - gamma H(bits)), as upstream, where
    the squared errors of a variate count by its weight.
    """

    def __init__(
        self,
        network: KronosTokenizer,
        sampler: WindowSampler,
        lookback: int,
        rng: np.random.Generator,
        *,
        mirrored: bool = False,
        simulated: float = 0.0,
        weights: Sequence[float] = (1.0,) * len(COLUMNS),
    ):
        self.network, self.rng = network, rng
        self._windows = _KronosWindows(sampler, lookback, rng, mirrored, simulated)
        self._weights = torch.tensor(weights) * (len(weights) / sum(weights))

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.network.parameters()

    def draw(self, rows: int) -> Batch:
        """Normalised candles `[B, L, 6]`."""
        candles, _ = self._windows.draw(rows)
        return (torch.from_numpy(normalised_windows(candles, self._windows.lookback)),)

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
            "mse_coarse": self._error(from_coarse, candles),
            "mse_all": self._error(from_all, candles),
            "commitment": config.beta * commitment,
            "entropy": config.zeta * entropy,
        }

    def _error(self, reconstructed: Tensor, candles: Tensor) -> Tensor:
        return ((reconstructed.float() - candles).square() * self._weights.to(candles.device)).mean()

    def after_step(self) -> None: ...


class NextToken:
    """Teacher-forced cross-entropy of both halves of the next token; targets inside the lookback count little.

    Where bars are `mirrored`, each target counts half, and half what it would be had the bar moved the other way, which
    was as likely: the coin would otherwise teach, by luck, directions that its expectation does not have.
    """

    def __init__(
        self,
        network: KronosPredictor,
        tokenizer: KronosTokenizer,
        sampler: WindowSampler,
        lookback: int,
        rng: np.random.Generator,
        *,
        lookback_weight: float = 0.05,
        mirrored: bool = False,
        simulated: float = 0.0,
    ):
        self.network, self.rng = network, rng
        self._tokenizer = tokenizer.eval()
        self._windows = _KronosWindows(sampler, lookback, rng, mirrored, simulated)
        self._lookback, self._lookback_weight = lookback, lookback_weight

    def parameters(self) -> Iterable[nn.Parameter]:
        return self.network.parameters()

    def draw(self, rows: int) -> Batch:
        """Normalised candles `[B, L, 6]`, calendar features `[B, L, 5]`, and where bars are mirrored their images."""
        candles, stamps = self._windows.draw(rows)
        if not self._windows.mirrored:
            return torch.from_numpy(normalised_windows(candles, self._lookback)), stamps
        both = normalised_windows(np.concatenate([candles, mirrored_bars(candles)], axis=1), self._lookback)
        return torch.from_numpy(both[:, : candles.shape[1]]), stamps, torch.from_numpy(both[:, candles.shape[1] :])

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Of coarse and fine tokens, half the mean entropy each."""
        candles, stamps, *images = batch
        with torch.no_grad():
            coarse, fine = self._tokenizer.encode(candles)
            targets = [(coarse[:, 1:], fine[:, 1:]), *(self._mirrored_tokens(candles, image) for image in images)]
        hidden = self.network.hidden(coarse[:, :-1], fine[:, :-1], stamps[:, :-1])
        logits = self.network.head.proj_s1(hidden)
        weight = torch.full(hidden.shape[1:2], self._lookback_weight, device=candles.device)
        weight[self._lookback - 1 :] = 1.0
        weight /= weight.sum() * 2 * len(targets)
        of_coarse = [_entropy(logits, following) @ weight for following, _ in targets]
        of_fine = [_entropy(self.network.fine(hidden, given), following) @ weight for given, following in targets]
        return {"coarse": torch.stack(of_coarse).sum(), "fine": torch.stack(of_fine).sum()}

    def _mirrored_tokens(self, candles: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
        """Coarse and fine `[B, T - 1]` of every bar but the first, mirrored while the bar before it is not."""
        odd = torch.arange(candles.shape[1], device=candles.device) % 2 == 1
        passes = [self._tokenizer.encode(torch.where(turn[:, None], mirrored, candles)) for turn in (odd, ~odd)]
        coarse, fine = (torch.where(odd, first, second) for first, second in zip(*passes, strict=True))
        return coarse[:, 1:], fine[:, 1:]

    def after_step(self) -> None: ...


def _entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """`[T]` mean over the rows of the cross-entropy of `[B, T, tokens]` and `[B, T]`."""
    found = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return found.view(len(targets), -1).mean(0)
