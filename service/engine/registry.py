"""Versions in memory: found by reference, loaded off the event loop, swapped when an alias moves, given back.

Whatever an alias means is answered by one version until the next one has been loaded beside it, runs by its own
runtime and has forecast; then one assignment makes it the answer to all requests that come after. What is computed
holds the version that it began with, so the old one goes when the last of its requests has been answered.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

from model_store.canary import check_canary
from model_store.files import StoreError, VerificationFailed
from model_store.manifest import ADAPTER, CONFIG, VERSION, Manifest
from model_store.store import PRODUCTION, SHADOW, LoadedVersion, ModelStore
from models.adapters import Adaptable
from models.candles import SYMBOL
from models.ensemble import EnsembleForecaster, member_of
from models.forecaster import Forecaster, InvalidModelOutput
from models.layers import WeightsMismatch
from service.engine.failures import Failures, ModelUnavailable, NoRoom, Unfit
from service.engine.memory import DRAIN_SECONDS, Leaving
from service.engine.selection import Choice, Selection
from service.metrics import Metrics, Snapshot

_log = logging.getLogger(__name__)

ADAPTED: Final = "adapter"  # the runtime of a version that is computed as an adapter of another one in memory

_LOOK_SECONDS: Final = 0.25
_STOP_SECONDS: Final = 1.0

Build = Callable[[LoadedVersion, str], Forecaster]  # of a stored version, on a device
Key = tuple[str, str]  # name of a model, alias
Executed = tuple[str, str, str, str, int]  # name, version, runtime, dtype, number of weights


@dataclass(frozen=True)
class Beside:
    """The version in memory whose network an adapter is added to, and how far the forecast is from merged weights'."""

    base: str  # name@version
    canary_moved: float  # of the canary's 80 % band


@dataclass(frozen=True)
class LoadedModel:
    """One version that can forecast, by one runtime."""

    manifest: Manifest
    forecaster: Forecaster
    runtime: str = "eager"
    dtype: str = "float32"
    settled: bool = True  # False while it answers in place of the runtime chosen for this machine
    choice: Choice | None = None
    beside: Beside | None = None  # where it is an adapter of another version
    members: tuple["LoadedModel", ...] = ()  # of an ensemble, in the order of its weights
    weights: int = 0  # number of an ensemble's weights; 0 are those that it was published with

    @property
    def name(self) -> str:
        return self.manifest.model

    @property
    def version(self) -> str:
        return self.manifest.version

    @property
    def exact(self) -> str:
        """name@version."""
        return f"{self.name}@{self.version}"

    @property
    def executed(self) -> Executed:
        """Equal for models whose forecasts are equal."""
        return self.name, self.version, self.runtime, self.dtype, self.weights

    @property
    def batched_by(self) -> tuple[str, str, str]:
        """Equal for models whose requests may share a batch: an adapter's are computed with those of its base."""
        return (self.beside.base, "eager", self.dtype) if self.beside else (self.exact, self.runtime, self.dtype)

    @property
    def family(self) -> str:
        return self.manifest.family


@dataclass(frozen=True)
class _Known:
    """What the store said of a name when its aliases had this stamp."""

    stamp: str
    aliases: Mapping[str, str]
    shadow: tuple[str, float] | None  # version, share of requests


@dataclass(eq=False)
class _Held:
    """A version in memory, or on its way there."""

    bytes: int = 0
    base: str | None = None  # the version that it is or becomes an adapter of, which stays in memory
    model: LoadedModel | None = None
    load: asyncio.Task[None] | None = None
    settling: asyncio.Task[None] | None = None
    rehearsed: bool = False
    by_version: bool = False  # asked for by its version: it stays while there is room
    members: tuple[str, ...] = ()  # of an ensemble, name@version: they stay while it does
    used: float = 0.0


