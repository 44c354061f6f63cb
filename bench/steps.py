"""Steps of fine-tuning all weights: this project's and the references' own, on the same weights, batch and loss.

Dropout is off on both sides, and Kronos' fine tokens are conditioned on the true coarse ones: what upstream draws at
random cannot be compared. `python -m bench.steps` prints what one of them needs at its peak, in a process of its own.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor, nn

from bench.processes import resident_bytes
from bench.published import kronos_weights, toto_weights
from bench.references import build_kronos, build_toto
from models.kronos.network import KronosPredictor, PredictorConfig
from models.kronos.tokenizer import KronosTokenizer, TokenizerConfig
from models.toto.network import TotoConfig, TotoNetwork
from models.toto.transform import transform_of
from training.loop import Batch, Fitting, Objective
from training.losses import LOSSES
from training.objectives import NextPatch, NextToken
from training.recipe import Phase
from training.windows import WindowSampler

Weights = Mapping[str, Tensor]
TOTO_ROWS, TOTO_CONTEXT = 4, 512  # the reference's batch by default, and the context of its recipe
KRONOS_ROWS, KRONOS_LENGTH = 16, 64 + 30
_STEPS: Final = 2  # the first makes the moments, the second needs them


@dataclass(frozen=True)
class Side:
    """Something that trains."""

    loss: Callable[[], Tensor]  # of the batch
    step: Callable[[], object]  # forward, backward, update
    weights: Weights  # as they are published


@dataclass
class _OneBatch:
    """An objective that draws the same windows for ever."""

    objective: NextPatch | NextToken
    batch: Batch

    def __post_init__(self) -> None:
        self.network: nn.Module = self.objective.network
        self.rng, self.loss = self.objective.rng, self.objective.loss
        self.parameters, self.after_step = self.objective.parameters, self.objective.after_step

    def draw(self, rows: int) -> Batch:
        return self.batch


def toto_batch(config: Mapping[str, Any], device: str) -> Tensor:
    """Five walks for each row, `[B, V, context + patch]`."""
    steps = np.random.default_rng(0).standard_normal((TOTO_ROWS, 5, TOTO_CONTEXT + config["patch_size"]))
    return torch.from_numpy(steps.cumsum(-1).astype(np.float32)).to(device)


def kronos_batch(device: str) -> tuple[Tensor, Tensor]:
    """Normalised candles `[B, L, 6]` and calendar features `[B, L, 5]`."""
    shape = (KRONOS_ROWS, KRONOS_LENGTH, 6)
    candles = torch.from_numpy(np.random.default_rng(0).standard_normal(shape).astype(np.float32))
    return candles.to(device), torch.ones(*shape[:2], 5, dtype=torch.int64, device=device)


def our_toto(config: Mapping[str, Any], device: str, weights: Weights | None = None, **how: Any) -> Side:
    """This project's loop on the reference's loss: every step of a patch, all variates alike."""
    values = toto_batch(config, device)
    network = TotoNetwork(TotoConfig.from_published(config)).to(device)
    if weights:
        network.load_state_dict(weights)
    patch = network.config.patch_size
    objective = NextPatch(
        network,
        samplers={},
        transform=transform_of(None),
        context=values.shape[-1] - patch,
        rng=np.random.default_rng(0),
        pointwise=LOSSES["robust"],
        holds_location=False,
        close_weight=1.0,
        volume_weight=1.0,
    )
    steps = torch.arange(patch, device=device).expand(len(values), -1)
    phase = Phase(steps=1, learning_rate=4e-5, betas=(0.9, 0.999), clip=1e9, batch_rows=len(values), **how)
    return _ours(_OneBatch(objective, (values, steps)), phase)


def our_kronos(config: Mapping[str, Any], device: str, weights: Weights | None = None, **how: Any) -> Side:
    """This project's loop on the reference's loss: every position counts alike."""
    tokenizer = KronosTokenizer(TokenizerConfig.from_published(config["tokenizer"]))
    predictor = KronosPredictor(PredictorConfig.from_published(config["predictor"]))
    both = nn.ModuleDict({"tokenizer": tokenizer, "predictor": predictor}).to(device)
    if weights:
        both.load_state_dict(weights)
    windows = cast(WindowSampler, None)  # the one batch is all that there is
    objective = NextToken(predictor, tokenizer, windows, 1, np.random.default_rng(0), lookback_weight=1.0)
    phase = Phase(steps=1, learning_rate=4e-5, weight_decay=0.1, clip=3.0, batch_rows=KRONOS_ROWS, **how)
    return _ours(_OneBatch(objective, kronos_batch(device)), phase)


def _ours(objective: Objective, phase: Phase) -> Side:
    batch = objective.draw(phase.batch_rows)
    fitting = Fitting(objective, phase)
    return Side(
        loss=lambda: torch.stack(list(objective.loss(batch).values())).sum(),
        step=partial(fitting.update, phase.learning_rate),
        weights=objective.network.state_dict(),
    )


def their_toto(config: Mapping[str, Any], device: str, precision: str = "float32") -> Side:
    """The reference's training step with its own loss and optimiser; it clips nothing."""
    from toto.data.util.dataset import CausalMaskedTimeseries
    from toto.model.lightning_module import TotoForFinetuning

    network = build_toto({**config, "dropout": 0.0})
    module = TotoForFinetuning(pretrained_backbone=network.get_submodule("model")).train().to(device)
    values = toto_batch(config, device)
    patch, length = config["patch_size"], values.shape[-1]
    whole = torch.ones_like(values)
    batch = CausalMaskedTimeseries(
        series=values,
        padding_mask=whole.bool(),
        id_mask=torch.zeros_like(whole, dtype=torch.int32),
        timestamp_seconds=whole.int(),
        time_interval_seconds=torch.ones_like(whole[..., 0], dtype=torch.int32),
        input_slice=slice(0, length - patch),
        target_slice=slice(patch, length),
    )
    optimiser = module.configure_optimizers()["optimizer"]
    loss = _autocast(lambda: module.training_step(batch, 0), device, precision)
    return Side(loss, partial(_step, loss, optimiser, [], 0.0), toto_weights(network))


