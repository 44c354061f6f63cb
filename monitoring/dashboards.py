"""The three dashboards as tables of panels; `make dashboards` writes them as Grafana's JSON.

`<service>`, `<model>` and `<symbol>` in an expression stand for the matchers that the variables of a dashboard set.
Series of one thing that several processes publish are the same: max picks one of them.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

FOLDER: Final = Path(__file__).parent / "grafana" / "dashboards"
_SCHEMA_VERSION: Final = 39  # Grafana 11
_COLUMNS: Final = 24
_HEIGHT: Final = 8
_DATASOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
_JOB: Final = 'job="candlecast"'
_OF_MODEL: Final = f'{_JOB},model=~"$model",interval=~"$interval",steps=~"$steps"'
_MATCHERS: Final = {
    "<service>": f'{_JOB},instance=~"$instance"',
    "<model>": _OF_MODEL,
    "<symbol>": f'{_OF_MODEL},symbol=~"$symbol"',
    "<candles>": f'{_JOB},interval=~"$interval",symbol=~"$symbol"',
}
_MODEL: Final = "{{model}}@{{version}} {{interval}} {{steps}}"
_SYMBOL: Final = "{{symbol}} " + _MODEL
_BY_MODEL: Final = "max by (model, version, interval, steps)"
_BY_SYMBOL: Final = "max by (symbol, model, version, interval, steps)"
_DRIFT: Final = (
    *(("ok", "green"), ("warn", "yellow"), ("alarm", "red")),
    *(("too few blocks", "blue"), ("no baseline", "text")),
)
_ORDER: Final = (("well", "green"), ("out of order", "red"))

Kind = Literal["timeseries", "stat", "table", "heatmap", "state-timeline", "bargauge"]


class Query(NamedTuple):
    """One expression and the name of its series."""

    expr: str
    legend: str


class Panel(NamedTuple):
    """What one panel shows; `width` in Grafana's 24 columns."""

    title: str
    description: str
    unit: str
    queries: Sequence[Query]
    kind: Kind = "timeseries"
    width: int = 8
    stacked: bool = False
    lines: Sequence[tuple[float, str]] = ()  # thresholds to draw, with colours
    states: Sequence[tuple[str, str]] = ()  # what the values 0, 1, … mean, with colours


class Dashboard(NamedTuple):
    """`variables`: name to the query of its values."""

    uid: str
    title: str
    description: str
    variables: dict[str, str]
    panels: Sequence[Panel]


def rate(metric: str, by: str, matchers: str = "<service>") -> str:
    """Per second, summed by labels."""
    return f"sum by ({by}) (rate({metric}{{{matchers}}}[$__rate_interval]))"


def increase(metric: str, by: str, matchers: str = "<service>") -> str:
    """Since the last point of the graph, summed by labels."""
    return f"sum by ({by}) (increase({metric}{{{matchers}}}[$__rate_interval]))"


def mean(metric: str, by: str, matchers: str = "<service>") -> str:
    """Of what a histogram observed."""
    return f"{rate(metric + '_sum', by, matchers)} / {rate(metric + '_count', by, matchers)}"


def quantile(level: float, metric: str, by: str, matchers: str = "<service>") -> str:
    """Of what a histogram observed, as far as its buckets tell."""
    return f"histogram_quantile({level}, {rate(metric + '_bucket', f'{by}, le'.removeprefix(', '), matchers)})"


_FORECASTS: Final = 'route="/forecast/{symbol}",<service>'
_ABOUT: Final = _JOB + ',route=~"/(forecast|candles)/[{]symbol[}]"'
_BURN: Final = ((1.0, "yellow"), (6.0, "orange"), (14.4, "red"))
_ERRORS: Final = "job:candlecast_http_errors_per_requests:ratio_rate"
_SLOW: Final = "job:candlecast_http_slow_per_requests:ratio_rate"

