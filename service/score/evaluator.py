"""The evaluator: keeps at hand what every series' forecasts were worth, and recomputes it where candles have come."""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from model_store.files import StoreError
from model_store.manifest import Baseline
from model_store.store import PRODUCTION, ModelStore
from models.calendars import UnknownCalendar, get_calendar
from models.candles import InvalidCandles, interval_ms
from models.scoring import GROUPS, block_length, group_of
from service.engine.history import History, HistoryUnavailable, StoredSeries
from service.engine.series import stale_from
from service.metrics import Metrics
from service.score.auto import NAIVE, chosen
from service.score.drift import Drift, Losses, baseline_for, drift_of_model, drift_of_symbol, losses
from service.score.ledger import SUMS, Blocks, Ledger
from service.score.standings import RECENT_BLOCKS, Compared, Scores, Standing, compared, related_blocks, scores
from service.state import REDIS_ERRORS

_log = logging.getLogger(__name__)

Series = tuple[str, str]  # symbol, interval
Owner = tuple[str, int]  # name@version, group of horizons

_SETTLE_MS: Final = 5 * 60_000  # or two candles: until then a block may still be restated
_ALIASES_SECONDS: Final = 1.0
_EVERY_SECONDS: Final = 60.0  # all series, for what other processes have ingested
_GATHER_SECONDS: Final = 0.05  # candles of one instant come together


@dataclass(frozen=True)
class SeriesStandings:
    """Everything that is known of one series; another object as soon as anything changes."""

    standings: Mapping[Owner, Standing] = field(default_factory=dict)
    scales: Mapping[Owner, float] = field(default_factory=dict)  # of calibrated bands
    best: Mapping[int, str] = field(default_factory=dict)  # what auto means, by group of horizons

    def of(self, model: str, horizon: int) -> Standing | None:
        """That of the last steps of such a forecast."""
        return self.standings.get((model, group_of(horizon)))


@dataclass(frozen=True)
class ModelStanding:
    """One model, version, interval and group of horizons over all symbols."""

    model: str
    interval: str
    group: int
    symbols: int
    all: Scores
    recent: Scores
    drift: Drift


@dataclass(frozen=True)
class Freshness:
    """Of the stored candles of a series, UTC ms."""

    last_close: int
    stale_from: int  # when so many more have closed that a forecast from these is one of the past


@dataclass(frozen=True)
class _Evaluated:
    """What one evaluation of a series found."""

    calendar: str
    blocks: Mapping[Owner, Blocks]
    losses: Mapping[Owner, Losses]
    published: SeriesStandings


_NOTHING: Final = SeriesStandings()
Follow = Callable[[Mapping[Series, Mapping[Owner, Blocks]]], Awaitable[None]]