class Registry:
    """The versions of a store, by reference. `nicknames` maps the words of the API to names in the store.

    `rehearse` lets a version forecast once as callers would have it, and raises what they would get. Versions take
    `budget()` bytes at most, by the size of their files; one that would be alone is loaded whatever its size.
    """

    def __init__(
        self,
        store: ModelStore,
        build: Build,
        nicknames: Mapping[str, str],
        device: str,
        selection: Selection,
        rehearse: Callable[[LoadedModel], Awaitable[None]],
        budget: Callable[[], int],
        metrics: Metrics,
    ) -> None:
        self.store = store
        self.nicknames = nicknames
        self._build = build
        self._device = device
        self._selection = selection
        self._rehearse = rehearse
        self._budget = budget
        self._metrics = metrics
        self._known: dict[str, _Known] = {}
        self._serving: dict[Key, str] = {}  # to name@version
        self._late: set[Key] = set()  # symbols whose first version of their own is not there: production's answers
        self._swaps: dict[Key, asyncio.Task[None]] = {}
        self._held: dict[str, _Held] = {}
        self._leaving = Leaving()
        self.failures = Failures(metrics)
        self._noted: set[str] = set()
        self.left_behind: list[str] = []  # loads whose threads go on after a stop
        metrics.registry.register(Snapshot(self._as_metrics))
        metrics.model_memory.labels("held").set_function(lambda: self.bytes)
        for name in nicknames.values():
            metrics.expect_load(name)

    # -- by reference ------------------------------------------------------------------------------

    async def get(self, reference: str, symbol: str = "") -> LoadedModel:
        """The version that answers `name`, `name@version` or `name@alias` now, loaded if none does yet.

        `name` alone means the version of the symbol where it has one of its own, else production's. A version that is
        the first of its alias runs eagerly until the runtime chosen for this machine is ready. Raises VersionNotFound
        or ModelUnavailable; requests for one version share one load, which goes on when a request is cancelled.
        """
        name, wanted = self._in_full(reference)
        while (model := self.at_hand(reference, symbol)) is None:
            if VERSION.fullmatch(wanted):
                exact = "@".join(await asyncio.to_thread(self.store.resolve, f"{name}@{wanted}"))
                return await self._loaded(exact, by_version=True)
            key = await self._key(name, wanted, symbol)
            if swap := self._begin(key):
                await asyncio.shield(swap)
            if self._served(key) is None:
                raise self.failures.unavailable(self._target(key) or "@".join(key))
        return model

    def at_hand(self, reference: str, symbol: str = "") -> LoadedModel | None:
        """What `get` would answer without reading or loading anything; None where it would have to."""
        name, wanted = self._in_full(reference)
        if VERSION.fullmatch(wanted):
            held = self._held.get(f"{name}@{wanted}")
            if held:
                held.by_version = True
        else:
            key = name, self._alias(name, wanted, symbol)
            exact = self._served(key)
            if exact and _is_symbol(key):
                self._begin(key)
            held = self._held.get(exact or "")
        if held is None or held.model is None:
            return None
        held.used = time.monotonic()
        return held.model

    def shadow_of(self, model: LoadedModel) -> tuple[LoadedModel, float] | None:
        """What forecasts beside a production version for nobody to see, and for which share of requests."""
        known = self._known.get(model.name)
        if known is None or known.shadow is None or self._serving.get((model.name, PRODUCTION)) != model.exact:
            return None
        held = self._held.get(self._serving.get((model.name, SHADOW), ""))
        if held is None or held.model is None or held.model.exact == model.exact:
            return None
        return held.model, known.shadow[1]

    def loaded(self) -> dict[str, LoadedModel]:
        """`name@version` to the versions in memory."""
        return {exact: held.model for exact, held in list(self._held.items()) if held.model}  # read by a thread too

    def serving(self) -> dict[Key, str]:
        """Which version answers for an alias of a name."""
        return dict(self._serving)

    def note_broken(self, name: str, error: Exception) -> str:
        """`name`, having logged the first time what is wrong with it."""
        if name not in self._noted:
            self._noted.add(name)
            _log.error("%s", error)
        return name

    @property
    def bytes(self) -> int:
        """Size of the versions in memory, on their way there, and let go while they are still computing."""
        held = sum(held.bytes for held in list(self._held.values()))
        return held + self._leaving.bytes

    def _in_full(self, reference: str) -> tuple[str, str]:
        """The name that a reference means in the store, and what it wants of it."""
        name, _, wanted = reference.partition("@")
        return self.nicknames.get(name, name), wanted

    async def _key(self, name: str, wanted: str, symbol: str) -> Key:
        """The alias that a reference means, as the store has it now if it has not been seen before."""
        key = name, self._alias(name, wanted, symbol)
        if self._target(key) is None:
            known = await asyncio.to_thread(self._read_known, name)
            if known.aliases:  # or whatever name somebody invents would be followed for ever
                self._learn(name, known)
            key = name, self._alias(name, wanted, symbol)
        if self._target(key) is None:
            await asyncio.to_thread(self.store.resolve, "@".join(key))  # says what there is
        return key

    def _alias(self, name: str, wanted: str, symbol: str) -> str:
        known = self._known.get(name)
        return wanted or (symbol if known and symbol in known.aliases else PRODUCTION)

    def _served(self, key: Key) -> str | None:
        """What answers for an alias now."""
        return self._serving.get((key[0], PRODUCTION) if key in self._late else key)

    def _target(self, key: Key) -> str | None:
        """What the store says that an alias means."""
        known = self._known.get(key[0])
        version = known and known.aliases.get(key[1])
        return f"{key[0]}@{version}" if version else None

    # -- following aliases -------------------------------------------------------------------------

    async def look(self) -> None:
        """See which aliases have moved, of the names that were asked for, and begin to swap what they mean."""
        for name, known in (await asyncio.to_thread(self._moved, dict(self._known))).items():
            self._learn(name, known)
        followed = [key for key in self._serving if not _is_symbol(key)]  # a symbol's, when it is asked for next
        for key in [*followed, *self._shadows()]:
            self._begin(key)
        await asyncio.to_thread(self._leaving.collect)

    async def idle(self) -> None:
        """Wait for every swap, load and choice of a runtime that has begun."""
        while tasks := [*self._swaps.values(), *self._under_way()]:
            await asyncio.wait(tasks)

    async def stop(self) -> None:
        """Wait a moment for what is being loaded and settled; a thread cannot be interrupted, only `left_behind`."""
        swaps = list(self._swaps.values())
        for swap in swaps:
            swap.cancel()
        await asyncio.gather(*swaps, return_exceptions=True)
        until = time.monotonic() + _STOP_SECONDS
        while (tasks := self._under_way()) and (left := until - time.monotonic()) > 0:
            await asyncio.wait(tasks, timeout=left)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.left_behind = [task.get_name() for task in tasks]

    def _under_way(self) -> list[asyncio.Task[None]]:
        return [task for held in self._held.values() for task in (held.load, held.settling) if task]

    def _read_known(self, name: str) -> _Known:
        stamp = self.store.stamp(name)  # before the aliases: one that moves meanwhile is noticed next time
        return _Known(stamp, self.store.aliases(name), self.store.shadow(name))

    def _moved(self, known: Mapping[str, _Known]) -> dict[str, _Known]:
        found = {}
        for name, each in known.items():
            what = f"aliases of {name}"
            try:
                if self.store.stamp(name) != each.stamp:
                    found[name] = self._read_known(name)
                self._noted.discard(what)
            except (StoreError, OSError) as error:  # what was served goes on
                self.note_broken(what, error)
        self._metrics.degraded.labels("store").set(any(f"aliases of {name}" in self._noted for name in known))
        return found

    def _learn(self, name: str, known: _Known) -> None:
        before = self._known.get(name, known)
        self._known[name] = known
        self.failures.moved(name, {f"{name}@{version}" for version in known.aliases.values()})
        if (name, PRODUCTION) in self._serving:
            new = {(name, alias) for alias in known.aliases.keys() - before.aliases.keys()}
            self._late |= {key for key in new if _is_symbol(key)}
        for key in [key for key in (*self._serving, *self._late) if key[0] == name and key[1] not in known.aliases]:
            self._late.discard(key)
            if key[1] != PRODUCTION:
                self._serving.pop(key, None)
        self._release()

    def _begin(self, key: Key) -> asyncio.Task[None] | None:
        """Have an alias answered by what it means; None where it is, or where that has failed a moment ago."""
        exact = self._target(key)
        if exact is None or exact == self._serving.get(key) or self.failures.is_recent(exact):
            return None
        if key not in self._swaps:
            self._swaps[key] = asyncio.create_task(self._swap(key), name=f"swap {'@'.join(key)}")
        return self._swaps[key]

    async def _swap(self, key: Key) -> None:
        name, alias = key
        try:
            while (exact := self._target(key)) and exact != self._serving.get(key):
                before = self._served(key)
                if before or alias == SHADOW:
                    await self._made_ready(exact)
                else:  # somebody waits for it
                    await self._loaded(exact)
                if exact == self._target(key) and exact in self._held:  # or it has moved meanwhile
                    self._serving[key] = exact
                    self._late.discard(key)
                    self._metrics.model_swaps.labels(name, "done" if before else "first").inc()
                    _log.info("%s is %s now, after %s", "@".join(key), exact, before or "nothing")
        except ModelUnavailable as error:
            self._metrics.model_swaps.labels(name, "failed").inc()
            _log.warning("%s goes on with %s: %s", "@".join(key), self._served(key) or "nothing", error)
        finally:
            del self._swaps[key]
            self._release()

    async def _made_ready(self, exact: str) -> None:
        """Load a version, settle its runtime and let it forecast; ModelUnavailable if any of it fails."""
        await self._loaded(exact)
        held = self._held.get(exact)
        for member in held.members if held else ():
            try:
                await self._made_ready(member)
            except ModelUnavailable as error:  # or every look would try it anew
                self.failures.note(exact, Unfit(f"{exact} blends what does not forecast: {error}"))
                raise
        if held and held.settling:
            await asyncio.shield(held.settling)
        if held is None or held.model is None or held.rehearsed:
            return
        try:
            await self._rehearse(held.model)
        except Exception as error:
            why = str(error) if isinstance(error, InvalidModelOutput) else type(error).__name__
            unfit = Unfit(f"{exact} does not forecast: {why}")
            self.failures.note(exact, unfit)
            raise ModelUnavailable(str(unfit)) from error
        held.rehearsed = True
        self.failures.forget(exact)

    # -- loading -----------------------------------------------------------------------------------

    async def _loaded(self, exact: str, *, by_version: bool = False) -> LoadedModel:
        held = self._held.get(exact)
        if held is None:
            if self.failures.is_recent(exact):
                raise self.failures.unavailable(exact)
            held = self._held[exact] = _Held()
            held.load = asyncio.create_task(self._load(exact, held), name=f"load {exact}")
        held.by_version |= by_version
        if held.load:
            await asyncio.shield(held.load)
        if held.model is None:
            raise self.failures.unavailable(exact)
        held.used = time.monotonic()
        return held.model

    async def _load(self, exact: str, held: _Held) -> None:
        name, started = exact.partition("@")[0], time.monotonic()
        try:
            manifest = await asyncio.to_thread(self.store.manifest, exact)
            held.members = await asyncio.to_thread(self.store.members, manifest)
            held.base = await asyncio.to_thread(self._base_of, manifest)
            if held.base is None or not await self._load_beside(manifest, held, held.base):
                held.base = None
                held.bytes = sum(entry.bytes for entry in manifest.files.values())
                await self._make_room(exact)
                for member in held.members:
                    await self._member(exact, member)
                if held.members:
                    found = await asyncio.to_thread(self.store.load, exact, alone=True)
                    held.model = _assembled(found.manifest, found.config, self._in_memory(held.members))
                else:
                    held.model = await asyncio.to_thread(self._read, exact)
        except Exception as error:  # noqa: BLE001 - whoever waits hears that it cannot be loaded
            del self._held[exact]
            self.failures.note(exact, error)
            return
        finally:
            held.load = None
        if held.base is None and not held.members:  # members settle by themselves
            held.settling = asyncio.create_task(self._settle(exact, held), name=f"settle {exact}")
        self.failures.loaded(exact)
        self._metrics.expect_model(name)
        self._metrics.model_ready.labels(name).set(1)
        self._metrics.model_load_seconds.labels(name).set(time.monotonic() - started)

    async def _member(self, exact: str, member: str) -> None:
        try:
            await self._loaded(member)
        except ModelUnavailable as error:
            raise StoreError(f"{exact} blends what is not served: {error}") from error

    def _in_memory(self, members: Sequence[str]) -> list[LoadedModel]:
        return [model for exact in members if (model := self._held[exact].model)]

    def _read(self, exact: str) -> LoadedModel:
        found = self.store.load(exact)
        forecaster = self._build(found, self._device)
        return LoadedModel(found.manifest, forecaster, settled=not self._selection.is_open(found.manifest))

    def _base_of(self, manifest: Manifest) -> str | None:
        """What a version can be served as an adapter of: an equal network, of which the store has the whole weights.

        One with a runtime that was built for it is served by that.
        """
        if manifest.adapts is None or manifest.canary is None or self._selection.has_artefacts(manifest):
            return None
        exact, _ = manifest.adapts
        try:
            base = self.store.manifest(exact)
        except StoreError:
            return None
        return exact if base.adapts is None and base.files[CONFIG] == manifest.files[CONFIG] else None

    async def _load_beside(self, manifest: Manifest, held: _Held, base: str) -> bool:
        """Load a version as an adapter of `base`; False where that cannot be, but its whole weights may still do."""
        exact = f"{manifest.model}@{manifest.version}"
        try:
            found = await self._loaded(base)
            held.bytes = manifest.files[ADAPTER].bytes
            await self._make_room(exact)
            held.model = await asyncio.to_thread(self._read_beside, manifest, found)
        except (ModelUnavailable, NoRoom, Unfit) as error:
            _log.warning("%s is loaded whole, not as an adapter of %s: %s", exact, base, error)
            return False
        return True

    def _read_beside(self, manifest: Manifest, base: LoadedModel) -> LoadedModel:
        """Unfit where base and adapter forecast something else than the whole weights did."""
        exact = f"{manifest.model}@{manifest.version}"
        matrices = self.store.matrices(exact)
        if not isinstance(base.forecaster, Adaptable):
            raise Unfit(f"{base.exact} takes no adapters")
        try:
            forecaster = base.forecaster.adapted(matrices)
        except WeightsMismatch as error:
            raise VerificationFailed(f"{exact}: {error}") from error
        assert manifest.canary
        try:
            moved = check_canary(manifest.canary, forecaster)
        except ValueError as error:
            raise Unfit(f"{exact}: {error}") from error
        return LoadedModel(manifest, forecaster, ADAPTED, beside=Beside(base.exact, moved))

    async def _settle(self, exact: str, held: _Held) -> None:
        """Put the runtime chosen for this machine in the place of the eager one."""
        eager = held.model
        assert eager
        try:
            choice, forecaster = await asyncio.to_thread(self._selection.settle, eager.manifest, eager.forecaster)
            held.model = LoadedModel(
                eager.manifest, forecaster, runtime=choice.runtime, dtype=choice.dtype, choice=choice
            )
        except Exception:  # noqa: BLE001 - the eager model goes on answering, and is what there is
            _log.exception("%s goes on without a choice of runtime", exact)
            held.model = replace(eager, settled=True)
        held.settling = None
        for other in self._held.values():
            if other.model and exact in other.members:
                other.model = _reassembled(other.model, self._in_memory(other.members))
        self._release()

    # -- memory ------------------------------------------------------------------------------------

    async def _make_room(self, exact: str) -> None:
        """Let go what is not needed, least recently used first, until a version fits; NoRoom if it never does."""
        budget = await asyncio.to_thread(self._budget)  # to ask a GPU may take seconds
        self._metrics.model_memory.labels("budget").set(budget)
        until = time.monotonic() + DRAIN_SECONDS
        while (taken := self.bytes) > budget and taken > (needed := self._bytes_with_base(exact)):
            if (victim := self._dispensable()) is not None:
                _log.info("%s makes room for %s", victim, exact)
                self._drop(victim)
            elif self._leaving.bytes and time.monotonic() < until:
                await asyncio.sleep(_LOOK_SECONDS)
                await asyncio.to_thread(self._leaving.collect)
            else:
                raise NoRoom(
                    f"{exact} needs {needed / 1e9:.3g} GB, and {(taken - needed) / 1e9:.3g} of the budget of"
                    f" {budget / 1e9:.3g} GB are taken: raise CANDLECAST_MEMORY_BUDGET_GB"
                )

    def _bytes_with_base(self, exact: str) -> int:
        base = self._held.get(self._held[exact].base or "")
        return self._held[exact].bytes + (base.bytes if base else 0)

    def _needed(self) -> set[str]:
        """What an alias means or is about to, what adapters are added to, and what ensembles blend.

        A symbol's version can be loaded again when it is asked for.
        """
        served = {exact for key, exact in self._serving.items() if not _is_symbol(key)}
        bases = {held.base for held in self._held.values() if held.base}
        swapped = {exact for key in self._swaps if (exact := self._target(key))}
        blended = {member for held in self._held.values() for member in held.members}
        return served | bases | swapped | blended

    def _dispensable(self) -> str | None:
        needed, symbols = self._needed(), set(self._serving.values())
        found = [
            (exact in symbols, held.used, exact)
            for exact, held in self._held.items()
            if held.model and not held.settling and exact not in needed
        ]
        return min(found)[2] if found else None

    def _release(self) -> None:
        """Let go every version that no alias means any more, unless it is asked for by its version."""
        while unneeded := self._unneeded():  # without them their bases and members may be needed by nobody
            for exact in unneeded:
                self._drop(exact)

    def _unneeded(self) -> list[str]:
        kept = self._needed() | set(self._serving.values())
        return [
            exact
            for exact, held in self._held.items()
            if held.model and not held.settling and not held.by_version and exact not in kept
        ]

    def _drop(self, exact: str) -> None:
        held = self._held.pop(exact)
        assert held.model
        for key in [key for key, served in self._serving.items() if served == exact]:
            del self._serving[key]
        self._leaving.add(held.model.forecaster, held.bytes)
        name = held.model.name
        self._metrics.model_ready.labels(name).set(any(each.name == name for each in self.loaded().values()))

    def _as_metrics(self) -> Iterator[Metric]:
        labels = ("model", "version", "runtime", "dtype", "device")
        info = GaugeMetricFamily("candlecast_model_info", "1 for every version in memory.", labels=labels)
        for model in self.loaded().values():
            info.add_metric((model.name, model.version, model.runtime, model.dtype, self._device), 1)
        yield info
        pending = GaugeMetricFamily(
            "candlecast_model_swap_pending",
            "Aliases that are answered by another version than the store says.",
            labels=("model",),
        )
        late = self._pending()
        for name in list(self._known):
            pending.add_metric((name,), sum(key[0] == name for key in late))
        yield pending

    def _pending(self) -> list[Key]:
        """Aliases that should be answered otherwise by now; symbols only if their version has failed."""
        keys = {*self._serving, *self._late, *self._shadows()}
        late = [(key, exact) for key in keys if (exact := self._target(key)) and exact != self._serving.get(key)]
        return [key for key, exact in late if not _is_symbol(key) or exact in self.failures]

    def _shadows(self) -> list[Key]:
        return [(name, SHADOW) for name, known in list(self._known.items()) if known.shadow]


def _assembled(manifest: Manifest, config: Mapping[str, Any], members: Sequence[LoadedModel]) -> LoadedModel:
    """An ensemble over its members as they run now: it has no tensors of its own."""
    try:
        parts = [member_of(each.forecaster, each.manifest.serving) for each in members]
        forecaster = EnsembleForecaster.from_config(config, parts)
    except (KeyError, ValueError) as error:
        raise VerificationFailed(f"{manifest.model}@{manifest.version}: {error}") from error
    return _reassembled(LoadedModel(manifest, forecaster), members)


def _reassembled(ensemble: LoadedModel, members: Sequence[LoadedModel]) -> LoadedModel:
    """The same over other runtimes of its members, whose names are its own."""
    forecaster = ensemble.forecaster
    assert isinstance(forecaster, EnsembleForecaster)
    return replace(
        ensemble,
        forecaster=forecaster.over([each.forecaster for each in members]),
        runtime="+".join(each.runtime for each in members),
        dtype="+".join(each.dtype for each in members),
        settled=all(each.settled for each in members),
        members=tuple(members),
    )


def _is_symbol(key: Key) -> bool:
    return SYMBOL.fullmatch(key[1]) is not None
