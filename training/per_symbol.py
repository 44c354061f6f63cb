"""One base, a version for each symbol: each trained on its symbol alone, judged beside the base, published."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from model_store.files import VerificationFailed
from model_store.manifest import Evaluation, Manifest
from model_store.store import ModelStore
from training import processes
from training.candle_files import Series, digest
from training.recipe import Recipe
from training.resume import RunFolder, run_folder
from training.train import Base, Track, based, candles, fit_phases, judge_and_publish, prepare_one, refuse_leak
from training.windows import Split


@dataclass(frozen=True)
class Outcome:
    """What became of one symbol: its version, or why it has none."""

    symbol: str
    manifest: Manifest | None = None
    status: str = "trained"

    @property
    def reference(self) -> str:
        """The version's name@version."""
        return f"{self.manifest.model}@{self.manifest.version}" if self.manifest else ""

    def as_json(self) -> dict[str, Any]:
        """For a machine."""
        found = self.manifest and self.manifest.model_dump(mode="json")
        return {"symbol": self.symbol, "status": self.status, "manifest": found}


def train_per_symbol(
    recipe: Recipe,
    store: ModelStore,
    track: Track,
    home: Path,
    *,
    restart: bool = False,
    tensorboard: Path | None = None,
    device: str = "cpu",
) -> list[Outcome]:
    """Fit, evaluate and publish a version of the base for each symbol of the recipe that is not held out.

    One after the other, so that memory holds the base and one network in training. A symbol that fails stops no
    other. What an earlier call with the same recipe, base and candles has published stays, and what it began goes
    on, unless it is to `restart`. ValueError without a base, or without candles that it may be trained on.
    """
    if processes.started() > 1:
        raise ValueError("per_symbol trains in one process: start it without torchrun")
    recipe, base = based(recipe, store, device)
    if base is None:
        raise ValueError("per_symbol needs a base: give tune")
    series, split = candles(recipe, home / "cache")
    refuse_leak(base.version.manifest, split)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    chosen = [item for item in series if item.symbol not in split.unseen]
    if not chosen:
        raise ValueError("every symbol is held out: there is none to train")
    published = {} if restart else {manifest.symbol: manifest for manifest in _published(recipe, store, base)}
    folder_of = partial(run_folder, home / "runs", tensorboard=tensorboard)
    outcomes = []
    for done, item in enumerate(chosen):
        there = published.get(item.symbol)
        if there and there.training and there.training.data_digest == digest([item]):
            outcomes.append(Outcome(item.symbol, there, "kept"))
            continue
        report = partial(_report, track, recipe.name, done / len(chosen), f"{item.symbol}, {done + 1} of {len(chosen)}")
        try:
            outcomes.append(
                Outcome(item.symbol, _train_one(recipe, item, split, base, store, report, folder_of, restart))
            )
        except (ValueError, RuntimeError) as error:
            outcomes.append(Outcome(item.symbol, status=f"failed: {error}"))
    track(recipe.name, 1.0, f"{len(chosen)} symbols")
    return outcomes


def _published(recipe: Recipe, store: ModelStore, base: Base) -> Iterator[Manifest]:
    """Versions of the base's name that this very recipe made, oldest first."""
    model, record = base.version.manifest.model, recipe.model_dump(mode="json")
    for version in store.versions(model):
        with contextlib.suppress(VerificationFailed):
            manifest = store.manifest(f"{model}@{version}")
            if manifest.symbol and manifest.training and manifest.training.recipe == record:
                yield manifest


def _train_one(
    recipe: Recipe,
    item: Series,
    split: Split,
    base: Base,
    store: ModelStore,
    track: Track,
    folder_of: Callable[[Recipe, str], AbstractContextManager[RunFolder]],
    restart: bool,
) -> Manifest:
    prepared = prepare_one(recipe, item, split, base)
    with folder_of(recipe, prepared.data_digest) as folder:
        if restart:
            folder.clear()
        manifest = judge_and_publish(prepared, fit_phases(prepared, track, folder), store, track)
        folder.clear()
    return manifest


def _report(track: Track, name: str, done: float, which: str, title: str, _: float, line: str) -> None:
    """One bar for all symbols."""
    track(name, done, f"{which}: {title.removeprefix(name).strip()} {line}")


def outcomes_table(outcomes: Sequence[Outcome]) -> Table:
    """What each symbol's version scores on its own test windows, and what the base does on the very same.

    It fits 100 columns.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("symbol", max_width=14, overflow="fold")
    table.add_column("version", no_wrap=True)
    for heading in ("CRPS", "base's", "CRPS / base's\n95 % interval", "skill\nvs naive", "base's"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("MAE beside\nthe base's", max_width=20)
    table.add_column("status", overflow="fold")
    for outcome in outcomes:
        test = outcome.manifest and outcome.manifest.evaluation("test")
        version = outcome.manifest.version if outcome.manifest else ""
        table.add_row(outcome.symbol, version, *(_cells(test) if test else [""] * 6), outcome.status)
    return table


def _cells(test: Evaluation) -> list[str]:
    crps, ratio, skill = (test.metrics[name] for name in ("crps", "crps_ratio_base", "skill_vs_naive"))
    interval = "" if ratio.low is None else f"\n{ratio.low:.3f}…{ratio.high:.3f}"
    return [
        f"{crps.value:.5f}",
        f"{crps.base:.5f}",
        f"{ratio.value:.3f}{interval}",
        f"{skill.value:+.3f}",
        f"{skill.base:+.3f}",
        test.versus_base.sentence if test.versus_base else "too few windows to tell",
    ]
