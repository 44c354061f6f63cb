"""Several recipes trained side by side, whose progress is told in one place."""

import multiprocessing
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from model_store.manifest import Manifest
from model_store.store import ModelStore
from training import processes
from training.recipe import Recipe
from training.train import Track, train


def train_all(
    recipes: Sequence[Recipe],
    store_root: str | Path,
    home: Path,
    track: Track,
    *,
    restart: bool = False,
    tensorboard: Path | None = None,
    device: str = "cpu",
) -> list[Manifest]:
    """Train every recipe, each in a process of its own where there are several; the first failure is raised.

    Parsed candles and the state of unfinished runs stay in `home`; runs go on from it unless they are to `restart`.
    """
    if len(recipes) > 1 and processes.started() > 1:
        raise ValueError("under torchrun, train one recipe at a time")
    how = partial(train, home=home, restart=restart, tensorboard=tensorboard, device=device)
    if len(recipes) == 1:
        return [how(recipes[0], ModelStore(store_root), track)]
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with context.Manager() as manager, ProcessPoolExecutor(len(recipes), mp_context=context) as pool:
        updates: Any = manager.Queue()
        futures = [pool.submit(_train_apart, how, recipe, store_root, updates) for recipe in recipes]
        _relay(updates, futures, track)
        return [future.result() for future in futures]


def _train_apart(how: Callable[..., Manifest], recipe: Recipe, store_root: str | Path, updates: Any) -> Manifest:
    return how(recipe, ModelStore(store_root), partial(_send, updates.put))


def _send(put: Callable[[tuple[str, float, str]], None], title: str, done: float, note: str) -> None:
    put((title, done, note))


def _relay(updates: Any, futures: Sequence[Future[Manifest]], track: Track) -> None:
    """Tell what the processes report until all of them are done."""
    while True:
        finished = all(future.done() for future in futures)
        try:
            track(*updates.get(timeout=0.2))
        except queue.Empty:
            if finished:
                return