def their_kronos(config: Mapping[str, Any], device: str, precision: str = "float32") -> Side:
    """The reference's training step as its fine-tuning script takes it."""
    tokenizer, network = build_kronos(dict(config))
    network.train().to(device)
    encode: Any = tokenizer.to(device).encode
    head: Any = network.head
    candles, stamps = kronos_batch(device)

    def cross_entropy() -> Tensor:
        with torch.no_grad():
            coarse, fine = encode(candles, half=True)
        known = {"use_teacher_forcing": True, "s1_targets": coarse[:, 1:]}
        logits = network(coarse[:, :-1], fine[:, :-1], stamps[:, :-1], **known)
        total: Tensor = head.compute_loss(*logits, coarse[:, 1:], fine[:, 1:])[0]
        return total

    parameters = list(network.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=4e-5, betas=(0.9, 0.95), weight_decay=0.1)
    loss = _autocast(cross_entropy, device, precision)
    return Side(loss, partial(_step, loss, optimiser, parameters, 3.0), kronos_weights(tokenizer, network))


def _autocast(loss: Callable[[], Tensor], device: str, precision: str) -> Callable[[], Tensor]:
    def cast() -> Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"):
            return loss()

    return cast


def _step(
    loss: Callable[[], Tensor], optimiser: torch.optim.Optimizer, clipped: Sequence[nn.Parameter], norm: float
) -> None:
    optimiser.zero_grad()
    loss().backward()
    if clipped:
        nn.utils.clip_grad_norm_(clipped, norm)
    optimiser.step()


SIDES: Final[Mapping[str, Mapping[str, Callable[..., Side]]]] = {
    "toto": {"theirs": their_toto, "ours": our_toto},
    "kronos": {"theirs": their_kronos, "ours": our_kronos},
}


def peak_bytes(family: str, whose: str, config: Mapping[str, Any], device: str, how: Mapping[str, Any]) -> int:
    """What this process, which has done nothing else, needs on top of what its imports did."""
    before = resident_bytes("self", "VmHWM")
    side = SIDES[family][whose](config, device, **how)
    for _ in range(_STEPS):
        side.step()
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident_bytes("self", "VmHWM") - before


if __name__ == "__main__":
    print(peak_bytes(**json.loads(sys.argv[1])))  # noqa: T201
