"""What the rows share: networks, forecasters, a store and a running service, each made when a row first asks."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from bench.contenders import contenders, export_all, worth_exporting
from bench.published import KRONOS, TOTO_BASE, toto_config
from bench.references import KronosReference, TotoReference
from bench.service import WATCHED, Service, put_version, start_service
from bench.timing import Race, Stopwatch, Work, race, stopwatch_for
from model_store.store import ModelStore
from models.forecaster import Forecaster

TOTO, KRONOS_SMALL = "toto-base", "kronos-small"  # their names in the store


@dataclass
class Workbench:
    """One run of the benchmark; `pace` below 1 shortens it. The networks have the published sizes."""

    device: str = "cpu"
    pace: float = 1.0
    kronos_config: Mapping[str, Any] = field(default_factory=lambda: KRONOS["small"])
    toto_network: Mapping[str, Any] = field(default_factory=lambda: TOTO_BASE)
    exported: Mapping[str, Sequence[str]] | None = None  # by default what is worth it on this machine
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "Workbench":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def quick(self) -> bool:
        return self.pace < 1

    @property
    def stopwatch(self) -> Stopwatch:
        return stopwatch_for(self.device)

    def seconds(self, full: float) -> float:
        """The time that a row of `full` seconds may take in this run."""
        return full * self.pace

    def race(self, sides: Mapping[str, Work], seconds: float, **options: Any) -> Race:
        """`bench.timing.race` on this device, in this run's time."""
        return race(sides, seconds=self.seconds(seconds), stopwatch=self.stopwatch, **options)

    @cached_property
    def kronos_reference(self) -> KronosReference:
        return KronosReference(dict(self.kronos_config), self.device)

    @cached_property
    def toto_reference(self) -> TotoReference:
        return TotoReference(dict(self.toto_network), self.device)

    @cached_property
    def kronos(self) -> dict[str, Forecaster]:
        return contenders(self.store, KRONOS_SMALL, self.home, self.device)

    @cached_property
    def toto(self) -> dict[str, Forecaster]:
        return contenders(self.store, TOTO, self.home, self.device)

    @cached_property
    def folder(self) -> Path:
        """A temporary folder for the length of the run."""
        return Path(self._stack.enter_context(TemporaryDirectory(prefix="candlecast-bench-")))

    @cached_property
    def home(self) -> Path:
        """What belongs to the machine: its key, what it remembers."""
        return self.folder / "home"

    @cached_property
    def store(self) -> ModelStore:
        """A store with both networks in production and the artefacts that are compared."""
        store = ModelStore(self.folder / "store")
        toto = toto_config(dict(self.toto_network))
        put_version(store, TOTO, "toto", toto, self.toto_reference.weights)
        put_version(store, KRONOS_SMALL, "kronos", self.kronos_config, self.kronos_reference.weights)
        labels = worth_exporting(self.device) if self.exported is None else self.exported
        for name, family in ((TOTO, "toto"), (KRONOS_SMALL, "kronos")):
            export_all(store, name, labels.get(family, ()), self.home, self.device)
        return store

    @cached_property
    def service(self) -> Service:
        """`candlecast serve` over that store, warm."""
        settings = {
            "CANDLECAST_TOTO": TOTO,
            "CANDLECAST_KRONOS": KRONOS_SMALL,
            "CANDLECAST_DEVICE": self.device,
            "CANDLECAST_WATCH": f"{WATCHED}@1h:toto",
        }
        return self._stack.enter_context(start_service(self.store, self.home, settings))
