"""Model references to loaded versions: resolved at every request, loaded once, off the event loop."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

from model_store.files import VerificationFailed
from model_store.manifest import Manifest
from model_store.store import ModelStore
from models.forecaster import Forecaster
from service.engine.selection import Choice, Selection
from service.metrics import Metrics, Snapshot

_log = logging.getLogger(__name__)

Build = Callable[[str, Mapping[str, Any], Mapping[str, Any], str], Forecaster]


class ModelUnavailable(RuntimeError):
    """The store has the version, but it cannot be loaded."""


@dataclass(frozen=True)
class LoadedModel:
    """One version that can forecast, by one runtime."""

    manifest: Manifest
    forecaster: Forecaster
    runtime: str = "eager"
    dtype: str = "float32"
    settled: bool = True  # False while it answers in place of the runtime chosen for this machine
    choice: Choice | None = None

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
    def family(self) -> str:
        return self.manifest.family


class Registry:
    """The versions of a store, by reference. `nicknames` maps the words of the API to names in the store."""

    def __init__(
        self,
        store: ModelStore,
        build: Build,
        nicknames: Mapping[str, str],
        device: str,
        selection: Selection,
        metrics: Metrics,
    ) -> None:
        self.store = store
        self.nicknames = nicknames
        self._selection = selection
        self._settled: dict[str, LoadedModel] = {}
        self._settling: set[asyncio.Task[None]] = set()
        self._build = build
        self._device = device
        self._metrics = metrics
        self._resolved: dict[str, tuple[str, str]] = {}
        self._noted: set[str] = set()
        self._loads: dict[str, asyncio.Task[LoadedModel]] = {}
        metrics.registry.register(Snapshot(self._as_metrics))
        for name in nicknames.values():
            metrics.expect_load(name)

    async def get(self, reference: str) -> LoadedModel:
        """The version that `name`, `name@version` or `name@alias` means now, loaded if it is not yet.

        It runs eagerly until the runtime chosen for this machine is ready. Raises VersionNotFound or
        ModelUnavailable; requests for one version share one load, which goes on when a request is cancelled.
        """
        exact = await self._resolve(reference)
        load = self._loads.get(exact)
        if load is None:
            load = asyncio.create_task(self._load(exact), name=f"load {exact}")
            self._loads[exact] = load
        eager = await asyncio.shield(load)
        return self._settled.get(exact, eager)

    def at_hand(self, reference: str) -> LoadedModel | None:
        """What `get` would answer without reading or loading anything; None where it would have to."""
        name, reference = self._in_full(reference)
        stamp, exact = self._resolved.get(reference, (None, ""))
        load = self._loads.get(exact)
        if load is None or not load.done() or stamp != self.store.stamp(name):
            return None
        return self._settled.get(exact) or load.result()

    def loaded(self) -> dict[str, LoadedModel]:
        """`name@version` to the versions in memory."""
        return {
            exact: self._settled.get(exact, load.result())
            for exact, load in list(self._loads.items())  # read by a thread too
            if load.done() and not load.cancelled() and load.exception() is None
        }

    def note_broken(self, name: str, error: Exception) -> str:
        """`name`, having logged the first time what is wrong with it."""
        if name not in self._noted:
            self._noted.add(name)
            _log.error("%s", error)
        return name

    async def _resolve(self, reference: str) -> str:
        """`name@version` of a reference; the store is read again only when an alias has moved."""
        name, reference = self._in_full(reference)
        known = self._resolved.get(reference)
        stamp = self.store.stamp(name)  # before the aliases are read: one that moves meanwhile is noticed next time
        if known and known[0] == stamp:
            return known[1]
        exact = "@".join(await asyncio.to_thread(self.store.resolve, reference))
        self._resolved[reference] = (stamp, exact)
        return exact

    def _in_full(self, reference: str) -> tuple[str, str]:
        """The name that a reference means in the store, and the reference with it."""
        name, at, wanted = reference.partition("@")
        name = self.nicknames.get(name, name)
        return name, f"{name}{at}{wanted}"

    async def _load(self, exact: str) -> LoadedModel:
        name = exact.partition("@")[0]
        started = time.monotonic()
        try:
            model = await asyncio.to_thread(self._read, exact)
        except Exception as error:
            del self._loads[exact]  # the next request tries again
            reason = "verification" if isinstance(error, VerificationFailed) else "error"
            self._metrics.model_load_failures.labels(name, reason).inc()
            _log.exception("%s cannot be loaded", exact)
            raise ModelUnavailable(f"{exact} cannot be loaded") from error
        settling = asyncio.create_task(self._settle(exact, model), name=f"settle {exact}")
        self._settling.add(settling)
        settling.add_done_callback(self._settling.discard)
        self._metrics.expect_model(name)
        self._metrics.model_ready.labels(name).set(1)
        self._metrics.model_load_seconds.labels(name).set(time.monotonic() - started)
        return model

    def _read(self, exact: str) -> LoadedModel:
        found = self.store.load(exact)
        try:
            forecaster = self._build(found.manifest.family, found.config, found.weights, self._device)
        except ValueError as error:
            raise VerificationFailed(f"{exact}: {error}") from error
        return LoadedModel(found.manifest, forecaster, settled=not self._selection.is_open(found.manifest))

    async def _settle(self, exact: str, eager: LoadedModel) -> None:
        """Put the runtime chosen for this machine in the place of the eager one."""
        try:
            choice, forecaster = await asyncio.to_thread(self._selection.settle, eager.manifest, eager.forecaster)
        except Exception:  # noqa: BLE001 - the eager model goes on answering, and is what there is
            _log.exception("%s goes on without a choice of runtime", exact)
            self._settled[exact] = replace(eager, settled=True)
            return
        self._settled[exact] = LoadedModel(
            eager.manifest, forecaster, runtime=choice.runtime, dtype=choice.dtype, choice=choice
        )

    def _as_metrics(self) -> Iterator[Metric]:
        labels = ("model", "version", "runtime", "dtype", "device")
        info = GaugeMetricFamily("candlecast_model_info", "1 for every version in memory.", labels=labels)
        for model in self.loaded().values():
            info.add_metric((model.name, model.version, model.runtime, model.dtype, self._device), 1)
        yield info

    async def stop(self) -> None:
        """Wait for what is being settled: its thread cannot be interrupted."""
        await asyncio.gather(*self._settling)