SERVICE: Final = Dashboard(
    uid="candlecast-service",
    title="Candlecast / Service",
    description="What callers get: rate, errors and duration, the objectives, and what is out of order.",
    variables={"instance": f"label_values(candlecast_build_info{{{_JOB}}}, instance)"},
    panels=(
        Panel(
            "Forecasts",
            "Forecast requests by what became of them.",
            "reqps",
            [Query(rate("candlecast_forecast_requests_total", "outcome"), "{{outcome}}")],
            stacked=True,
        ),
        Panel(
            "Answers by code",
            "Every answer over HTTP, probes too. 499: the caller hung up.",
            "reqps",
            [Query(rate("candlecast_http_requests_total", "code"), "{{code}}")],
            stacked=True,
        ),
        Panel(
            "Time of a forecast",
            "From the request's head to the answer's last byte, as far as the buckets tell.",
            "s",
            [
                Query(quantile(level, "candlecast_http_request_duration_seconds", "", _FORECASTS), f"p{100 * level:g}")
                for level in (0.5, 0.95, 0.99)
            ],
        ),
        Panel(
            "Error budget left",
            "Of the 0.1 % of 30 days' requests for forecasts and candles that may fail with 5xx.",
            "percentunit",
            [
                Query(
                    f'1 - (sum(increase(candlecast_http_requests_total{{{_ABOUT},code=~"5.."}}[30d])) or vector(0))'
                    f" / sum(increase(candlecast_http_requests_total{{{_ABOUT}}}[30d])) / 0.001",
                    "left",
                )
            ],
            kind="stat",
            width=4,
            lines=((0.0, "orange"), (0.25, "green")),
        ),
        Panel(
            "Latency budget left",
            "Of the 1 % of 30 days' forecasts that may take longer than a second.",
            "percentunit",
            [
                Query(
                    "1 - (1 - sum(increase(candlecast_http_request_duration_seconds_bucket"
                    f'{{{_JOB},route="/forecast/{{symbol}}",le="1.0"}}[30d]))'
                    " / sum(increase(candlecast_http_request_duration_seconds_count"
                    f'{{{_JOB},route="/forecast/{{symbol}}"}}[30d]))) / 0.01',
                    "left",
                )
            ],
            kind="stat",
            width=4,
            lines=((0.0, "orange"), (0.25, "green")),
        ),
        Panel(
            "Burn of the error budget",
            "How many times faster than allowed the service fails. 14.4 for an hour or 6 for six hours page.",
            "none",
            [Query(f"{_ERRORS}{window}{{{_JOB}}} / 0.001", window) for window in ("5m", "1h", "6h", "3d")],
            lines=_BURN,
        ),
        Panel(
            "Burn of the latency budget",
            "How many times more forecasts than allowed take longer than a second.",
            "none",
            [Query(f"{_SLOW}{window}{{{_JOB}}} / 0.01", window) for window in ("5m", "1h", "6h", "3d")],
            lines=_BURN,
        ),
        Panel(
            "Mean time by stage",
            "Where a computed forecast spends its time.",
            "s",
            [
                Query(
                    mean("candlecast_forecast_stage_duration_seconds", "stage", 'stage!="total",<service>'), "{{stage}}"
                )
            ],
            stacked=True,
        ),
        Panel(
            "Time of forecasts, all",
            "Requests per second in each bucket of time.",
            "s",
            [
                Query(
                    rate("candlecast_http_request_duration_seconds_bucket", "le", _FORECASTS),
                    "{{le}}",
                )
            ],
            kind="heatmap",
        ),
        Panel(
            "Inside",
            "Requests that are being answered, jobs that wait for the engine, and how many may be inside.",
            "short",
            [
                Query("sum(candlecast_http_requests_in_flight{<service>})", "in flight"),
                Query("sum(candlecast_queue_depth{<service>})", "queue"),
                Query("sum(candlecast_queue_capacity{<service>})", "capacity"),
            ],
        ),
        Panel(
            "Refusals",
            "Requests refused early (no slot, a queue too long, any too long for the deadline), bodies refused for"
            " their candles, and callers denied for want of a key, a scope or quota.",
            "reqps",
            [
                Query(rate("candlecast_refusals_total", "reason"), "{{reason}}"),
                Query(rate("candlecast_candle_rejections_total", "reason"), "candles: {{reason}}"),
                Query(rate("candlecast_denials_total", "reason"), "callers: {{reason}}"),
            ],
        ),
        Panel(
            "Where forecasts come from",
            "Cache (hit), a computation (miss), one that was shared (coalesced), or one that was asked for (bypass).",
            "reqps",
            [Query(rate("candlecast_cache_requests_total", "result"), "{{result}}")],
            stacked=True,
        ),
        Panel(
            "Candles put",
            "Candles that came, by what they were.",
            "cps",
            [Query(rate("candlecast_candles_ingested_total", "result"), "{{result}}")],
        ),
        Panel(
            "Watched forecasts",
            "Refreshes of the watch list, and callers who stream it.",
            "short",
            [
                Query(rate("candlecast_watch_refreshes_total", "outcome"), "{{outcome}} per second"),
                Query("sum(candlecast_streams_open{<service>})", "open streams"),
            ],
        ),
        Panel(
            "Out of order",
            "1 while Redis does not answer, forecasts wait for the ledger, or the store or the keys cannot be read.",
            "none",
            [Query("max by (reason) (candlecast_degraded{<service>})", "{{reason}}")],
            kind="state-timeline",
            states=_ORDER,
        ),
        Panel(
            "Versions",
            "Processes and what they run.",
            "none",
            [Query("candlecast_build_info{<service>}", "")],
            kind="table",
            width=12,
        ),
        Panel(
            "Answers by route",
            "Every answer, by the template of its route.",
            "reqps",
            [Query(rate("candlecast_http_requests_total", "route, method"), "{{method}} {{route}}")],
            width=12,
        ),
    ),
)

