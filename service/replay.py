"""History played through the loop as fast as it goes: ingest, score, judge drift, recalibrate, choose, forecast.

Everything that runs is the service's own, on a private Redis. The models alone work ahead of the loop, many origins in
one batch: what they see depends on no score, and a batch changes no bit. Time is the candles' own, so two replays of
the same candles give the same numbers.
"""

import asyncio
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
import torch

from model_store.store import ModelStore
from models.calendars import get_calendar, infer_calendar
from models.candles import DAY_MS, Floats, Millis, interval_ms
from models.forecaster import Forecast, ForecastInput, batches, forecast, whole_power
from models.scoring import block_length, group_name
from service.api.forecasting import WITHOUT_WEIGHTS, forecast_input
from service.api.parameters import settle
from service.api.routes.accuracy import accuracy_of_models, accuracy_of_series
from service.api.schemas import ForecastRequest, ModelAccuracyAnswer, SeriesAccuracyAnswer
from service.app import build_services
from service.engine.history import StoredCalendar
from service.engine.registry import LoadedModel
from service.engine.series import Series
from service.score.auto import NAIVE
from service.score.ledger import Blocks, served_from
from service.score.recalibration import calibration_for
from service.services import Services
from service.settings import Settings

AUTO: Final = "auto@replay"  # whom the ledger credits with what `auto` chose
_WORST: Final = 250  # candles of the window with the worst coverage
_ROWS: Final = 16  # origins in one batch
_LEAST: Final = 64  # candles before the first forecast
_JUDGED_EVERY: Final = block_length(0)  # candles: nothing new is sealed earlier


@dataclass(frozen=True)
class Plan:
    """What is played. `start` (UTC ms): candles that open earlier are history, which nobody forecasts from."""

    start: int
    every: int = 40  # candles from one forecast to the next
    horizon: int = 30
    speed: float = float("inf")  # most candles of all symbols in a second


@dataclass(frozen=True)
class Alarm:
    """Drift that was found. `symbol` is * for all symbols of a model together."""

    at: int
    symbol: str
    interval: str
    model: str
    steps: str


@dataclass(frozen=True)
class Worst:
    """The lowest coverage of the 80 % band over about 250 candles, as served and calibrated."""

    symbol: str
    interval: str
    model: str
    steps: str
    coverage_80: float
    coverage_80_calibrated: float


@dataclass(frozen=True)
class Replayed:
    """What came of it; equal for equal candles, models and plans."""

    candles: int
    forecasts: int
    models: list[ModelAccuracyAnswer]
    series: dict[str, SeriesAccuracyAnswer]  # by SYMBOL:interval
    worst: list[Worst]
    alarms: list[Alarm]

    def as_json(self) -> dict[str, Any]:
        """All of it, for a machine."""
        return {
            "candles": self.candles,
            "forecasts": self.forecasts,
            "models": [each.model_dump() for each in self.models],
            "series": {name: each.model_dump() for name, each in self.series.items()},
            "worst": [asdict(each) for each in self.worst],
            "alarms": [asdict(each) for each in self.alarms],
        }


Progress = Callable[[int, int], None]  # hears of candles played, and of how many there are


class Clock:
    """An instant that somebody sets, UTC ms."""

    def __init__(self) -> None:
        self.instant = 0

    def __call__(self) -> int:
        return self.instant


async def replay_from_nothing(
    store_root: str | Path,
    references: Sequence[str],
    series: Sequence[Series],
    plan: Plan,
    progress: Progress = lambda done, total: None,
) -> Replayed:
    """Play on a private Redis that is thrown away, with versions of a store; see `replay`."""
    clock = Clock()
    with TemporaryDirectory() as home:
        parts = build_services(Settings(home=Path(home), redis_url=None, store_root=store_root), now=clock)
        await parts.state.start()
        try:
            await parts.state.redis.config_set("appendonly", "no")  # nothing of it outlives the replay
            models = [await asyncio.to_thread(_loaded, parts.registry.store, each) for each in references]
            return await replay(parts, clock, models, series, plan, progress)
        finally:
            await parts.state.stop()