class Evaluator:
    """Reading costs next to nothing, since requests do; standings are recomputed in a thread.

    What went wrong is logged and tried again.
    """

    def __init__(
        self,
        ledger: Ledger,
        history: History,
        store: ModelStore,
        now: Callable[[], int],
        metrics: Metrics,
        follow: Follow,
    ) -> None:
        """`follow` hears of everything that was scored, after each look at everything."""
        self.last_success = 0.0  # UTC seconds
        self._ledger = ledger
        self._history = history
        self._store = store
        self._now = now
        self._metrics = metrics
        self._follow = follow
        self._fresh: Mapping[Series, Freshness] = {}
        self._known: dict[Series, _Evaluated] = {}
        self._models: tuple[ModelStanding, ...] = ()
        self._best_of_all: Mapping[tuple[str, int], str] = {}  # by interval and group
        self._aliases: dict[str, tuple[float, Mapping[str, str]]] = {}  # with when they were read
        self._baselines = lru_cache(256)(lambda exact: store.manifest(exact).baselines)
        self._touched: set[Series] = set()
        self._current: Series | None = None
        self._wake = asyncio.Event()
        self._progress = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._stopped = False
        started = time.time()  # or the scores of a process that has just started would be half a century old
        metrics.evaluator_success.set_function(lambda: self.last_success or started)

    def start(self) -> None:
        """Evaluate everything, then whatever is touched."""
        self._task = asyncio.create_task(self._work(), name="evaluator")

    async def stop(self) -> None:
        """Leave the rest for the next start."""
        self._stopped = True
        if self._task:
            while not self._task.done():
                self._task.cancel()  # again, since the Redis client can swallow one while it reconnects
                await asyncio.wait({self._task}, timeout=0.1)

    def of(self, symbol: str, interval: str) -> SeriesStandings:
        """Of one series; empty where nothing was scored."""
        found = self._known.get((symbol, interval))
        return found.published if found else _NOTHING

    def series(self) -> Mapping[Series, SeriesStandings]:
        """Of every series of which anything was scored."""
        return {series: found.published for series, found in list(self._known.items())}

    def freshness(self) -> Mapping[Series, Freshness]:
        """Of every stored series, a minute ago at most."""
        return self._fresh

    def models(self) -> tuple[ModelStanding, ...]:
        """Every model over all its symbols."""
        return self._models

    async def compared(self, model: str, rival: str) -> list[Compared]:
        """Two versions (name@version) by interval and group of horizons, where both were scored."""
        return await asyncio.to_thread(_compared, model, rival, dict(self._known))

    def best(self, symbol: str, interval: str, horizon: int) -> str | None:
        """What `auto` means for so many steps: the choice for the series, else for all symbols of its interval.

        None where nothing was scored.
        """
        group = group_of(horizon)
        return self.of(symbol, interval).best.get(group) or self._best_of_all.get((interval, group))

    def touch(self, symbol: str, interval: str) -> None:
        """Candles of a series came."""
        self._touched.add((symbol, interval))
        self._wake.set()

    async def caught_up(self, symbol: str, interval: str) -> None:
        """Return when the candles of a series that have been announced are in its standings."""
        series = symbol, interval
        while not self.last_success or series in self._touched or series == self._current:
            await self._progress.wait()

    async def evaluate(self, symbol: str, interval: str) -> None:
        """Recompute one series and publish it."""
        stored = (await self._history.calendars(symbol)).get(interval)
        blocks = await self._ledger.blocks(symbol, interval)
        scales = await self._ledger.scales(symbol, interval)
        if blocks or scales:
            calendar = stored.name if stored else "24/7"
            found = await asyncio.to_thread(self._evaluated, symbol, interval, calendar, blocks, scales)
            known = self._known.get((symbol, interval))
            if known and known.published == found.published:
                found = replace(found, published=known.published)
            self._known[symbol, interval] = found
        else:
            self._known.pop((symbol, interval), None)

    async def summarise(self) -> None:
        """Recompute what all symbols of each model say together."""
        models = await asyncio.to_thread(self._over_symbols, dict(self._known))
        self._best_of_all = await asyncio.to_thread(self._best_over_symbols, models)
        self._models = models

    async def _work(self) -> None:
        due, failed = 0.0, False
        while not self._stopped:
            started = time.monotonic()
            everything = started >= due
            try:
                if everything:
                    await self._look_at_all()
                    due = time.monotonic() + _EVERY_SECONDS
                while self._touched:
                    self._current = self._touched.pop()
                    await self._attempt(*self._current)
                    self._advance()
                await self.summarise()
                if everything:
                    await self._follow({series: each.blocks for series, each in self._known.items()})
                    self._metrics.evaluator_seconds.set(time.monotonic() - started)
                self.last_success, failed = time.time(), False
            except (HistoryUnavailable, *REDIS_ERRORS) as error:
                if not failed:
                    _log.warning("scores are not up to date: %s", type(error).__name__)
                self._metrics.evaluator_failures.inc()
                due, failed = 0.0, True  # everything, as soon as Redis answers
            except Exception:  # noqa: BLE001 - the next candles may be better
                self._metrics.evaluator_failures.inc()
                _log.exception("an evaluation failed")
            self._advance()
            if not self._stopped:
                await self._rest(max(0.0, due - time.monotonic()))

    async def _look_at_all(self) -> None:
        """Every series may have candles from another process, and targets that are too old to be kept."""
        stored = await self._history.symbols()
        self._fresh = await asyncio.to_thread(_freshness, stored)
        series = {(each.symbol, each.interval) for each in stored}
        for each in series:
            await self._ledger.sweep(*each, self._now())
        for gone in self._known.keys() - series:
            del self._known[gone]
        self._touched |= series

    def _advance(self) -> None:
        self._current = None
        self._progress.set()
        self._progress = asyncio.Event()

    async def _attempt(self, symbol: str, interval: str) -> None:
        try:
            await self.evaluate(symbol, interval)
        except (HistoryUnavailable, *REDIS_ERRORS):
            raise
        except Exception:  # noqa: BLE001 - one series must not keep the others waiting
            self._metrics.evaluator_failures.inc()
            _log.exception("%s %s was not evaluated", symbol, interval)

    async def _rest(self, seconds: float) -> None:
        self._wake.clear()
        if self._touched:  # while it was being summarised
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(1.0, seconds)):
                await self._wake.wait()
        await asyncio.sleep(_GATHER_SECONDS)

    # -- in a thread -------------------------------------------------------------------------------

    def _evaluated(
        self,
        symbol: str,
        interval: str,
        calendar: str,
        blocks: Mapping[Owner, Blocks],
        scales: Mapping[Owner, float],
    ) -> _Evaluated:
        standings: dict[Owner, Standing] = {}
        standardised: dict[Owner, Losses] = {}
        for (model, group), found in blocks.items():
            related = related_blocks(calendar, interval, group)
            whole, recent = scores(found.sums, related), scores(found.sums[-RECENT_BLOCKS:], related)
            if whole is None or recent is None:
                continue
            baseline = baseline_for(self._baselines_of(model), symbol, interval, group)
            if baseline:
                standardised[model, group] = losses(found, baseline, first_unsealed(self._now(), interval, group))
            drift = drift_of_symbol(standardised.get((model, group)), baseline, interval, group)
            standings[model, group] = Standing(model, group, whole, recent, drift)
        best = self._best(symbol, interval, blocks, standings)
        return _Evaluated(calendar, blocks, standardised, SeriesStandings(standings, scales, best))

    def _best(
        self, symbol: str, interval: str, blocks: Mapping[Owner, Blocks], standings: Mapping[Owner, Standing]
    ) -> dict[int, str]:
        """Of the versions that answer for the symbol."""
        served = {model for model, _ in blocks if self._in_production(model, symbol)}
        found = {}
        for group in {group for _, group in blocks}:
            those = {model: each for (model, its), each in blocks.items() if its == group and model in served}
            known = {model: each for (model, its), each in standings.items() if its == group}
            best = chosen(those, known, self._now() // (block_length(group) * interval_ms(interval)))
            if best:
                found[group] = best
        return found

    def _in_production(self, model: str, symbol: str = "") -> bool:
        name, _, version = model.partition("@")
        aliases = self._aliases_of(name)
        return aliases.get(symbol, aliases.get(PRODUCTION)) == version

    def _aliases_of(self, name: str) -> Mapping[str, str]:
        """As they were a second ago at most: to a store in a bucket every look is a request."""
        read, known = self._aliases.get(name, (-math.inf, {}))
        if time.monotonic() - read > _ALIASES_SECONDS:
            with contextlib.suppress(StoreError, OSError):
                known = self._store.aliases(name)
            self._aliases[name] = time.monotonic(), known
        return known

    def _best_over_symbols(self, models: Sequence[ModelStanding]) -> dict[tuple[str, int], str]:
        """Of the models in production, the one with the best forecasts of all symbols; NAIVE where all are worse."""
        found: dict[tuple[str, int], list[ModelStanding]] = {}
        for each in models:
            if self._in_production(each.model):
                found.setdefault((each.interval, each.group), []).append(each)
        return {owner: best for owner, those in found.items() if (best := _best_of(those))}

    def _over_symbols(self, everything: Mapping[Series, _Evaluated]) -> tuple[ModelStanding, ...]:
        members: dict[tuple[str, str, int], list[_Evaluated]] = {}
        for (_, interval), each in sorted(everything.items()):
            for model, group in each.published.standings:
                members.setdefault((model, interval, group), []).append(each)
        return tuple(self._model(*owner, found) for owner, found in sorted(members.items()))

    def _model(self, model: str, interval: str, group: int, members: Sequence[_Evaluated]) -> ModelStanding:
        owner = model, group
        sums = by_block([each.blocks[owner] for each in members])
        related = max(related_blocks(each.calendar, interval, group) for each in members)
        whole, recent = scores(sums, related), scores(sums[-RECENT_BLOCKS:], related)
        assert whole
        assert recent
        baseline = baseline_for(self._baselines_of(model), "*", interval, group)
        found = [each.losses[owner] for each in members if owner in each.losses]
        drift = drift_of_model(found, baseline, interval, group)
        return ModelStanding(model, interval, group, len(members), whole, recent, drift)

    def _baselines_of(self, model: str) -> Sequence[Baseline]:
        try:
            return self._baselines(model)
        except StoreError:  # it is not in this store any more
            return ()


def _best_of(those: Sequence[ModelStanding]) -> str | None:
    if all(each.recent.is_worse_than_naive for each in those):
        return NAIVE
    scored = {each.model: each.all for each in those}
    ratios = {model: each.crps / each.naive_mae_log_return for model, each in scored.items() if each.relative_mae}
    return min(ratios, key=lambda model: ratios[model], default=None)


def _compared(model: str, rival: str, everything: Mapping[Series, _Evaluated]) -> list[Compared]:
    pairs: dict[tuple[str, int], list[tuple[str, Blocks, Blocks]]] = {}
    for (_, interval), each in sorted(everything.items()):
        for group in range(len(GROUPS)):
            own, others = each.blocks.get((model, group)), each.blocks.get((rival, group))
            if own and others and (both := np.intersect1d(own.numbers, others.numbers)).size:
                found = each.calendar, at_blocks(own, both), at_blocks(others, both)
                pairs.setdefault((interval, group), []).append(found)
    return [pair for owner, members in sorted(pairs.items()) if (pair := _compared_over(*owner, members))]


def _compared_over(interval: str, group: int, members: Sequence[tuple[str, Blocks, Blocks]]) -> Compared | None:
    calendars, own, others = zip(*members, strict=True)
    related = max(related_blocks(calendar, interval, group) for calendar in calendars)
    sums = by_block(own), by_block(others)
    return compared(*sums, related, interval=interval, group=group, symbols=len(members))


def first_unsealed(now: int, interval: str, group: int) -> int:
    """The first block whose candles may still be on their way."""
    step = interval_ms(interval)
    return (now - step - max(2 * step, _SETTLE_MS)) // (block_length(group) * step)


def at_blocks(blocks: Blocks, numbers: NDArray[np.int64]) -> Blocks:
    """Those of these numbers."""
    kept = np.isin(blocks.numbers, numbers)
    return Blocks(blocks.numbers[kept], blocks.sums[kept])


def _freshness(stored: Sequence[StoredSeries]) -> dict[Series, Freshness]:
    """Of the series whose calendar can be read and reaches their last candle."""
    found = {}
    for each in stored:
        with contextlib.suppress(UnknownCalendar, InvalidCandles, LookupError):
            last, calendar = np.array([each.last], dtype=np.int64), get_calendar(each.calendar)
            closed = int(calendar.closes(last, each.interval)[0])
            found[each.symbol, each.interval] = Freshness(closed, stale_from(calendar, each.interval, last))
    return found


def by_block(parts: Sequence[Blocks]) -> np.ndarray[Any, Any]:
    """Sums of several series, added up block by block."""
    numbers = np.unique(np.concatenate([part.numbers for part in parts]))
    total = np.zeros(len(numbers), SUMS)
    for part in parts:
        places = np.searchsorted(numbers, part.numbers)
        for name in SUMS.names or ():
            total[name][places] += part.sums[name]
    return total
