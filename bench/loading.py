"""What it takes to load a version: time over that of reading its file, memory over its weights.

Each is measured in a process of its own, its imports done: python -m bench.loading time STORE NAME@VERSION --seconds 20
"""

import argparse
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import models.families  # noqa: F401 - no part of a load
from bench.processes import output_of, resident_bytes
from bench.published import random_weights
from bench.rows import Row
from bench.service import put_version
from bench.timing import Work, race, wall_time
from bench.workbench import Workbench
from model_store.manifest import WEIGHTS
from model_store.store import ModelStore

_TIME, _MEMORY = "time", "memory"
_SECONDS: Final = 20


def load(bench: Workbench, name: str, family: str, config: Mapping[str, Any]) -> Iterator[Row]:
    """Random weights, whose file is in the page cache, as just after it was fetched, or is not, as after a reboot."""
    store = ModelStore(bench.folder / "loading")
    exact = put_version(store, name, family, config, random_weights(family, dict(config)))
    taken = _measured(bench, store, exact, _TIME)
    for found, where in zip(taken["ratios"], ("memory", "the disk"), strict=True):
        detail = {"interval": found[1:], "rounds": taken["rounds"], "milliseconds": taken["milliseconds"]}
        yield Row(f"loading {name} from {where}", "reading its file from there", found[0], 1.5, "lower", "×", detail)
    needed = _measured(bench, store, exact, _MEMORY)
    yield Row(f"memory to load {name}, at its peak", "its weights", needed["ratio"], 1.3, "lower", "×", needed)


def _measured(bench: Workbench, store: ModelStore, exact: str, what: str) -> dict[str, Any]:
    arguments = [what, str(store.root), exact, "--seconds", str(bench.seconds(_SECONDS)), "--device", bench.device]
    found: dict[str, Any] = json.loads(output_of("bench.loading", *arguments, doing=f"loading {exact}"))
    return found


def _time(store: ModelStore, exact: str, weights: Path, seconds: float, device: str) -> dict[str, Any]:
    warm: dict[str, Work] = {
        "load": partial(_load, store, exact, device),
        "read": lambda: _drop(weights.read_bytes()),
    }
    cold = {f"{side} from the disk": partial(_uncached, weights, work) for side, work in warm.items()}
    hashed = {"read, then hash": lambda: hashlib.sha256(weights.read_bytes())}
    found = race({**warm, **cold, **hashed}, seconds=seconds, stopwatch=wall_time)
    ratios = [found.ratio(*sides) for sides in (warm, cold)]
    return {
        "ratios": [[ratio.value, ratio.low, ratio.high] for ratio in ratios],
        "rounds": found.rounds,
        "milliseconds": {side: 1e3 * found.median(side) for side in found.seconds},
    }


def _uncached(weights: Path, work: Work) -> None:
    """Have the kernel forget the file first."""
    with weights.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    work()


def _memory(store: ModelStore, exact: str, weights: Path, _: float, device: str) -> dict[str, Any]:
    """What the process holds more of at its peak than before."""
    before = resident_bytes("self")
    loaded = _load(store, exact, device)
    size, peak, after = weights.stat().st_size, resident_bytes("self", "VmHWM"), resident_bytes("self")
    del loaded
    megabytes = {"weights": size / 1e6, "before": before / 1e6, "peak": peak / 1e6, "after": after / 1e6}
    return {"ratio": (peak - before) / size, "megabytes": megabytes}


def _load(store: ModelStore, exact: str, device: str) -> Any:
    return store.load(exact).build(device)


def _drop(_: bytes) -> None:
    """The time of reading has that of giving the memory back in it, as the time of loading has."""


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.loading")
    parser.add_argument("what", choices=[_TIME, _MEMORY])
    parser.add_argument("store", type=Path)
    parser.add_argument("exact", metavar="NAME@VERSION")
    parser.add_argument("--seconds", type=float, default=_SECONDS)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    weights = given.store / given.exact.replace("@", "/") / WEIGHTS
    measure = {_TIME: _time, _MEMORY: _memory}[given.what]
    print(json.dumps(measure(ModelStore(given.store), given.exact, weights, given.seconds, given.device)))  # noqa: T201


if __name__ == "__main__":
    _main()
