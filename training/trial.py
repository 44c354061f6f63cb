"""One trial of a search: settings in, losses of windows out. Function and arguments go to any process as they are."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import torch

from model_store.store import ModelStore
from models.candles import Floats
from models.families import build_forecaster
from models.forecaster import Forecaster
from training.loop import Diverged
from training.recipe import Recipe
from training.resume import run_folder
from training.scores import Scores
from training.search import Task, Tried
from training.train import Prepared, Weights, based, candles, evaluate_as_served, fit_phases
from training.windows import Origins

PIECES: Final = 4  # of the search windows, or of a training: after each a trial may end
SCORE: Final = "CRPS + absolute error of the point, of the close in log-returns"


class _Pruned(Exception):
    """The trial is no better than the median."""


@dataclass(frozen=True)
class Job:
    """What all trials of a search share; the paths must be those of the machine where they run."""

    recipe: Recipe  # with the current settings
    windows: Mapping[str, Origins]  # search and decision
    store_root: str
    cache: Path  # of parsed candles
    runs: Path  # where trainings stand
    version: str | None = None  # name@version that is tried with other settings; by default every trial trains
    device: str = "cpu"


def run_trial(job: Job, task: Task) -> Tried:
    """Score a task's settings; ModelError where the model cannot take them."""
    prepared = prepared_for(job, job.recipe.with_settings(task.settings))
    if prepared.recipe.threads is not None:
        torch.set_num_threads(prepared.recipe.threads)
    if job.version is None:
        return _train_and_score(job, task, prepared)
    forecaster = _loaded(job.store_root, job.version, job.device)
    if task.windows == "decision":
        return _scored({}, forecaster, prepared, job.windows["decision"])
    return _score_in_pieces(task.bars, forecaster, prepared, job.windows["search"])


def run_trial_in(folder: str, job: Job, task: Task) -> Tried:
    """The same in a worker, which started elsewhere: the job's relative paths are of `folder`."""
    os.chdir(folder)
    return run_trial(job, task)


def prepared_for(job: Job, recipe: Recipe) -> Prepared:
    """The job's candles with a recipe; a training that selects among weights does so on the search's windows."""
    base = None
    if job.version is None:
        recipe, base = based(recipe, ModelStore(job.store_root), job.device)
    series, split = candles(recipe, job.cache)
    choosing = job.windows["search"] if recipe.select else None
    return Prepared(recipe, series, split, {}, choosing, base, device=job.device)


@lru_cache(maxsize=1)
def _loaded(store_root: str, version: str, device: str) -> Forecaster:
    return ModelStore(store_root).load(version).build(device)


def _losses(scores: Scores) -> Floats:
    """`[N]` mean over the steps of SCORE: of both that a forecast says, the distribution and the point."""
    return np.asarray((scores.crps + np.abs(scores.errors)).mean(axis=1))


def _evaluate(forecaster: Forecaster, prepared: Prepared, origins: Origins) -> Scores:
    return evaluate_as_served(forecaster, prepared, origins, prepared.recipe.evaluate.samples)


def _scored(earlier: Mapping[int, float], forecaster: Forecaster, prepared: Prepared, origins: Origins) -> Tried:
    scores = _evaluate(forecaster, prepared, origins)
    losses = _losses(scores)
    return Tried({**earlier, PIECES: float(losses.mean())}, losses=losses, positions=scores.outcomes.positions)


def _pieces(origins: Origins) -> list[Origins]:
    """Windows of all times and symbols in each."""
    found = [replace(origins, pairs=origins.pairs[k::PIECES]) for k in range(PIECES)]
    return [piece for piece in found if len(piece)]


def _score_in_pieces(bars: Sequence[float], forecaster: Forecaster, prepared: Prepared, origins: Origins) -> Tried:
    losses, scores = [], {}
    for piece, some in enumerate(_pieces(origins), 1):
        losses.append(_losses(_evaluate(forecaster, prepared, some)))
        scores[piece] = float(np.concatenate(losses).mean())
        if piece <= len(bars) and scores[piece] > bars[piece - 1]:
            return Tried(scores, pruned=True)
    return Tried(scores)


def _train_and_score(job: Job, task: Task, prepared: Prepared) -> Tried:
    """Train, judged by a piece of the search windows after each piece of the last phase; a killed one goes on."""
    recipe, scores = prepared.recipe, dict[int, float]()
    some = _pieces(job.windows["search"])[0]

    def watch(done: float, published: Callable[[], Weights]) -> None:
        piece = int(done * PIECES)
        if task.windows == "decision" or piece in (0, PIECES, *scores):
            return
        forecaster = build_forecaster(recipe.family, recipe.network, published(), job.device)
        scores[piece] = float(_losses(_evaluate(forecaster, prepared, some)).mean())
        if piece <= len(task.bars) and scores[piece] > task.bars[piece - 1]:
            raise _Pruned

    with run_folder(job.runs, recipe, "") as folder:
        try:
            weights = fit_phases(prepared, lambda *_: None, folder, watch).weights
        except (_Pruned, Diverged):
            if not task.settings:  # the current ones must have a score
                raise
            folder.clear()
            return Tried(scores, pruned=True)
        forecaster = build_forecaster(recipe.family, recipe.network, weights, job.device)
        tried = _scored(scores, forecaster, prepared, job.windows[task.windows])
        if task.windows == "search":
            folder.clear()
    return tried
