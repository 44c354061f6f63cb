"""Toto behind the Forecaster contract: one pass, last patch only, exact quantiles of the mixture."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from models.candles import CLOSE, OPEN, VARIATES, Floats, floor_prices
from models.forecaster import (
    QUANTILE_COLUMNS,
    Batch,
    Forecast,
    ForecastInput,
    Limits,
    ModelError,
    Raw,
    Row,
    Wanted,
    always,
    bucket_of,
    checked,
    pad_rows,
)
from models.layers import load_strictly
from models.toto import mixture as student_mixture
from models.toto.network import Mixture, TotoConfig, TotoNetwork
from models.toto.transform import transform_of

# Whole patches in fours: every matrix product then has a multiple of 4 rows, whose bits on a CPU do not
# depend on how many rows there are.
_TAIL: Final = 4
_BATCH_CANDLES: Final = 32 * 4096
_VARIANCE_FLOOR: Final = 0.1  # what the scaler adds
_QUANTILE_VARIATES: Final = tuple(VARIATES.index(name) for name in QUANTILE_COLUMNS)


class TotoDecoder(nn.Module):
    """The pure function that runtimes execute: `forward`."""

    head: Tensor
    head_bias: Tensor

    def __init__(self, network: TotoNetwork) -> None:
        super().__init__()
        self.network = network
        weight, bias = network.double().composed_head()
        network.float()
        self.register_buffer("head", weight.detach().flatten(0, 1).float())  # [S * 4K, D]
        self.register_buffer("head_bias", bias.detach().flatten().float())

    def forward(self, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Head outputs `[B, V, S, 4K]` of the last patch, its location and its scale `[B, V]`.

        `values` `[B, V, T]` are raw, zero where `weights` `[B, 1, T]` is zero (left padding).
        """
        loc, scale = self.network.scale(values, weights)
        hidden = self.network.embed(values, weights, loc, scale, _TAIL)
        projected = nn.functional.linear(hidden, self.head, self.head_bias)[:, :, -1]
        return projected.unflatten(-1, (self.network.config.patch_size, -1)), loc[..., -1], scale[..., -1]