MODELS: Final = Dashboard(
    uid="candlecast-models",
    title="Candlecast / Models",
    description="The engine, its models and GPU, Redis and the process: utilisation, saturation, errors.",
    variables={"instance": f"label_values(candlecast_build_info{{{_JOB}}}, instance)"},
    panels=(
        Panel(
            "Engine busy",
            "Share of time in which the engine's thread could take no other batch.",
            "percentunit",
            [Query(rate("candlecast_inference_busy_seconds_total", "instance, model"), "{{instance}} {{model}}")],
            stacked=True,
        ),
        Panel(
            "Requests in a batch",
            "Mean over batches: more than one only where requests wait.",
            "short",
            [Query(mean("candlecast_batch_size", "model"), "{{model}}")],
        ),
        Panel(
            "Why batches were no larger",
            "Idle, freed, a deadline, full; or rows tried again after a failure: alone, or fewer for want of memory.",
            "cps",
            [
                Query(rate("candlecast_batch_released_total", "reason"), "{{reason}}"),
                Query(rate("candlecast_batches_abandoned_total", "job"), "abandoned"),
            ],
            stacked=True,
        ),
        Panel(
            "Time of a batch's run",
            "On the device, p99 and mean.",
            "s",
            [
                Query(
                    quantile(0.99, "candlecast_forecast_stage_duration_seconds", "model", 'stage="run",<service>'),
                    "{{model}} p99",
                ),
                Query(
                    mean("candlecast_forecast_stage_duration_seconds", "model", 'stage="run",<service>'),
                    "{{model}} mean",
                ),
            ],
        ),
        Panel(
            "Time in the queue",
            "Until a batch took the request, p99.",
            "s",
            [
                Query(
                    quantile(0.99, "candlecast_forecast_stage_duration_seconds", "model", 'stage="queue",<service>'),
                    "{{model}}",
                )
            ],
        ),
        Panel(
            "Rows computed",
            "Asked for, and padding that keeps every batch's bits the same.",
            "cps",
            [Query(rate("candlecast_computed_rows_total", "model, kind"), "{{model}} {{kind}}")],
            stacked=True,
        ),
        Panel(
            "Versions in memory",
            "Every loaded version, with the runtime that answers for it.",
            "none",
            [Query("candlecast_model_info{<service>}", "")],
            kind="table",
            width=12,
        ),
        Panel(
            "Time of the newest load",
            "From the store into memory.",
            "s",
            [Query("max by (model) (candlecast_model_load_seconds{<service>})", "{{model}}")],
            kind="bargauge",
            width=6,
        ),
        Panel(
            "Failures",
            "Batches that failed, and loads.",
            "short",
            [
                Query(
                    increase("candlecast_inference_failures_total", "model, reason"),
                    "{{model}} batch: {{reason}}",
                ),
                Query(
                    increase("candlecast_model_load_failures_total", "model, reason"),
                    "{{model}} load: {{reason}}",
                ),
            ],
            width=6,
        ),
        Panel(
            "Swaps",
            "Versions that took over an alias, or could not; and aliases that wait for theirs.",
            "short",
            [
                Query(increase("candlecast_model_swaps_total", "model, outcome"), "{{model}} {{outcome}}"),
                Query("max by (model) (candlecast_model_swap_pending{<service>})", "{{model}} waits"),
            ],
        ),
        Panel(
            "Memory of versions",
            "Size of those in memory, and what it may be.",
            "bytes",
            [Query("max by (instance, kind) (candlecast_model_memory_bytes{<service>})", "{{instance}} {{kind}}")],
        ),
        Panel(
            "Shadow forecasts",
            "Noted in the ledger, dropped since callers come first, or failed.",
            "cps",
            [Query(rate("candlecast_shadow_forecasts_total", "model, outcome"), "{{model}} {{outcome}}")],
        ),
        Panel(
            "GPU memory",
            "Allocated to tensors, reserved by torch, and what the card has. Empty on a CPU.",
            "bytes",
            [Query("max by (instance, kind) (candlecast_gpu_memory_bytes{<service>})", "{{instance}} {{kind}}")],
        ),
        Panel(
            "Memory of the process",
            "Resident.",
            "bytes",
            [Query("process_resident_memory_bytes{<service>}", "{{instance}}")],
        ),
        Panel(
            "Processor time",
            "Cores in use.",
            "short",
            [Query("rate(process_cpu_seconds_total{<service>}[$__rate_interval])", "{{instance}}")],
        ),
        Panel(
            "Files and sockets",
            "Open file descriptors, and how many there may be.",
            "short",
            [
                Query("process_open_fds{<service>}", "{{instance}} open"),
                Query("process_max_fds{<service>}", "{{instance}} limit"),
            ],
        ),
        Panel(
            "Event loop lag",
            "How much later than due the event loop came to a task, p99: what every request waits at least.",
            "s",
            [Query(quantile(0.99, "candlecast_event_loop_lag_seconds", "instance"), "{{instance}}")],
        ),
        Panel(
            "Tasks of the event loop",
            "Open requests, and what runs beside them; it grows for good only where something is never finished.",
            "short",
            [Query("candlecast_event_loop_tasks{<service>}", "{{instance}}")],
        ),
        Panel(
            "Garbage collections",
            "By generation; the oldest stops everything for longest.",
            "cps",
            [Query(rate("python_gc_collections_total", "generation"), "generation {{generation}}")],
        ),
        Panel(
            "Redis: time of an operation",
            "p99 by operation, however many commands it takes.",
            "s",
            [Query(quantile(0.99, "candlecast_redis_command_duration_seconds", "op"), "{{op}}")],
        ),
        Panel(
            "Redis: operations and errors",
            "Per second.",
            "ops",
            [
                Query(rate("candlecast_redis_command_duration_seconds_count", "job"), "operations"),
                Query(rate("candlecast_redis_errors_total", "op, kind"), "{{op}} {{kind}}"),
            ],
        ),
        Panel(
            "Cache size",
            "Forecasts kept in memory.",
            "bytes",
            [Query("candlecast_cache_bytes{<service>}", "{{instance}}")],
        ),
    ),
)

