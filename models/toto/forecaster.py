"""Toto behind the Forecaster contract: one pass for a patch, exact quantiles; sampled paths beyond it."""

import copy
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final, Self

import numpy as np
import torch
from torch import Tensor

from models.adapters import Adapter, Adapters, Matrices
from models.candles import CLOSE, HIGH, OPEN, VARIATES, VOLUME, Floats, floor_prices, repair_ohlc
from models.configs import finite_number, whole_number
from models.forecaster import (
    QUANTILE_COLUMNS,
    Abandoned,
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
    whole_power,
)
from models.layers import load_strictly, on_device, shapes_alone
from models.runtimes.functions import Functions, functions_of
from models.toto.decoder import TAIL, Cache, Projected, TotoDecoder
from models.toto.mixture import cdf, mean, quantiles, tabulate
from models.toto.network import Mixture, TotoConfig, TotoNetwork
from models.toto.scaler import MINIMUM_VARIANCE, Statistics
from models.toto.transform import transform_of
from models.uniforms import draw_uniforms

_BATCH_CANDLES: Final = 32 * 4096
_PATCHES: Final = 8  # of the longest horizon
_SAMPLES: Final = (4, 8, 16, 32, 64, 128, 256)
_PATH_BYTES: Final = 2**30  # of all paths of a batch
_BANDS: Final = slice(HIGH, CLOSE + 1)  # QUANTILE_COLUMNS
_OTHERS: Final = slice(OPEN, None, VOLUME - OPEN)
_FEW: Final = 2  # rows that the host has summarised before a GPU has launched what it takes for any number
_AT_ONCE: Final = 2**16  # components, so that what is known of them stays in the processor's cache

# Point and quantiles `[1 + Q, V, …, H]`, and P(close > the last known one) `[…, H]`.
Summary = tuple[Tensor, Tensor]


