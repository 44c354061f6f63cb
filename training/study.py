"""A search that can be gone on with, over some windows of the val part; the later ones are for its winner alone."""

import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np
import optuna
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from model_store.manifest import Manifest, SelectedOn, canonical_json
from model_store.store import CANDIDATE, ModelStore
from training.cluster import Call, Cluster
from training.outcomes import Outcomes, outcomes
from training.recipe import Knob, Recipe
from training.resume import RunFolder, run_folder
from training.search import Decision, Found, Runner, Settings, Task, Tried, check_decidable, find_better, in_words
from training.search_page import search_page
from training.train import Prepared, Track
from training.trial import SCORE, Job, run_trial, run_trial_in
from training.windows import Origins, day, rolling_origins

_SEARCHED: Final = 0.4  # share of the val part's time; what comes later decides
_PUBLISHED: Final = "published"  # attribute of the study: the version that came of it

Publish = Callable[[Job, SelectedOn], Manifest]


@dataclass(frozen=True)
class Plan:
    """How to search."""

    trials: int = 24
    stride: int = 4  # candles between origins
    horizon: int | None = None  # steps that trials forecast; default: the recipe's
    workers: int = 1
    seed: int = 0
    device: str = "cpu"
    cluster: Cluster | None = None  # which runs the trials, instead of processes here


@dataclass(frozen=True)
class Tuned:
    """What came of a search."""

    name: str
    found: Found
    manifest: Manifest | None  # of the version that has the winner's settings
    report: Path
    seconds: float

    @property
    def sentence(self) -> str:
        """What was kept or refused, and what decided it."""
        best, decision, tried = self.found.best, self.found.decision, f"{len(self.found.trials)} trials"
        if best is None or decision is None:
            return f"{self.name}: nothing is kept: none of {tried} was better than the current settings"
        kept = "kept, the best" if decision.kept else "nothing is kept: the best"
        return f"{self.name}: {kept} of {tried} is {in_words(best.params)}: {decision}"

    @property
    def promotable(self) -> str:
        """What `store promote` needs to serve the version."""
        if self.manifest is None:
            return ""
        symbol = f" --symbol {self.manifest.symbol}" if self.manifest.symbol else ""
        return f"{self.manifest.model}@{self.manifest.version}{symbol}"

    def as_json(self) -> dict[str, Any]:
        """For a machine."""
        found = self.found
        return {
            "name": self.name,
            "version": self.manifest and f"{self.manifest.model}@{self.manifest.version}",
            "kept": self.manifest is not None,
            "trials": len(found.trials),
            "best": found.best and found.best.params,
            "decision": found.decision and asdict(found.decision),
            "report": str(self.report),
            "seconds": round(self.seconds, 1),
        }


