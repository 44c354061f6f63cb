"""What the evaluator knows, as Prometheus series: the only ones that carry a symbol, and so many of them at most.

Scores are those of the newest blocks of time, by group of steps: candlecast_model_* over all symbols of a model and
interval, candlecast_symbol_* of one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from models.scoring import group_name
from service.score.drift import STATES
from service.score.evaluator import Evaluator, ModelStanding
from service.score.standings import Standing

_VALUES: Final[Mapping[str, tuple[str, Callable[[Standing | ModelStanding], float | None]]]] = {
    "mae_log_return": ("Mean absolute error of closes.", lambda its: its.recent.mae_log_return),
    "naive_mae_log_return": ("That of the naive forecast.", lambda its: its.recent.naive_mae_log_return),
    "relative_mae_ratio": ("The one over the other.", lambda its: its.recent.relative_mae),
    "relative_mae_low_ratio": ("Lower end of its 95 % interval.", lambda its: its.recent.low),
    "relative_mae_high_ratio": ("Upper end of its 95 % interval.", lambda its: its.recent.high),
    "bias_log_return": ("Mean error of closes, positive where forecasts were too low.", lambda its: its.recent.bias),
    "coverage_ratio": ("Share of closes inside the 80 % band.", lambda its: its.recent.coverage_80),
    "recalibrated_coverage_ratio": (
        "Share inside the recalibrated band, whether it is served or not.",
        lambda its: its.recent.coverage_80_calibrated,
    ),
    "interval_score_log_return": (
        "Width of the 80 % band and 10 times what lies outside.",
        lambda its: its.recent.interval_score,
    ),
    "scored_blocks": ("Blocks of time that the scores are of.", lambda its: its.recent.blocks),
    "drift_score": ("Cumulative sum of what errors exceed their baseline by.", lambda its: its.drift.score),
    "drift_state": (
        ", ".join(f"{number} {state}" for number, state in enumerate(STATES)) + ".",
        lambda its: STATES.index(its.drift.state),
    ),
    "drift_blocks": ("Blocks of time that the sum is over.", lambda its: its.drift.blocks),
}
_OF_MODEL: Final = ("model", "version", "interval", "steps")


class Published(Collector):
    """Made anew at every scrape, so that series of what has gone are gone."""

    def __init__(self, evaluator: Evaluator, most_symbols: int) -> None:
        self._evaluator = evaluator
        self._most_symbols = most_symbols

    def collect(self) -> Iterator[Metric]:
        series, fresh = self._evaluator.series(), self._evaluator.freshness()
        symbols = sorted({symbol for symbol, _ in (*series, *fresh)})
        shown = set(symbols[: self._most_symbols])
        yield GaugeMetricFamily(
            "candlecast_evaluator_symbols_omitted", "Symbols without series of their own.", len(symbols) - len(shown)
        )
        yield from self._models()
        standings = [
            ((symbol, *_owner(each, interval)), each)
            for (symbol, interval), found in series.items()
            if symbol in shown
            for each in found.standings.values()
        ]
        yield from _families("candlecast_symbol_", ("symbol", *_OF_MODEL), standings)
        yield _gauge(
            "candlecast_symbol_recalibration_scale_ratio",
            "What the distance of quantiles from the median is multiplied by once bands are recalibrated.",
            ("symbol", *_OF_MODEL),
            [
                ((symbol, *_names(model, interval, group)), scale)
                for (symbol, interval), found in series.items()
                if symbol in shown
                for (model, group), scale in found.scales.items()
            ],
        )
        known = [(name, each) for name, each in fresh.items() if name[0] in shown]
        yield _gauge(
            "candlecast_candles_last_close_timestamp_seconds",
            "When the newest stored candle closed.",
            ("symbol", "interval"),
            [(name, each.last_close / 1000) for name, each in known],
        )
        yield _gauge(
            "candlecast_candles_stale_timestamp_seconds",
            "From when on forecasts from the stored candles are of the past: three more have closed.",
            ("symbol", "interval"),
            [(name, each.stale_from / 1000) for name, each in known],
        )

    def _models(self) -> Iterator[Metric]:
        models = [(_owner(each, each.interval), each) for each in self._evaluator.models()]
        yield from _families("candlecast_model_", _OF_MODEL, models)
        counts = [(owner, each.symbols) for owner, each in models]
        yield _gauge("candlecast_model_symbols", "Symbols that the scores of a model are of.", _OF_MODEL, counts)


def _families(
    prefix: str, labels: Sequence[str], standings: Sequence[tuple[Sequence[str], Standing | ModelStanding]]
) -> Iterator[Metric]:
    for name, (documentation, value) in _VALUES.items():
        yield _gauge(prefix + name, documentation, labels, [(its, value(each)) for its, each in standings])


def _gauge(
    name: str, documentation: str, labels: Sequence[str], values: Sequence[tuple[Sequence[str], float | None]]
) -> Metric:
    family = GaugeMetricFamily(name, documentation, labels=labels)
    for its, value in values:
        if value is not None:
            family.add_metric(its, value)
    return family


def _owner(standing: Standing | ModelStanding, interval: str) -> tuple[str, ...]:
    return _names(standing.model, interval, standing.group)


def _names(exact: str, interval: str, group: int) -> tuple[str, ...]:
    model, _, version = exact.partition("@")
    return model, version, interval, group_name(group)