def _loaded(store: ModelStore, reference: str) -> LoadedModel:
    """By the eager float32 runtime, whose bits depend on no batch."""
    found = store.load(reference)
    return LoadedModel(found.manifest, found.build())


def series_of(symbol: str, interval: str, timestamps: Millis, candles: Floats) -> Series:
    """A whole series, on the calendar that explains its candles; InvalidCandles where none does."""
    calendar = get_calendar(infer_calendar(timestamps, interval))
    calendar.check(timestamps, interval)
    return Series(symbol, interval, calendar, timestamps, candles, "history")


def first_unseen(store: ModelStore, references: Sequence[str]) -> int:
    """When the first candle opens that no version was trained or validated on, UTC ms; 0 where none says so."""
    seen = [0]
    for reference in references:
        manifest = store.manifest(reference)
        test = manifest.evaluation("test")
        if test:
            seen.append(utc_millis(test.start))
        elif manifest.training:
            seen.append(utc_millis(manifest.training.end) + DAY_MS)
    return max(seen)


def utc_millis(moment: str) -> int:
    """A date, or a date and time, by default UTC."""
    instant = datetime.fromisoformat(moment)
    return int((instant if instant.tzinfo else instant.replace(tzinfo=UTC)).timestamp() * 1000)


async def replay(
    parts: Services,
    clock: Clock,
    models: Sequence[LoadedModel],
    series: Sequence[Series],
    plan: Plan,
    progress: Progress = lambda done, total: None,
) -> Replayed:
    """Play all series side by side in the order of their candles.

    `clock` is that of `parts`, whose state is empty and whose evaluator does not run. ValueError if there is nothing to
    play.
    """
    with ThreadPoolExecutor(os.cpu_count(), "replay", torch.set_num_threads, (1,)) as pool:  # batches side by side
        players = [
            _Player(each, origins, models, plan, parts, pool) for each, origins in _origins(series, models, plan)
        ]
        if not players:
            raise ValueError("no series has candles enough after the start")
        play = _Play(parts, clock, players, plan, progress)
        await play.run()
    return await play.result()


class _Play:
    """All series together."""

    def __init__(
        self,
        parts: Services,
        clock: Clock,
        players: Sequence["_Player"],
        plan: Plan,
        progress: Progress,
    ) -> None:
        self._parts, self._clock, self._players, self._plan, self._progress = parts, clock, players, plan, progress
        self._alarms: list[Alarm] = []
        self._raised: set[tuple[str, str, str, int]] = set()
        self._candles = 0
        self._total = sum(player.candles for player in players)
        self._started = 0.0

    async def run(self) -> None:
        """Every origin in the order of time, and what comes after the last."""
        await asyncio.gather(*(player.load() for player in self._players))
        self._started = time.monotonic()
        unjudged = 0
        for instant, due in self._agenda():
            self._clock.instant = instant
            await self._all(player.turn(origin) for player, origin in due)
            unjudged += self._plan.every
            if unjudged >= _JUDGED_EVERY:
                unjudged = 0
                await self._judge()
        self._clock.instant = max(player.end for player in self._players)
        await self._all(player.finish() for player in self._players)
        await self._judge()

    async def result(self) -> Replayed:
        """Everything that is known now."""
        parts, players = self._parts, self._players
        series = {player.name: await accuracy_of_series(*player.key, parts) for player in players}
        worst = [each for player in players for each in await player.worst()]
        forecasts = sum(player.forecasts for player in players)
        return Replayed(self._candles, forecasts, accuracy_of_models(parts), series, worst, self._alarms)

    def _agenda(self) -> Iterator[tuple[int, list[tuple["_Player", int]]]]:
        """When which series come to which of their origins."""
        due: dict[int, list[tuple[_Player, int]]] = defaultdict(list)
        for player in self._players:
            for origin in player.origins:
                due[int(player.closes[origin])].append((player, origin))
        yield from sorted(due.items())

    async def _all(self, turns: "Iterator[Any]") -> None:
        count = sum(await asyncio.gather(*turns))
        self._candles += count
        self._progress(self._candles, self._total)
        ahead = self._candles / self._plan.speed - (time.monotonic() - self._started)
        if ahead > 0:
            await asyncio.sleep(ahead)

    async def _judge(self) -> None:
        """What the evaluator does every minute; alarms that have been raised since are noted."""
        evaluator = self._parts.evaluator
        for player in self._players:
            if player.moved:
                await evaluator.evaluate(*player.key)
                await self._parts.ledger.sweep(*player.key, player.instant)
                player.moved = False
        await evaluator.summarise()
        raised = set()
        for player in self._players:
            for (model, group), each in evaluator.of(*player.key).standings.items():
                if each.drift.state == "alarm":
                    raised.add((*player.key, model, group))
        for over_all in evaluator.models():
            if over_all.drift.state == "alarm":
                raised.add(("*", over_all.interval, over_all.model, over_all.group))
        for symbol, interval, model, group in sorted(raised - self._raised):
            self._alarms.append(Alarm(self._clock.instant, symbol, interval, model, group_name(group)))
        self._raised = raised