QUALITY: Final = Dashboard(
    uid="candlecast-quality",
    title="Candlecast / Forecast quality",
    description="What served forecasts were worth, over the newest 20 blocks of time.",
    variables={
        "model": f"label_values(candlecast_model_symbols{{{_JOB}}}, model)",
        "interval": f"label_values(candlecast_model_symbols{{{_JOB}}}, interval)",
        "steps": f"label_values(candlecast_model_symbols{{{_JOB}}}, steps)",
        "symbol": f"label_values(candlecast_candles_last_close_timestamp_seconds{{{_JOB}}}, symbol)",
    },
    panels=(
        Panel(
            "Relative error, all symbols",
            "Error over the naive forecast's with its 95 % interval: below 1 is better than the last close.",
            "none",
            [
                Query(f"{_BY_MODEL} (candlecast_model_relative_mae_ratio{{<model>}})", _MODEL),
                Query(f"{_BY_MODEL} (candlecast_model_relative_mae_low_ratio{{<model>}})", f"{_MODEL} low"),
                Query(f"{_BY_MODEL} (candlecast_model_relative_mae_high_ratio{{<model>}})", f"{_MODEL} high"),
            ],
            width=12,
            lines=((1.0, "red"),),
        ),
        Panel(
            "Drift score, all symbols",
            "Cumulative sum of what errors exceed their baseline by: 5 warns, 10 is the alarm.",
            "none",
            [Query(f"{_BY_MODEL} (candlecast_model_drift_score{{<model>}})", _MODEL)],
            width=12,
            lines=((5.0, "yellow"), (10.0, "red")),
        ),
        Panel(
            "Drift, all symbols",
            "The state of each model over all its symbols.",
            "none",
            [Query(f"{_BY_MODEL} (candlecast_model_drift_state{{<model>}})", _MODEL)],
            kind="state-timeline",
            width=12,
            states=_DRIFT,
        ),
        Panel(
            "Drift by symbol",
            "The state of each model for each symbol; the alarm is at a score of 12.",
            "none",
            [Query(f"{_BY_SYMBOL} (candlecast_symbol_drift_state{{<symbol>}})", _SYMBOL)],
            kind="state-timeline",
            width=12,
            states=_DRIFT,
        ),
        Panel(
            "Error, all symbols (bps)",
            "Mean absolute error of closes in hundredths of a per cent of the price, beside the naive forecast's.",
            "none",
            [
                Query(f"1e4 * {_BY_MODEL} (candlecast_model_mae_log_return{{<model>}})", _MODEL),
                Query(f"1e4 * {_BY_MODEL} (candlecast_model_naive_mae_log_return{{<model>}})", f"{_MODEL} naive"),
            ],
        ),
        Panel(
            "Bias, all symbols (bps)",
            "Mean error of closes in hundredths of a per cent, positive where forecasts were too low.",
            "none",
            [Query(f"1e4 * {_BY_MODEL} (candlecast_model_bias_log_return{{<model>}})", _MODEL)],
        ),
        Panel(
            "Interval score, all symbols (bps)",
            "Width of the 80 % band and 10 times what lies outside: small is sharp and right.",
            "none",
            [Query(f"1e4 * {_BY_MODEL} (candlecast_model_interval_score_log_return{{<model>}})", _MODEL)],
        ),
        Panel(
            "Coverage, all symbols",
            "Share of closes inside the 80 % band.",
            "percentunit",
            [Query(f"{_BY_MODEL} (candlecast_model_coverage_ratio{{<model>}})", _MODEL)],
            lines=((0.8, "green"),),
        ),
        Panel(
            "Coverage, recalibrated",
            "The same of the recalibrated band, whether it is served or not.",
            "percentunit",
            [Query(f"{_BY_MODEL} (candlecast_model_recalibrated_coverage_ratio{{<model>}})", _MODEL)],
            lines=((0.8, "green"),),
        ),
        Panel(
            "Recalibration by symbol",
            "What the distance of quantiles from the median is multiplied by.",
            "none",
            [Query(f"{_BY_SYMBOL} (candlecast_symbol_recalibration_scale_ratio{{<symbol>}})", _SYMBOL)],
        ),
        Panel(
            "Worst symbols",
            "The ten largest relative errors; GET /accuracy/SYMBOL has the details.",
            "none",
            [Query(f"topk(10, {_BY_SYMBOL} (candlecast_symbol_relative_mae_ratio{{<symbol>}}))", "")],
            kind="table",
            width=12,
        ),
        Panel(
            "Relative error by symbol",
            "Error over the naive forecast's, with its 95 % interval.",
            "none",
            [
                Query(f"{_BY_SYMBOL} (candlecast_symbol_relative_mae_ratio{{<symbol>}})", _SYMBOL),
                Query(f"{_BY_SYMBOL} (candlecast_symbol_relative_mae_low_ratio{{<symbol>}})", f"{_SYMBOL} low"),
                Query(f"{_BY_SYMBOL} (candlecast_symbol_relative_mae_high_ratio{{<symbol>}})", f"{_SYMBOL} high"),
            ],
            width=12,
            lines=((1.0, "red"),),
        ),
        Panel(
            "Error by symbol (bps)",
            "Mean absolute error of closes beside the naive forecast's.",
            "none",
            [
                Query(f"1e4 * {_BY_SYMBOL} (candlecast_symbol_mae_log_return{{<symbol>}})", _SYMBOL),
                Query(f"1e4 * {_BY_SYMBOL} (candlecast_symbol_naive_mae_log_return{{<symbol>}})", f"{_SYMBOL} naive"),
            ],
        ),
        Panel(
            "Bias by symbol (bps)",
            "Mean error of closes, positive where forecasts were too low.",
            "none",
            [Query(f"1e4 * {_BY_SYMBOL} (candlecast_symbol_bias_log_return{{<symbol>}})", _SYMBOL)],
        ),
        Panel(
            "Interval score by symbol (bps)",
            "Width of the 80 % band and 10 times what lies outside.",
            "none",
            [Query(f"1e4 * {_BY_SYMBOL} (candlecast_symbol_interval_score_log_return{{<symbol>}})", _SYMBOL)],
        ),
        Panel(
            "Coverage by symbol",
            "Share of closes inside the 80 % band, as drawn and recalibrated.",
            "percentunit",
            [
                Query(f"{_BY_SYMBOL} (candlecast_symbol_coverage_ratio{{<symbol>}})", _SYMBOL),
                Query(
                    f"{_BY_SYMBOL} (candlecast_symbol_recalibrated_coverage_ratio{{<symbol>}})",
                    f"{_SYMBOL} recalibrated",
                ),
            ],
            lines=((0.8, "green"),),
        ),
        Panel(
            "Drift score by symbol",
            "Cumulative sum of what errors exceed their baseline by: 5 warns, 12 is the alarm.",
            "none",
            [Query(f"{_BY_SYMBOL} (candlecast_symbol_drift_score{{<symbol>}})", _SYMBOL)],
            lines=((5.0, "yellow"), (12.0, "red")),
        ),
        Panel(
            "What this is known from",
            "Symbols, blocks of time that are scored, and blocks that drift is judged by.",
            "short",
            [
                Query(f"{_BY_MODEL} (candlecast_model_symbols{{<model>}})", f"{_MODEL} symbols"),
                Query(f"{_BY_MODEL} (candlecast_model_scored_blocks{{<model>}})", f"{_MODEL} scored"),
                Query(f"{_BY_MODEL} (candlecast_model_drift_blocks{{<model>}})", f"{_MODEL} judged"),
                Query("min by (symbol) (candlecast_symbol_scored_blocks{<symbol>})", "{{symbol}} scored, least"),
                Query("min by (symbol) (candlecast_symbol_drift_blocks{<symbol>})", "{{symbol}} judged, least"),
            ],
        ),
        Panel(
            "Age of the newest candle",
            "Since it closed.",
            "s",
            [
                Query(
                    "max by (symbol, interval) (time() - candlecast_candles_last_close_timestamp_seconds{<candles>})",
                    "{{symbol}} {{interval}}",
                )
            ],
        ),
        Panel(
            "Stale by",
            "How long forecasts from a symbol's history have been of the past; negative while they are not.",
            "s",
            [
                Query(
                    "max by (symbol, interval) (time() - candlecast_candles_stale_timestamp_seconds{<candles>})",
                    "{{symbol}} {{interval}}",
                )
            ],
            lines=((0.0, "red"),),
        ),
        Panel(
            "The ledger",
            "Steps of served forecasts: noted, scored, scored anew, and what became of the rest.",
            "cps",
            [Query(rate("candlecast_ledger_steps_total", "outcome", _JOB), "{{outcome}}")],
        ),
        Panel(
            "Waiting for the ledger",
            "Forecasts that wait until Redis takes them, and those given up.",
            "short",
            [
                Query(f"sum(candlecast_ledger_spool_entries{{{_JOB}}})", "waiting"),
                Query(increase("candlecast_ledger_spool_dropped_total", "job", _JOB), "given up"),
            ],
        ),
        Panel(
            "Time of a round",
            "Of the evaluator over all series, once a minute.",
            "s",
            [Query(f"candlecast_evaluator_duration_seconds{{{_JOB}}}", "{{instance}}")],
        ),
        Panel(
            "Failures of a round",
            "What the evaluator could not evaluate.",
            "short",
            [Query(increase("candlecast_evaluator_failures_total", "instance", _JOB), "{{instance}}")],
        ),
        Panel(
            "Age of the scores",
            "Since the evaluator was last done with everything it had been told of.",
            "s",
            [
                Query(
                    f"time() - candlecast_evaluator_last_success_timestamp_seconds{{{_JOB}}}",
                    "{{instance}}",
                )
            ],
            width=4,
        ),
        Panel(
            "Symbols left out",
            "Symbols without series of their own, beyond CANDLECAST_METRIC_SYMBOLS.",
            "short",
            [Query(f"max(candlecast_evaluator_symbols_omitted{{{_JOB}}})", "left out")],
            kind="stat",
            width=4,
        ),
    ),
)