class TotoForecaster:
    """Up to one patch quantiles are those of the network's mixtures: exact, marginal per step, drawn by nobody.

    Beyond it paths are drawn patch by patch, and quantiles are those of the mean over the paths of the mixtures
    that each leads to: exact given the paths, and without a seam. Steps of one patch are drawn independently, as
    the reference does, so paths say nothing about the returns of single steps.
    """

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
        self.decoder = TotoDecoder(network).eval()
        self.functions: Functions = functions_of(self.decoder)
        self._adapter: Adapter | None = None
        self._patch = network.config.patch_size
        self.limits = Limits(min_context=2, max_context=max_context, max_horizon=_PATCHES * self._patch)
        self._transform = transform_of(log_scales)
        self._chain_opens = chain_opens
        self._contexts = [TAIL * self._patch]
        while self._contexts[-1] < max_context:
            self._contexts.append(2 * self._contexts[-1])

    @classmethod
    def from_weights(cls, config: Mapping[str, Any], weights: Mapping[str, Tensor], device: str) -> "TotoForecaster":
        """From a version's `config.json` and tensors; WeightsMismatch or ValueError if they do not fit."""
        with shapes_alone():
            network = TotoNetwork(TotoConfig.from_published(config["network"]))
        load_strictly(network, weights, "Toto")
        scales = config.get("log_scales")
        return cls(
            network.to(device),
            max_context=whole_number(config["max_context"], "max_context"),
            log_scales=(finite_number(scales[0], "log_scales"), finite_number(scales[1], "log_scales"))
            if scales
            else None,
            chain_opens=config.get("chain_opens", False),
        )

    def executed_by(self, functions: Functions, *, fours: bool = True) -> Self:
        other = copy.copy(self)
        other.functions = functions
        return other

    def adapted(self, matrices: Matrices) -> Self:
        other = self.executed_by(functions_of(self.decoder))
        other._adapter = self.decoder.fitted(matrices)
        return other

    def check(self, item: ForecastInput) -> None:
        self.limits.check(item)
        if item.aggregate not in ("median", "mean"):
            raise ModelError(
                f"Toto forecasts distributions: aggregate {item.aggregate!r} is not median or mean", "aggregate"
            )
        if item.aggregate == "mean" and not self._transform.has_mean:
            raise ModelError("this version forecasts logarithms, whose price has no mean: use median", "aggregate")
        if item.horizon > self._patch and item.sampling.samples > _SAMPLES[-1]:
            raise ModelError(f"{_SAMPLES[-1]} paths are the most that are drawn", "samples")

    def max_rows(self, item: ForecastInput) -> int:
        rows = _BATCH_CANDLES // bucket_of(len(item.candles), self._contexts)
        patches, samples = self._drawn(item)
        if samples:
            rows = min(rows, _PATH_BYTES // (samples * patches * len(VARIATES) * self.decoder.patch_bytes))
        return whole_power(rows)

    def bucket(self, item: ForecastInput) -> Hashable:
        return bucket_of(len(item.candles), self._contexts), *self._drawn(item)

    def _drawn(self, item: ForecastInput) -> tuple[int, int]:
        """Patches of the horizon and the bucket of its paths: 1 and 0 where one pass answers."""
        patches = -(-item.horizon // self._patch)
        return patches, bucket_of(item.sampling.samples, _SAMPLES) if patches > 1 else 0

    def encode(self, item: ForecastInput) -> Row:
        row: dict[str, Any] = {"series": self._transform.encode(item.candles, len(item.candles)).T.astype(np.float32)}
        if self._adapter:
            row["adapter"] = self._adapter
        patches, samples = self._drawn(item)
        if samples:
            uniforms = draw_uniforms(item.seed, item.sampling.samples, patches, len(VARIATES) * self._patch * 2)
            row["uniforms"] = uniforms.reshape(-1, patches, len(VARIATES), self._patch, 2).transpose(1, 2, 0, 3, 4)
        return row

    def prepare(self, inputs: Sequence[ForecastInput], rows: Sequence[Row] | None = None) -> Batch:
        rows = rows or [self.encode(item) for item in inputs]
        count, length = pad_rows(len(inputs)), bucket_of(max(len(i.candles) for i in inputs), self._contexts)
        patches, samples = (max(sizes) for sizes in zip(*(self._drawn(item) for item in inputs), strict=True))
        arrays: dict[str, np.ndarray] = {
            "values": np.zeros((count, len(VARIATES), length), dtype=np.float32),
            "weights": np.zeros((count, 1, length), dtype=np.float32),
        }
        if samples:
            arrays["uniforms"] = np.zeros((count, patches, len(VARIATES), samples, self._patch, 2))
        for index, row in enumerate(rows):
            first = length - row["series"].shape[1]
            arrays["values"][index, :, first:], arrays["weights"][index, :, first:] = row["series"], 1
            if samples:
                arrays["uniforms"][index, :, :, : row["uniforms"].shape[2]] = row["uniforms"]
        for name in ("values", "weights"):
            arrays[name] = arrays[name].reshape(*arrays[name].shape[:2], -1, self._patch)
        tensors = on_device(arrays, self.decoder.device)
        return Batch(inputs, tensors, count, Adapters([row.get("adapter") for row in rows]))

    @torch.inference_mode()
    def run(self, batch: Batch, wanted: Wanted = always) -> Raw:
        context = (batch.tensors["values"], batch.tensors["weights"])
        beside = (batch.adapters,) if batch.adapters else ()
        if "uniforms" in batch.tensors:
            return self._run_paths(context, batch.tensors["uniforms"], beside, wanted)
        return self.functions["forward"](*context, *beside)._asdict()  # type: ignore[no-any-return]

    def _run_paths(
        self, context: tuple[Tensor, Tensor], uniforms: Tensor, beside: tuple[Adapters, ...], wanted: Wanted
    ) -> Raw:
        """As `run`, with an axis of patches and one of paths, `[B, patches - 1, V, S, …]`, and the paths drawn."""
        functions, patches, paths = self.functions, uniforms.shape[1], uniforms.shape[3]
        first, prefix, reached = functions["prefill"](*context, *beside)
        cache = Cache.empty(prefix, paths, patches - 1)
        # Every path with statistics and head outputs of its own from the start: one shape for every step.
        reached = Statistics(*(fact.repeat_interleave(paths, dim=-1) for fact in reached))
        ahead = Projected(*(part.unsqueeze(2).repeat_interleave(paths, dim=2) for part in first))
        drawn, later = [functions["draw"](ahead, uniforms[:, 0])], []
        for index, place in enumerate(torch.arange(patches - 1, device=uniforms.device).unbind()):
            if not wanted():
                raise Abandoned("nobody waits for these paths")
            ahead, reached, entries = functions["step"](drawn[-1], reached, prefix, cache, place, *beside)
            cache.write(entries, index)
            later.append(ahead)
            drawn.append(functions["draw"](ahead, uniforms[:, index + 1]))
        after = (torch.stack(parts, dim=1) for parts in zip(*later, strict=True))
        named = dict(zip(("path_outputs", "path_loc", "path_scale"), after, strict=True))
        return {**first._asdict(), **named, "paths": torch.stack([patch.values for patch in drawn], dim=1)}

    @torch.inference_mode()
    def finish(self, raw: Raw, batch: Batch) -> list[Forecast]:
        host = {name: tensor[: len(batch.inputs)].cpu() for name, tensor in raw.items()}
        rows = [{name: tensor[row] for name, tensor in host.items()} for row in range(len(batch.inputs))]
        if raw["outputs"].is_cuda and "path_outputs" not in raw and len(rows) > _FEW:
            summaries = self._summarised_together(raw["outputs"], batch.inputs, rows)
        else:  # row by row: what a row costs and every bit of it depend on the row alone
            summaries = [self._summarised(*pair) for pair in zip(batch.inputs, rows, strict=True)]
        return [self._forecast(*parts) for parts in zip(batch.inputs, rows, summaries, strict=True)]

    def _summarised(self, item: ForecastInput, raw: Mapping[str, Tensor]) -> Summary:
        """Of one row."""
        parts = [_summary(steps, item, self._reached(item, raw)) for steps in self._mixtures(item, raw)]
        values, above = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
        return values, above

    def _summarised_together(
        self, outputs: Tensor, inputs: Sequence[ForecastInput], rows: Sequence[Mapping[str, Tensor]]
    ) -> list[Summary]:
        """Of all rows, from `outputs` `[B, V, 64, 4K]`: a GPU takes hardly longer for many than for one.

        Its products depend on the batch anyway, which the self-test says; what the host does never may.
        """
        alike: dict[Hashable, list[int]] = defaultdict(list)
        for row, item in enumerate(inputs):
            alike[item.all_levels, item.aggregate].append(row)
        found: dict[int, Summary] = {}
        for places in alike.values():
            steps = Mixture(*(part.transpose(0, 1) for part in TotoNetwork.mixture(outputs[places].double())))
            reached = torch.stack([self._reached(inputs[row], rows[row]) for row in places]).to(outputs.device)
            values, above = (part.cpu() for part in _summary(steps, inputs[places[0]], reached))
            for place, row in enumerate(places):
                found[row] = values[:, :, place, : inputs[row].horizon], above[place, : inputs[row].horizon]
        return [found[row] for row in range(len(inputs))]

    def _reached(self, item: ForecastInput, raw: Mapping[str, Tensor]) -> Tensor:
        """The last close `[1]` in the units of the first patch's mixtures."""
        last = float(self._transform.encode(item.candles, len(item.candles))[-1, CLOSE])
        return (last - raw["loc"][CLOSE : CLOSE + 1].double()) / raw["scale"][CLOSE : CLOSE + 1].double()

    def _forecast(self, item: ForecastInput, raw: Mapping[str, Tensor], summary: Summary) -> Forecast:
        """From one row of what `run` returned, and its summary."""
        loc, scale = raw["loc"].double().unsqueeze(-1), raw["scale"].double().unsqueeze(-1)  # [V, 1]
        closes = self._transform.encode(item.candles, len(item.candles))[:, CLOSE]
        values, above = summary
        rows = self._candles(item, (values * scale + loc).transpose(-1, -2).numpy())
        paths = None
        if item.with_paths and "paths" in raw:
            drawn = raw["paths"][:, :, : item.sampling.samples].double().permute(2, 0, 3, 1).flatten(1, 2)
            paths = repair_ohlc(self._candles(item, drawn[:, : item.horizon].numpy()))
        return checked(
            Forecast(
                point=rows[0],
                levels=item.all_levels,
                quantiles={name: rows[1:, :, VARIATES.index(name)] for name in QUANTILE_COLUMNS},
                prob_up=above.numpy(),
                paths=paths,
                warnings=self._warnings(item, closes),
            )
        )

    def _mixtures(self, item: ForecastInput, raw: Mapping[str, Tensor]) -> list[Mixture]:
        """The mixtures `[V, steps, K]` of the horizon, in pieces and in units of the first; later ones of all paths."""
        found = [TotoNetwork.mixture(raw["outputs"][:, : item.horizon].double())]
        samples, patches = item.sampling.samples, -(-item.horizon // self._patch)
        for index in range(patches - 1):
            left = item.horizon - (index + 1) * self._patch
            steps = TotoNetwork.mixture(raw["path_outputs"][index, :, :samples, :left].double())  # [V, S, steps, K]
            unit = raw["scale"].double()[:, None, None, None]
            shift = (raw["path_loc"][index, :, :samples] - raw["loc"].unsqueeze(-1).double())[..., None, None] / unit
            growth = raw["path_scale"][index, :, :samples, None, None].double() / unit
            weights = steps.log_weights - float(np.log(samples))
            pooled = (steps.df, shift + growth * steps.loc, growth * steps.scale, weights)
            flat = (parameter.transpose(1, 2).flatten(2) for parameter in pooled)  # [V, steps, S * K]
            at_once = max(1, _AT_ONCE // (len(VARIATES) * samples * steps.df.shape[-1]))
            found += [
                Mixture(*part) for part in zip(*(parameter.split(at_once, dim=1) for parameter in flat), strict=True)
            ]
        return found

    def _candles(self, item: ForecastInput, values: Floats) -> Floats:
        """Prices above zero and volumes `[…, H, V]` of the network's `values`."""
        rows = floor_prices(self._transform.decode(values, item.candles), item.last_close)
        if self._chain_opens:
            rows[..., 1:, OPEN] = rows[..., :-1, CLOSE]
            rows[..., 0, OPEN] = item.last_close
        return rows

    def _warnings(self, item: ForecastInput, closes: Floats) -> tuple[str, ...]:
        found = []
        if item.horizon > self._patch:
            found.append(f"steps beyond {self._patch} are sampled, {item.sampling.samples} paths")
        if closes.var() < MINIMUM_VARIANCE:
            found.append("these closes move less than the network's scaler resolves: the bands are too wide")
        return tuple(found)


def _summary(steps: Mixture, item: ForecastInput, reached: Tensor) -> Summary:
    """Of mixtures `[V, …, H, K]`, for the levels and the point that `item` asks for."""
    table = tabulate(steps)
    wanted = tuple(sorted({*item.all_levels, 0.5})) if item.aggregate == "median" else item.all_levels
    bands = quantiles(table.part(_BANDS), wanted)  # [Q, 3, …, H]
    if item.aggregate == "median":
        point = torch.empty_like(table.jerk)
        point[_BANDS] = bands[wanted.index(0.5)]
        point[_OTHERS] = quantiles(table.part(_OTHERS), (0.5,))[0]
    else:
        point = mean(table)
    values = torch.stack([point] * (1 + len(item.all_levels)))
    values[1:, _BANDS] = bands[[wanted.index(level) for level in item.all_levels]]
    return values, 1 - cdf(table.part(CLOSE), reached)
