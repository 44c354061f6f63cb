"""Kronos behind the Forecaster contract: one prefill per symbol, cached steps over its paths."""

import copy
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Final, Self

import numpy as np
import torch
from torch import Tensor

from models.adapters import Adapter, Adapters, Matrices
from models.calendars import calendar_features
from models.candles import AMOUNT, CLOSE, PRICES, VARIATES, Floats, floor_prices, repair_ohlc
from models.configs import whole_number
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
from models.kronos.decoder import Cache, Controls, KronosDecoder, Tokens
from models.kronos.network import KronosPredictor, PredictorConfig
from models.kronos.tokenizer import KronosTokenizer, TokenizerConfig
from models.layers import load_strictly, on_device, shapes_alone
from models.quantiles import parse_aggregate, path_quantiles, unreachable_levels
from models.runtimes.functions import Functions, functions_of
from models.uniforms import draw_uniforms

_CLIP: Final = 5.0
_EPSILON: Final = 1e-5
_CONTEXTS: Final = (64, 128, 256, 512, 1024, 2048)
_HORIZONS: Final = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_SAMPLES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_FOURS: Final = _SAMPLES[2:]  # see models/toto/decoder.py
_CACHE_BYTES: Final = 2**30  # of all paths of a batch
_RESOLUTION: Final = 10 * _EPSILON
_LARGEST_UNIFORM: Final = 1 - 2**-24  # a float32 below 1


