"""Which runtime answers for a version on this machine: the fastest whose parity passed, timed once and remembered."""

import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from model_store.artefacts import find_artefacts, machine_key, read_artefact
from model_store.files import StoreError
from model_store.manifest import Artefact, Manifest
from model_store.store import PRODUCTION, ModelStore
from models.forecaster import Forecaster, pad_rows
from models.probes import is_batch_invariant, probe, usual_contexts
from models.runtimes.cuda_graph import CudaGraphs
from models.runtimes.functions import Executable
from models.runtimes.kinds import FP32_EAGER, KINDS, platform_name

_log = logging.getLogger(__name__)

_ROUNDS: Final = 3
_ROWS: Final = 8
_ROWS_CAPTURED: Final = 32


@dataclass(frozen=True)
class Choice:
    """What was chosen for a version, by what. Times are milliseconds of one batch: of 1 request, and of 8."""

    label: str
    times_ms: dict[str, tuple[float, float]] = field(default_factory=dict)
    batch_invariant: bool | None = None  # None: without a network there is nothing to test
    forced: bool = False  # by CANDLECAST_RUNTIME

    @property
    def runtime(self) -> str:
        return self.label.partition("-")[0]

    @property
    def dtype(self) -> str:
        return self.label.partition("-")[2]


class Selection:
    """Choices under `home`/runtimes.json. They hold for one platform, torch, number of threads and set of artefacts."""

    def __init__(self, store: ModelStore, home: Path, device: str, forced: str | None) -> None:
        """`forced` is a label such as compiled-bfloat16; ValueError if there is no such runtime."""
        if forced is not None and forced not in KINDS:
            raise ValueError(f"no runtime is called {forced}: use {', '.join(KINDS)}")
        self._store = store
        self._home = home
        self._device = torch.device(device)
        self._forced = forced
        self._settling = threading.Lock()

    def remembered(self, manifest: Manifest) -> Choice | None:
        """The choice made before, unless what it holds for has changed."""
        try:
            kept = self._read()[_exact(manifest)]
            if kept["conditions"] != self._conditions(manifest):
                return None
            choice = kept["choice"]
            return Choice(**choice | {"times_ms": {label: tuple(times) for label, times in choice["times_ms"].items()}})
        except (KeyError, TypeError, ValueError, AttributeError):  # nothing, or another release's
            return None

    def is_open(self, manifest: Manifest) -> bool:
        """Whether anything but the eager float32 runtime could be chosen."""
        return bool(self._candidates(manifest))

    def has_artefacts(self, manifest: Manifest) -> bool:
        """Whether a runtime was built for this very version."""
        return bool(self._artefacts(manifest))

    def settle(self, manifest: Manifest, eager: Forecaster, *, again: bool = False) -> tuple[Choice, Forecaster]:
        """The choice and the forecaster that it means; made now, in seconds, unless it is remembered.

        A forced or remembered runtime that does not load any more is logged and left out.
        """
        with self._settling:  # one at a time: timings are taken here, and graphs captured
            choice = None if again or self._forced else self.remembered(manifest)
            if choice is not None and (loaded := self._loaded(manifest, eager, choice.label)):
                return choice, loaded
            choice, forecaster = self._choose(manifest, eager)
            self._write(manifest, choice)
            return choice, forecaster

    def _choose(self, manifest: Manifest, eager: Forecaster) -> tuple[Choice, Forecaster]:
        loaded = {FP32_EAGER: eager}
        for label in self._candidates(manifest) if isinstance(eager, Executable) else ():
            if self._forced in (None, label) and (candidate := self._loaded(manifest, eager, label)):
                loaded[label] = candidate
        times = _timed(loaded) if len(loaded) > 1 and self._forced is None else {}
        label = min(times, key=lambda name: sum(times[name])) if times else FP32_EAGER
        forced = self._forced in loaded
        if self._forced is not None and not forced:
            _log.error("%s has no %s on this machine: candlecast export makes it", _exact(manifest), self._forced)
        if forced:
            assert self._forced is not None
            label = self._forced
        tested = is_batch_invariant(loaded[label]) if isinstance(eager, Executable) else None
        return Choice(label, times, tested, forced), loaded[label]

    def _loaded(self, manifest: Manifest, eager: Forecaster, label: str) -> Forecaster | None:
        """None, having logged why, if it does not load: whatever an artefact's fault is, eager goes on serving."""
        try:
            return self._load(manifest, eager, label)
        except Exception as error:  # noqa: BLE001
            _log.error("%s: %s does not load: %s", _exact(manifest), label, error)
            return None

    def _load(self, manifest: Manifest, eager: Forecaster, label: str) -> Forecaster:
        if label == FP32_EAGER:
            return eager
        assert isinstance(eager, Executable)
        kind = KINDS[label]
        files = {} if kind.runtime == "cuda_graph" else self._files(manifest, label)
        functions = kind.load(eager.decoder, files, torch.get_num_threads())
        executed: Forecaster = eager.executed_by(functions, fours=kind.fours)
        warm(executed)
        return executed

    def _files(self, manifest: Manifest, label: str) -> dict[str, bytes]:
        found = self._artefacts(manifest)
        if label not in found:
            raise StoreError(f"{_exact(manifest)} has no {label} on this machine")
        return read_artefact(self._store, found[label], native=KINDS[label].native, key=machine_key(self._home))

    def _candidates(self, manifest: Manifest) -> list[str]:
        """Labels beside the eager float32 one: artefacts, and on a GPU graphs over what runs eagerly."""
        labels = list(self._artefacts(manifest))
        if self._device.type == "cuda":
            graphs = [label for label in KINDS if label.startswith("cuda_graph-")]
            labels += [label for label in graphs if label.replace("cuda_graph", "eager") in (*labels, FP32_EAGER)]
        return labels

    def _artefacts(self, manifest: Manifest) -> dict[str, Artefact]:
        """None if one is damaged: it is logged, and the version is served eagerly."""
        place, exact = platform_name(self._device), _exact(manifest)
        try:
            found = find_artefacts(self._store, exact, platform=place, torch_version=torch.__version__)
            return {label: artefact for label, artefact in found.items() if label in KINDS}
        except StoreError as error:
            _log.error("%s is served without its artefacts: %s", exact, error)
            return {}

    def _conditions(self, manifest: Manifest) -> list[str]:
        made = sorted(f"{label} {one.signature}" for label, one in self._artefacts(manifest).items())
        return [platform_name(self._device), torch.__version__, str(torch.get_num_threads()), *made]

    def _read(self) -> dict[str, Any]:
        try:
            kept = json.loads((self._home / "runtimes.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return kept if isinstance(kept, dict) else {}

    def _write(self, manifest: Manifest, choice: Choice) -> None:
        """What was chosen while one was forced is no choice to remember."""
        if self._forced is not None:
            return
        kept = self._read()
        kept[_exact(manifest)] = {"conditions": self._conditions(manifest), "choice": asdict(choice)}
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            temporary = self._home / f"runtimes.json.{os.getpid()}"
            temporary.write_text(json.dumps(kept, indent=1))
            os.replace(temporary, self._home / "runtimes.json")
        except OSError as error:
            _log.error("the choice of a runtime cannot be remembered: %s", error)


def _exact(manifest: Manifest) -> str:
    return f"{manifest.model}@{manifest.version}"


def time_again(
    store_root: str | Path, references: Sequence[str], *, home: Path, device: str, threads: int | None
) -> dict[str, Choice]:
    """Choices made anew, by `name@version`; without `references`, of every model that is in production."""
    if threads:
        torch.set_num_threads(threads)  # a choice holds for the service's number of threads
    store = ModelStore(store_root)
    selection = Selection(store, home, device, None)
    wanted = references or [name for name in store.models() if PRODUCTION in store.aliases(name)]
    choices = {}
    for reference in wanted:
        version = store.load(reference)
        eager = version.build(device)
        choices[_exact(version.manifest)], _ = selection.settle(version.manifest, eager, again=True)
    return choices


def warm(forecaster: Forecaster) -> None:
    """Run a default request once; graphs are captured here and nowhere else, for every context and batch size."""
    graphs = getattr(forecaster, "functions", None)
    if not isinstance(graphs, CudaGraphs):
        forecaster.run(forecaster.prepare([probe(forecaster, 0)]))
        return
    graphs.capturing = True
    for context in usual_contexts(forecaster):
        one = probe(forecaster, 0, context=context)
        rows = pad_rows(min(_ROWS_CAPTURED, forecaster.max_rows(one)))
        while rows:
            forecaster.run(forecaster.prepare([one] * rows))
            rows //= 2
    graphs.capturing = False


def _timed(loaded: dict[str, Forecaster]) -> dict[str, tuple[float, float]]:
    """Milliseconds of a batch of 1 and of 8 default requests: the least of rounds that take turns."""
    any_one = next(iter(loaded.values()))
    sizes = (1, min(_ROWS, any_one.max_rows(probe(any_one, 0))))
    best = {label: [float("inf")] * len(sizes) for label in loaded}
    for turn in range(1 + _ROUNDS):
        for label, forecaster in loaded.items():
            for index, rows in enumerate(sizes):
                batch = forecaster.prepare([probe(forecaster, seed) for seed in range(rows)])
                started = time.perf_counter()
                _synchronised(forecaster.run(batch))
                spent = 1e3 * (time.perf_counter() - started)
                if turn > 0:  # the first run warms up
                    best[label][index] = min(best[label][index], round(spent, 3))
    return {label: (times[0], times[1]) for label, times in best.items()}


def _synchronised(raw: Any) -> None:
    """Wait until the device has the results."""
    for tensor in raw.values():
        if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
            return