@dataclass(frozen=True)
class Study:
    """Settings to be searched, and what they are searched with and on."""

    name: str
    recipe: Recipe  # with the current settings
    space: Mapping[str, Knob]
    prepared: Prepared
    plan: Plan
    store: ModelStore
    home: Path
    version: str | None = None  # name@version that is tried with other settings; by default every trial trains
    symbol: str | None = None  # the only one whose windows count
    tests: int = 1  # how many winners of the same command are tested
    first: Sequence[Settings] = ()  # trials to begin with

    def run(self, publish: Publish, track: Track) -> Tuned:
        """Search, decide, and where the winner is better publish it as the name's candidate, or its symbol's version.

        The same study goes on where it was. ValueError, before anything is run, where its windows decide nothing.
        """
        started = time.monotonic()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        windows, facts = self.windows()
        horizon = facts["decision"].horizon
        with run_folder(self.home / "tune", self.recipe, self._digest()) as folder:
            job = Job(
                recipe=self.recipe,
                windows=windows,
                store_root=self.store.where,
                cache=self.home / "cache",
                runs=folder.path / "runs",
                version=self.version,
                device=self.plan.device,
            )
            study = _opened(folder)
            with runner(job, self.plan.workers, self.plan.cluster) as run:
                found = find_better(
                    study,
                    self.space,
                    run,
                    self.plan.trials,
                    horizon=horizon,
                    confidence=1 - 0.05 / self.tests,
                    seed=self.plan.seed,
                    first=self.first,
                    progress=lambda done, line: track(f"tune {self.name}", done / self.plan.trials, line),
                )
            manifest = self._published(study, found, partial(publish, job), facts)
            shutil.rmtree(job.runs, ignore_errors=True)
            report = folder.path / "report.html"
            tuned = Tuned(self.name, found, manifest, report, time.monotonic() - started)
            report.write_text(search_page(tuned.sentence, found, self.space, facts), encoding="utf-8")
        return tuned

    def windows(self) -> tuple[dict[str, Origins], dict[str, Outcomes]]:
        """Those of the search and of the decision, and what came of them; ValueError where they decide nothing."""
        windows = {"search": self._origins(late=False), "decision": self._origins(late=True)}
        facts = {name: outcomes(self.prepared.series, origins) for name, origins in windows.items()}
        check_decidable(facts["decision"].positions, facts["decision"].horizon)
        return windows, facts

    def _published(
        self,
        study: optuna.Study,
        found: Found,
        publish: Callable[[SelectedOn], Manifest],
        facts: Mapping[str, Outcomes],
    ) -> Manifest | None:
        if found.winner is None or found.decision is None:
            return None
        if _PUBLISHED in study.user_attrs:
            return self.store.manifest(study.user_attrs[_PUBLISHED])
        manifest = publish(self._selected_on(found, found.decision, facts))
        if not self.symbol:
            self.store.set_alias(manifest.model, CANDIDATE, manifest.version)
        study.set_user_attr(_PUBLISHED, f"{manifest.model}@{manifest.version}")
        return manifest

    def _selected_on(self, found: Found, decision: Decision, facts: Mapping[str, Outcomes]) -> SelectedOn:
        search, late = facts["search"], facts["decision"]
        return SelectedOn(
            settings=dict(found.winner or {}),
            before=self.version or f"{self.recipe.name}.toml",
            symbols=tuple(sorted({*search.symbols.tolist(), *late.symbols.tolist()})),
            interval=late.interval,
            horizon=late.horizon,
            trials=len(found.trials),
            score=SCORE,
            search_start=day(int(search.target_times.min())),
            search_end=day(int(search.target_times.max())),
            search_windows=len(search.symbols),
            decision_start=day(int(late.target_times.min())),
            decision_end=day(int(late.target_times.max())),
            decision_windows=len(late.symbols),
            gain=decision.gain,
            low=decision.low,
            high=decision.high,
            confidence=decision.confidence,
            p_value=decision.p_value,
        )

    def _origins(self, *, late: bool) -> Origins:
        """Of the val part, before or after one instant; a horizon lies between the targets of the two."""
        series, split, recipe = self.prepared.series, self.prepared.split, self.recipe
        steps = self.plan.horizon or recipe.horizon
        chosen = [item for item in series if self.symbol in (None, item.symbol)]
        times = np.unique(np.concatenate([item.timestamps[split.targets(item, "val")] for item in chosen]))
        if not len(times):
            raise ValueError(f"the val part has no candles{f' of {self.symbol}' if self.symbol else ''}")
        cut = int(times[int(_SEARCHED * len(times))])
        own = replace(split, val_from=cut) if late else replace(split, test_from=cut, horizon=steps)
        found = rolling_origins(series, own, "val", stride=self.plan.stride, min_context=recipe.context, horizon=steps)
        pairs = found.pairs if self.symbol is None else [p for p in found.pairs if series[p[0]].symbol == self.symbol]
        return replace(found, pairs=tuple(pairs))

    def _digest(self) -> str:
        """Of all but the recipe that makes a study another one."""
        space = {name: knob.model_dump() for name, knob in self.space.items()}
        plan: list[Any] = [self.plan.stride, self.plan.horizon, self.plan.seed, self.symbol, self.version, self.tests]
        plan += [dict(settings) for settings in self.first]
        return sha256(canonical_json([self.prepared.data_digest, space, plan])).hexdigest()


def _opened(folder: RunFolder) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(folder.path / "journal.log")))
    return optuna.create_study(storage=storage, study_name="search", load_if_exists=True)


@contextmanager
def runner(job: Job, workers: int, cluster: Cluster | None = None) -> Iterator[Runner]:
    """What runs trials: here, in processes that share this machine's cores, or in a cluster that sees its folders."""
    if cluster:
        yield partial(_spread, cluster, cluster.put(job))
        return
    if workers == 1:
        yield partial(map, partial(run_trial, job))
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    context = get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (threads,)) as pool:
        yield partial(pool.map, partial(run_trial, job))


def _spread(cluster: Cluster, job: Any, tasks: Sequence[Task]) -> list[Tried]:
    folder = str(Path.cwd())
    return cluster.each(
        [
            Call(
                f"{task.windows} {in_words(task.settings) or 'with the current settings'}",
                run_trial_in,
                (folder, job, task),
            )
            for task in tasks
        ]
    )