@dataclass(frozen=True)
class _Made:
    """A forecast that was made ahead of its time."""

    model: LoadedModel
    item: ForecastInput
    forecast: Forecast
    closes: Millis  # [H] of the candles to come


class _Player:
    """One series: where it stands, and the forecasts that were made ahead of it."""

    def __init__(
        self,
        series: Series,
        origins: Sequence[int],
        models: Sequence[LoadedModel],
        plan: Plan,
        parts: Services,
        pool: ThreadPoolExecutor,
    ) -> None:
        self.key = series.symbol, series.interval
        self.name = f"{series.symbol}:{series.interval}"
        self.origins = origins
        self.closes = series.calendar.closes(series.timestamps, series.interval)
        self.end = int(self.closes[-1])
        self.candles = len(self.closes) - origins[0]
        self.forecasts = 0
        self.moved = False  # since it was judged last
        self._series, self._plan, self._parts, self._pool = series, plan, parts, pool
        self._asked = [(model, settle(ForecastRequest(horizon=plan.horizon), model)) for model in models]
        self._stored = self._turns = 0
        self._made: Mapping[int, Sequence[_Made]] = {}
        self._ahead: asyncio.Future[Mapping[int, Sequence[_Made]]]

    @property
    def instant(self) -> int:
        """When the newest of its candles that came has closed."""
        return int(self.closes[self._stored - 1])

    async def load(self) -> None:
        """Store what lies before the first origin, and begin to forecast."""
        await self._put(self.origins[0])
        self._begin(0)

    async def turn(self, origin: int) -> int:
        """The candles up to a row come, then every model is asked; how many candles these were."""
        count = await self._put(origin + 1)
        if origin not in self._made:
            self._made = await self._ahead
            self._begin(self._turns + _ROWS)
        self._turns += 1
        await self._register(self._made[origin])
        return count

    async def finish(self) -> int:
        """The rest of the candles come."""
        return await self._put(len(self._series.timestamps))

    async def worst(self) -> list[Worst]:
        """Of every model and group of steps."""
        blocks = await self._parts.ledger.blocks(*self.key)
        return [
            Worst(*self.key, model, group_name(group), *lowest)
            for (model, group), found in sorted(blocks.items())
            if (lowest := _lowest_coverage(found, self._blocks_of_window(group)))
        ]

    def _blocks_of_window(self, group: int) -> int:
        """Blocks are spans of time, in which a market that pauses has fewer candles."""
        series = self._series
        slots = (self.end - int(series.timestamps[0])) / interval_ms(series.interval)
        return math.ceil(_WORST * slots / len(series.timestamps) / block_length(group))

    async def _put(self, stop: int) -> int:
        series, rows = self._series, slice(self._stored, stop)
        times, candles = series.timestamps[rows], series.candles[rows]
        if len(times):
            calendar = StoredCalendar(series.calendar.name, inferred=True)
            await self._parts.history.put(*self.key, times, candles, calendar)
        self._stored, self.moved = stop, True
        return len(times)

    async def _register(self, made: Sequence[_Made]) -> None:
        parts = self._parts
        scales = await parts.ledger.scales(*self.key)
        best = parts.evaluator.best(*self.key, self._plan.horizon)
        *asked, naive = made
        chosen = naive if best == NAIVE else next((each for each in asked if each.model.exact == best), asked[0])
        for name, each in [*((each.model.exact, each) for each in asked), (AUTO, chosen)]:
            await parts.ledger.register(
                served_from(
                    each.forecast,
                    each.item,
                    symbol=self._series.symbol,
                    interval=self._series.interval,
                    model=name,
                    key=blake2b(f"{name} {each.item.timestamps[-1]}".encode(), digest_size=16).digest(),
                    issued_at=parts.now(),
                    closes=each.closes,
                    scale=calibration_for("on", scales, name, self._plan.horizon).scale,
                ),
                parts.now(),
            )
        self.forecasts += len(asked)

    def _begin(self, turn: int) -> None:
        """Forecast from the origins of a turn and the next ones."""
        if origins := self.origins[turn : turn + _ROWS]:
            self._ahead = asyncio.get_running_loop().run_in_executor(self._pool, self._make, origins)

    # -- in a thread that forecasts ----------------------------------------------------------------

    def _make(self, origins: Sequence[int]) -> Mapping[int, Sequence[_Made]]:
        """Every model's forecast from every origin, and the naive one last."""
        without = WITHOUT_WEIGHTS, settle(ForecastRequest(horizon=self._plan.horizon), WITHOUT_WEIGHTS)
        made: dict[int, list[_Made]] = {origin: [] for origin in origins}
        for model, parameters in [*self._asked, without]:
            items = [forecast_input(self._until(origin), parameters, None, model) for origin in origins]
            rows = min(_ROWS, whole_power(min(model.forecaster.max_rows(item) for item in items)))
            for places, batch in batches(model.forecaster, items, rows):
                for place, item, result in zip(places, batch, forecast(model.forecaster, batch), strict=True):
                    closes = self._series.calendar.closes(item.future_timestamps, self._series.interval)
                    made[origins[place]].append(_Made(model, item, result, closes))
        return made

    def _until(self, origin: int) -> Series:
        series, rows = self._series, slice(origin + 1)
        return replace(series, timestamps=series.timestamps[rows], candles=series.candles[rows])


def _origins(series: Sequence[Series], models: Sequence[LoadedModel], plan: Plan) -> list[tuple[Series, list[int]]]:
    """The rows after whose close somebody asks, by series; in all series of one interval they open together."""
    least = max(_LEAST, *(model.manifest.limits.min_context for model in models)) - 1
    found = []
    for item in series:
        together = np.unique(np.concatenate([each.timestamps for each in series if each.interval == item.interval]))
        rows = np.arange(least, len(item.timestamps) - 1)
        opens = item.timestamps[rows]
        turn = np.searchsorted(together, opens) % plan.every == 0
        origins = rows[turn & (opens >= plan.start)].tolist()
        if origins:
            found.append((item, origins))
    return found


def _lowest_coverage(blocks: Blocks, width: int) -> tuple[float, float] | None:
    """Over so many blocks; None where there are fewer."""
    if len(blocks.numbers) < width:
        return None
    count, raw, calibrated = (
        np.convolve(blocks.sums[name], np.ones(width), "valid") for name in ("count", "covered", "covered_calibrated")
    )
    return float((raw / count).min()), float((calibrated / count).min())