class TotoForecaster:
    """Deterministic forecasts of up to one patch: quantiles are marginal per step, there are no paths."""

    family = "toto"

    def __init__(
        self,
        network: TotoNetwork,
        *,
        max_context: int,
        log_scales: tuple[float, float] | None = None,
        chain_opens: bool = False,
    ) -> None:
        """`log_scales` (price, volume) selects models/toto/transform.py's LogScales.

        `chain_opens` makes every open the close before it: a network whose location is each variate's own last
        value would open for ever where the last candle did.
        """
        self.network = network.eval()
        self.decoder = TotoDecoder(self.network).eval()
        patch = network.config.patch_size
        self.limits = Limits(min_context=2, max_context=max_context, max_horizon=patch)
        self._transform = transform_of(log_scales)
        self._chain_opens = chain_opens
        self._contexts = [_TAIL * patch]
        while self._contexts[-1] < max_context:
            self._contexts.append(2 * self._contexts[-1])

    @classmethod
    def from_weights(cls, config: Mapping[str, Any], weights: Mapping[str, Tensor], device: str) -> "TotoForecaster":
        """From a version's `config.json` and tensors; WeightsMismatch or ValueError if they do not fit."""
        network = TotoNetwork(TotoConfig.from_published(config["network"]))
        load_strictly(network, weights, "Toto")
        scales = config.get("log_scales")
        return cls(
            network.to(device),
            max_context=config["max_context"],
            log_scales=(float(scales[0]), float(scales[1])) if scales else None,
            chain_opens=config.get("chain_opens", False),
        )

    def check(self, item: ForecastInput) -> None:
        self.limits.check(item)
        if item.aggregate not in ("median", "mean"):
            raise ModelError(f"Toto has no paths: aggregate {item.aggregate!r} is not median or mean", "aggregate")
        if item.aggregate == "mean" and not self._transform.has_mean:
            raise ModelError("this version forecasts logarithms, whose price has no mean: use median", "aggregate")

    def max_rows(self, item: ForecastInput) -> int:
        return max(1, _BATCH_CANDLES // bucket_of(len(item.candles), self._contexts))

    def bucket(self, item: ForecastInput) -> Hashable:
        return bucket_of(len(item.candles), self._contexts)

    def encode(self, item: ForecastInput) -> Row:
        return {"series": self._transform.encode(item.candles, len(item.candles)).T.astype(np.float32)}

    def prepare(self, inputs: Sequence[ForecastInput], rows: Sequence[Row] | None = None) -> Batch:
        rows = rows or [self.encode(item) for item in inputs]
        count, length = pad_rows(len(inputs)), bucket_of(max(len(i.candles) for i in inputs), self._contexts)
        values = np.zeros((count, len(VARIATES), length), dtype=np.float32)
        weights = np.zeros((count, 1, length), dtype=np.float32)
        for index, row in enumerate(rows):
            first = length - row["series"].shape[1]
            values[index, :, first:], weights[index, :, first:] = row["series"], 1
        device = self.decoder.head.device
        tensors = {"values": torch.from_numpy(values).to(device), "weights": torch.from_numpy(weights).to(device)}
        return Batch(inputs, tensors, count)

    @torch.inference_mode()
    def run(self, batch: Batch, wanted: Wanted = always) -> Raw:
        projected, loc, scale = self.decoder(batch.tensors["values"], batch.tensors["weights"])
        return {"projected": projected, "loc": loc, "scale": scale}

    @torch.inference_mode()
    def finish(self, raw: Raw, batch: Batch) -> list[Forecast]:
        rows, longest = len(batch.inputs), max(item.horizon for item in batch.inputs)
        projected = raw["projected"][:rows, :, :longest].double().cpu()
        loc, scale = (raw[name][:rows, :, None].double().cpu() for name in ("loc", "scale"))  # [B, V, 1]
        steps = self.network.mixture(projected)  # [B, V, H, K]
        closes = [self._transform.encode(item.candles, len(item.candles))[-1, CLOSE] for item in batch.inputs]
        reached = (torch.tensor(closes)[:, None] - loc[:, CLOSE]) / scale[:, CLOSE]
        above = 1 - student_mixture.cdf(_variates(steps, CLOSE), reached.expand(-1, longest))
        medians, means = student_mixture.quantiles(steps, (0.5,))[0], student_mixture.mean(steps)
        levels = tuple(sorted({level for item in batch.inputs for level in item.levels}))
        spread = student_mixture.quantiles(_variates(steps, list(_QUANTILE_VARIATES)), levels)  # [Q, B, 3, H]
        forecasts = []
        for row, item in enumerate(batch.inputs):
            central = (medians if item.aggregate == "median" else means)[row]
            chosen = spread[[levels.index(level) for level in item.levels], row]
            values = torch.cat([central.unsqueeze(0), central.repeat(len(item.levels), 1, 1)])  # [1 + Q, V, H]
            values[1:, list(_QUANTILE_VARIATES)] = chosen
            unscaled = (values * scale[row] + loc[row]).transpose(-1, -2)[:, : item.horizon].numpy()
            forecasts.append(self._forecast(item, unscaled, above[row, : item.horizon].numpy()))
        return forecasts

    def _forecast(self, item: ForecastInput, values: Floats, prob_up: Floats) -> Forecast:
        """From the point and the quantiles `[1 + Q, H, V]` in the network's units."""
        rows = floor_prices(self._transform.decode(values, item.candles), item.last_close)
        if self._chain_opens:
            rows[0, :, OPEN] = np.concatenate([[item.last_close], rows[0, :-1, CLOSE]])
        return checked(
            Forecast(
                point=rows[0],
                levels=item.levels,
                quantiles={name: rows[1:, :, VARIATES.index(name)] for name in QUANTILE_COLUMNS},
                prob_up=prob_up,
                warnings=self._warnings(item),
            )
        )

    def _warnings(self, item: ForecastInput) -> tuple[str, ...]:
        seen = self._transform.encode(item.candles, len(item.candles))[:, CLOSE]
        if seen.var() >= _VARIANCE_FLOOR:
            return ()
        return ("these closes move less than the network's scaler resolves: the bands are too wide",)


def _variates(steps: Mixture, index: int | list[int]) -> Mixture:
    """The mixtures `[B, …, H, K]` of some variates."""
    return Mixture(*(parameter[:, index] for parameter in steps))