DASHBOARDS: Final = (SERVICE, MODELS, QUALITY)


def as_json(dashboard: Dashboard) -> str:
    """A dashboard as Grafana reads it from a file."""
    model = {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": ["candlecast"],
        "schemaVersion": _SCHEMA_VERSION,
        "editable": False,
        "graphTooltip": 1,
        "time": {"from": "now-6h", "to": "now"},
        "refresh": "30s",
        "templating": {"list": [_datasource(), *(_variable(*each) for each in dashboard.variables.items())]},
        "panels": list(_panels(dashboard.panels)),
    }
    return json.dumps(model, indent=1, ensure_ascii=False) + "\n"


def _datasource() -> dict[str, Any]:
    current = {"text": "Prometheus", "value": "prometheus"}
    return {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "current": current,
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,  # with the range of time
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _panels(panels: Sequence[Panel]) -> Iterator[dict[str, Any]]:
    """From left to right, in rows of one height."""
    x = y = 0
    for number, panel in enumerate(panels, start=1):
        if x + panel.width > _COLUMNS:
            x, y = 0, y + _HEIGHT
        yield {"id": number, "gridPos": {"x": x, "y": y, "w": panel.width, "h": _HEIGHT}, **_panel(panel)}
        x += panel.width


def _panel(panel: Panel) -> dict[str, Any]:
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "targets": [_target(panel, chr(ord("A") + place), query) for place, query in enumerate(panel.queries)],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": []},
        "options": _options(panel),
        **({"transformations": _COLUMNS_ONLY} if panel.kind == "table" else {}),
    }


