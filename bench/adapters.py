"""Adapters of one network beside merged versions: memory of each, and time of a batch that mixes sixteen.

Memory is measured in a process of its own: python -m bench.adapters toto
"""

import argparse
import ctypes
import gc
import json
from collections.abc import Iterator, Mapping
from tempfile import TemporaryDirectory
from typing import Any, Final

from bench.processes import output_of, resident_bytes
from bench.published import KRONOS, TOTO_BASE, random_adapter, random_weights, request, toto_config
from bench.rows import Row
from bench.service import put_version
from bench.timing import Work
from bench.workbench import Workbench
from model_store.store import ModelStore
from models.adapters import Adaptable, matrices_of
from models.families import build_forecaster
from models.forecaster import Forecaster, ForecastInput, forecast
from training.tuning import Family

_SYMBOLS: Final = 16
_RANK, _SCALE = 8, 2.0  # as training has them by default; of all modules that may have one
_NAMES: Final[Mapping[Family, str]] = {"toto": "Toto-base", "kronos": "Kronos-small"}
_CONFIGS: Final[Mapping[Family, dict[str, Any]]] = {"toto": toto_config(TOTO_BASE), "kronos": KRONOS["small"]}
_ASKED: Final[Mapping[Family, dict[str, int]]] = {
    "toto": {"length": 512, "horizon": 64},
    "kronos": {"length": 64, "horizon": 30, "samples": 1},
}


def adapters(bench: Workbench, family: Family) -> Iterator[Row]:
    """Of random weights, everything eager and in float32."""
    name = _NAMES[family]
    grown = json.loads(output_of("bench.adapters", family, doing="measuring the memory of adapters"))
    yield Row(
        f"memory of an adapter of {name}",
        "a version of merged weights",
        grown["adapter_mb"] / grown["merged_mb"],
        0.05,
        "lower",
        "×",
        grown,
    )
    base, beside = _loaded(family, _CONFIGS[family], bench.device)
    items = [request(seed=seed, **_ASKED[family]) for seed in range(_SYMBOLS)]
    sides: dict[str, Work] = {
        "adapters": lambda: _together(beside, items),
        "base": lambda: forecast(base, items),
        "merged": lambda: [forecast(base, [item]) for item in items],  # what each of as many would take
    }
    found = bench.race(sides, 30, at_least=1 if bench.quick else 2)
    detail = {"rounds": found.rounds, "milliseconds": {side: 1e3 * found.median(side) for side in sides}}
    work = f"{name}, a batch of {_SYMBOLS} symbols with an adapter each"
    mixed, apart = found.ratio("adapters", "base"), found.ratio("merged", "adapters")
    interval = {"interval": [mixed.low, mixed.high]}
    yield Row(f"{work}, time", "the same batch of the base", mixed.value, 1.25, "lower", "×", detail | interval)
    against, interval = f"{_SYMBOLS} merged versions in turn", {"interval": [apart.low, apart.high]}
    yield Row(f"{work}, forecasts/s", against, apart.value, 1.0, "higher", "×", detail | interval)


def _loaded(family: Family, config: dict[str, Any], device: str) -> tuple[Forecaster, list[Forecaster]]:
    """A base, and an adapter of it for each symbol."""
    weights = random_weights(family, config)
    base = build_forecaster(family, config, weights, device)
    assert isinstance(base, Adaptable)
    made = (random_adapter(family, weights, _RANK, seed) for seed in range(_SYMBOLS))
    return base, [base.adapted(matrices_of(adapter, _SCALE)) for adapter in made]


def _together(beside: list[Forecaster], items: list[ForecastInput]) -> None:
    """One batch, in which each request was encoded by a version of its own, as the engine does it."""
    rows = [each.encode(item) for each, item in zip(beside, items, strict=True)]
    batch = beside[0].prepare(items, rows)
    beside[0].finish(beside[0].run(batch), batch)


def _memory(family: Family) -> dict[str, float]:
    """Megabytes by which the process grows per adapter, and by a version loaded from the store, all of them kept."""
    config = _CONFIGS[family]
    with TemporaryDirectory() as folder:
        store = ModelStore(folder)
        exact = put_version(store, family, family, config, random_weights(family, config))
        version = store.load(exact)
        base, weights = version.build(), version.weights
        assert isinstance(base, Adaptable)
        sizes = [_resident()]
        kept: list[Any] = [base]
        for seed in range(_SYMBOLS):
            kept.append(base.adapted(matrices_of(random_adapter(family, weights, _RANK, seed), _SCALE)))
        sizes.append(_resident())
        kept.append(store.load(exact).build())
        sizes.append(_resident())
    tensors = [part for low in kept[1]._adapter.values() for part in low]
    own = {part.untyped_storage().data_ptr(): part.nbytes for part in tensors}
    return {
        "adapter_mb": (sizes[1] - sizes[0]) / _SYMBOLS / 1e6,
        "adapter_tensors_mb": sum(own.values()) / 1e6,
        "merged_mb": (sizes[2] - sizes[1]) / 1e6,
    }


def _resident() -> int:
    """Bytes of the process once what it has freed is given back: else the next would be put there unseen."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes("self")


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.adapters")
    parser.add_argument("family", choices=list(_NAMES))
    print(json.dumps(_memory(parser.parse_args().family)))  # noqa: T201


if __name__ == "__main__":
    _main()