class KronosForecaster:
    """Sampled paths; statistics of the lookback only."""

    family = "kronos"

    def __init__(
        self, tokenizer: KronosTokenizer, predictor: KronosPredictor, *, max_context: int, anchor: bool = False
    ) -> None:
        """`anchor` scales each path by last close / its reconstruction: the tokenizer's own error of the last
        candle would otherwise shift every forecast."""
        self.decoder = KronosDecoder(tokenizer, predictor).eval()
        self.functions: Functions = functions_of(self.decoder)
        self._adapter: Adapter | None = None
        self._samples: tuple[int, ...] = _FOURS
        self._indices = torch.arange(max_context, device=self.decoder.device)
        self.limits = Limits(
            min_context=2, max_context=max_context - 1, max_horizon=max_context - 2, max_total=max_context
        )
        self._anchor = anchor

    @classmethod
    def from_weights(cls, config: Mapping[str, Any], weights: Mapping[str, Tensor], device: str) -> "KronosForecaster":
        """From a version's `config.json` and tensors; WeightsMismatch or ValueError if they do not fit."""
        tokens = TokenizerConfig.from_published(config["tokenizer"])
        network = PredictorConfig.from_published(config["predictor"])
        if (tokens.s1_bits, tokens.s2_bits) != (network.s1_bits, network.s2_bits):
            raise ValueError("Kronos config: the tokenizer and the predictor have tokens of different bits")
        with shapes_alone():
            tokenizer, predictor = KronosTokenizer(tokens), KronosPredictor(network)
        both = torch.nn.ModuleDict({"tokenizer": tokenizer, "predictor": predictor})
        load_strictly(both, weights, "Kronos")
        both.to(device)
        context = whole_number(config["context"], "context")
        return cls(tokenizer, predictor, max_context=context, anchor=config.get("anchor", False))

    def executed_by(self, functions: Functions, *, fours: bool = True) -> Self:
        other = copy.copy(self)
        other.functions = functions
        other._samples = _FOURS if fours else _SAMPLES
        return other

    def adapted(self, matrices: Matrices) -> Self:
        other = self.executed_by(functions_of(self.decoder))
        other._adapter = self.decoder.fitted(matrices)
        return other

    def check(self, item: ForecastInput) -> None:
        self.limits.check(item)
        if item.sampling.samples > _SAMPLES[-1]:
            raise ModelError(f"{_SAMPLES[-1]} paths are the most that are drawn", "samples")
        if self._path_bytes(item) > _CACHE_BYTES:
            raise ModelError(f"{item.sampling.samples} paths of {item.horizon} steps need too much memory", "samples")
        try:
            parse_aggregate(item.aggregate)
        except ValueError as error:
            raise ModelError(str(error), "aggregate") from error

    def max_rows(self, item: ForecastInput) -> int:
        return whole_power(_CACHE_BYTES // self._path_bytes(item))

    def _path_bytes(self, item: ForecastInput) -> int:
        """Size of the caches of one request's paths."""
        paths, slots = bucket_of(item.sampling.samples, self._samples), bucket_of(item.horizon, _HORIZONS)
        return paths * slots * (len(self.decoder.blocks) + 1) * 2 * self.decoder.width * 4

    def bucket(self, item: ForecastInput) -> Hashable:
        return (
            bucket_of(len(item.candles), _CONTEXTS),
            bucket_of(item.horizon, _HORIZONS),
            bucket_of(item.sampling.samples, self._samples),
        )

    def encode(self, item: ForecastInput) -> Row:
        samples, stratified = item.sampling.samples, item.sampling.stratified
        uniforms = draw_uniforms(item.seed, samples, item.horizon, 2, stratified=stratified)
        row = {
            "candles": normalise(item.candles, item.candles),
            "stamps": calendar_features(item.local_times),
            "uniforms": np.minimum(uniforms, _LARGEST_UNIFORM),
        }
        return row | {"adapter": self._adapter} if self._adapter else row

    def prepare(self, inputs: Sequence[ForecastInput], rows: Sequence[Row] | None = None) -> Batch:
        rows = rows or [self.encode(item) for item in inputs]
        count, context = pad_rows(len(inputs)), bucket_of(max(len(i.candles) for i in inputs), _CONTEXTS)
        horizon = bucket_of(max(i.horizon for i in inputs), _HORIZONS)
        samples = bucket_of(max(i.sampling.samples for i in inputs), self._samples)
        arrays = {
            "candles": np.zeros((count, context, len(VARIATES) + 1), dtype=np.float32),
            "pad": np.full(count, context - 1),  # a padding row holds one candle of zeros
            "stamps": np.ones((count, context + horizon, 5), dtype=np.int64),
            "uniforms": np.zeros((count, samples, horizon, 2), dtype=np.float32),
            "temperature": np.ones(count, dtype=np.float32),
            "top_k": np.zeros(count, dtype=np.int64),
            "top_p": np.ones(count, dtype=np.float32),
        }
        for index, (item, row) in enumerate(zip(inputs, rows, strict=True)):
            length, sampling = len(item.candles), item.sampling
            arrays["candles"][index, context - length :] = row["candles"]
            arrays["pad"][index] = context - length
            arrays["stamps"][index, context - length : context + item.horizon] = row["stamps"]
            arrays["uniforms"][index, : sampling.samples, : item.horizon] = row["uniforms"]
            arrays["temperature"][index] = sampling.temperature
            arrays["top_k"][index], arrays["top_p"][index] = sampling.top_k, sampling.top_p
        tensors = on_device(arrays, self.decoder.device)
        return Batch(inputs, tensors, count, Adapters([row.get("adapter") for row in rows]))

    @torch.inference_mode()
    def run(self, batch: Batch, wanted: Wanted = always) -> Raw:
        tensors, functions = batch.tensors, self.functions
        beside = (batch.adapters,) if batch.adapters else ()
        uniforms, pad = tensors["uniforms"], tensors["pad"]
        rows, paths, slots, _ = uniforms.shape
        context = tensors["candles"].shape[1]
        tokens = functions["tokenize"](tensors["candles"], pad)
        filled = functions["prefill"](tokens, tensors["stamps"][:, :context], pad, *beside)
        prefix = filled.prefix
        cache = Cache.empty(prefix, paths, slots)
        controls = Controls(tensors["temperature"], tensors["top_k"], tensors["top_p"])
        hidden = filled.hidden.unsqueeze(1).repeat(1, paths, 1)
        drawn = torch.zeros(2, rows, paths, slots, dtype=torch.int64, device=pad.device)
        for index in range(max(item.horizon for item in batch.inputs)):
            if not wanted():
                raise Abandoned("nobody waits for these paths")
            step = functions["step"](
                hidden,
                prefix,
                cache,
                self._indices[index],
                context - pad + index,
                tensors["stamps"][:, context + index],
                uniforms[:, :, index],
                controls,
                *beside,
            )
            hidden = step.hidden
            drawn[0, :, :, index], drawn[1, :, :, index] = step.coarse, step.fine
            cache.write(step, index)
        candles = functions["detokenize"](tokens, Tokens(drawn[0], drawn[1]), pad)
        return {"candles": candles.paths, "last": candles.last}

    def finish(self, raw: Raw, batch: Batch) -> list[Forecast]:
        candles, last = raw["candles"].double().cpu().numpy(), raw["last"].double().cpu().numpy()
        return [self._forecast(item, candles[row], last[row]) for row, item in enumerate(batch.inputs)]

    def _forecast(self, item: ForecastInput, normalised: Floats, last: Floats) -> Forecast:
        """From normalised paths `[S, H, 6]` and the reconstruction `[6]` of the last candle."""
        samples, horizon = item.sampling.samples, item.horizon
        loc, scale = _statistics(item.candles)
        paths = (normalised[:samples, :horizon] * scale + loc)[..., :AMOUNT]
        if self._anchor:
            reconstructed = floor_prices((last * scale + loc)[:AMOUNT], item.last_close)[CLOSE]
            paths[..., PRICES] *= item.last_close / reconstructed
        paths = repair_ohlc(floor_prices(paths, item.last_close))
        closes = np.concatenate([np.full((samples, 1), item.last_close), paths[..., CLOSE]], axis=1)
        return checked(
            Forecast(
                point=floor_prices(parse_aggregate(item.aggregate)(paths), item.last_close),
                levels=item.all_levels,
                quantiles={
                    name: path_quantiles(paths[..., VARIATES.index(name)], item.all_levels) for name in QUANTILE_COLUMNS
                },
                prob_up=(paths[..., CLOSE] > item.last_close).mean(axis=0),
                step_return_quantiles=path_quantiles(np.diff(np.log(closes), axis=1), item.all_levels),
                paths=paths if item.with_paths else None,
                warnings=_warnings(item),
            )
        )


def normalise(candles: Floats, context: Floats) -> Floats:
    """`[T, 6]` candles in standard deviations of the context, clipped to +-5: one definition for training too."""
    loc, scale = _statistics(context)
    return ((candles - loc) / scale).clip(-_CLIP, _CLIP)


def _statistics(candles: Floats) -> tuple[Floats, Floats]:
    """Location and scale `[6]` of the context."""
    return candles.mean(axis=0), candles.std(axis=0) + _EPSILON


def _warnings(item: ForecastInput) -> tuple[str, ...]:
    found = []
    if missed := unreachable_levels(item.levels, item.sampling.samples):
        found.append(f"{item.sampling.samples} paths cannot resolve the quantiles {missed}: ask for more samples")
    if item.candles[:, CLOSE].std() < _RESOLUTION:
        found.append(f"these closes move less than {_RESOLUTION:g}, which the network does not resolve: scale them up")
    return tuple(found)