def _target(panel: Panel, letter: str, query: Query) -> dict[str, Any]:
    at_once = panel.kind in ("stat", "table", "bargauge")
    return {
        "refId": letter,
        "datasource": _DATASOURCE,
        "expr": expression(query),
        "legendFormat": query.legend or "__auto",
        "format": {"table": "table", "heatmap": "heatmap"}.get(panel.kind, "time_series"),
        "instant": at_once,
        "range": not at_once,
    }


def expression(query: Query) -> str:
    """As it is sent, but for Grafana's own variables."""
    found = query.expr
    for name, matchers in _MATCHERS.items():
        found = found.replace(name, matchers)
    return found


def _defaults(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit}
    if panel.kind == "timeseries":
        defaults["custom"] = {
            "lineWidth": 1,
            "fillOpacity": 20 if panel.stacked else 0,
            "stacking": {"mode": "normal" if panel.stacked else "none"},
            "thresholdsStyle": {"mode": "dashed" if panel.lines else "off"},
        }
    if panel.lines:
        base = {"color": "red" if panel.kind == "stat" else "transparent", "value": None}
        steps = [base, *({"color": colour, "value": value} for value, colour in panel.lines)]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
    if panel.states:
        options = {str(value): {"text": text, "color": colour} for value, (text, colour) in enumerate(panel.states)}
        defaults["mappings"] = [{"type": "value", "options": options}]
    return defaults


def _options(panel: Panel) -> dict[str, Any]:
    if panel.kind == "timeseries":
        return {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}}
    if panel.kind == "heatmap":
        return {"calculate": False, "yAxis": {"unit": panel.unit}}
    if panel.kind in ("stat", "bargauge"):
        return {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value" if panel.lines else "none"}
    return {}


_COLUMNS_ONLY: Final = [
    {"id": "organize", "options": {"excludeByName": {"Time": True, "__name__": True, "job": True}}},
]


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for each in DASHBOARDS:
        (FOLDER / f"{each.uid.removeprefix('candlecast-')}.json").write_text(as_json(each))
