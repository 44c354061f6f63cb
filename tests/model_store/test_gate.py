"""Promotion: what loads but forecasts something else, was never compared, or is worse window by window, stays out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model_store.artefacts import put_artefact
from model_store.canary import canary_of, check_canary
from model_store.files import VerificationFailed
from model_store.gate import Judged, PromotionRefused, paired_lead, window_scores
from model_store.manifest import Artefact, Manifest
from model_store.store import ModelStore
from models.families import build_forecaster

HORIZON = 4
FAMILIES = ["toto", "kronos"]


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


def fields(number: int = 0, family: str = "naive", **changes: Any) -> dict[str, Any]:
    return {
        "model": "demo",
        "family": family,
        "origin": {"kind": "trained", "source": "demo.toml"},
        "limits": {"min_context": 2, "max_context": 512, "max_horizon": 64},
        "created_at": f"2026-01-02T03:04:{number:02d}+00:00",
        **changes,
    }


# -- the canary ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_version_that_forecasts_as_it_did_is_promoted(store: ModelStore, tiny: Any, family: str) -> None:
    config, weights = tiny[family]
    canary = canary_of(build_forecaster(family, config, weights))
    assert canary == canary_of(build_forecaster(family, config, weights))
    store.put(fields(family=family, canary=canary), config, weights)
    store.promote("demo")
    assert store.log("demo")[-1]["gate"] == ["it forecasts as it did where it was stored"]


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_load_but_forecast_something_else_are_refused(
    store: ModelStore, tiny: Any, tinies: Any, family: str
) -> None:
    config, weights = tiny[family]
    canary = canary_of(build_forecaster(family, config, weights))
    store.put(fields(family=family, canary=canary), config, tinies(11)[family].weights)
    for force in (None, "I know better"):
        with pytest.raises(PromotionRefused, match="does not forecast as it did: its forecast moved by"):
            store.promote("demo", force=force)
    assert store.aliases("demo") == {}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forecast_that_is_not_finite_is_refused(store: ModelStore, tiny: Any, family: str) -> None:
    config, weights = tiny[family]
    canary = canary_of(build_forecaster(family, config, weights))
    broken = {name: torch.full_like(tensor, torch.nan) for name, tensor in weights.items()}
    store.put(fields(family=family, canary=canary), config, broken)
    with pytest.raises((PromotionRefused, VerificationFailed)):
        store.promote("demo")
    assert store.aliases("demo") == {}


def test_weights_of_another_shape_are_refused_in_one_line(store: ModelStore, tiny: Any) -> None:
    config, weights = tiny["toto"]
    canary = canary_of(build_forecaster("toto", config, weights))
    store.put(fields(family="toto", canary=canary), config, {name: weights[name] for name in list(weights)[1:]})
    with pytest.raises(PromotionRefused, match=f"{next(iter(weights))}"):
        store.promote("demo")


@pytest.mark.parametrize("family", [*FAMILIES, "naive"])
def test_rounding_is_forgiven_and_a_shift_of_the_band_is_not(tiny: Any, family: str) -> None:
    config, weights = tiny[family] if family != "naive" else ({}, {})
    forecaster = build_forecaster(family, config, weights)
    canary = canary_of(forecaster)
    band = float(np.mean(np.subtract(canary.high, canary.low))) or canary.close[0] * 1e-4
    for moved, fits in ((0.05 * band, True), (0.2 * band, False)):
        other = canary.model_copy(update={"close": tuple(close + moved for close in canary.close)})
        if fits:
            check_canary(other, forecaster)
        else:
            with pytest.raises(ValueError, match="moved by"):
                check_canary(other, forecaster)


# -- runtimes -----------------------------------------------------------------------------------


def artefact(version: str, functions: dict[str, float]) -> Artefact:
    return Artefact(
        model="demo",
        version=version,
        runtime="onnx",
        dtype="float32",
        platform="linux-x86_64",
        torch="2.13.0",
        files={},
        parity={"functions": functions, "equal_tokens": None, "budget": {}},
        build_seconds=1.0,
        created_at="2026-01-02T03:04:05+00:00",
    )


def test_a_runtime_that_was_never_compared_keeps_its_version_out(store: ModelStore) -> None:
    version = store.put(fields(), {}, {}).version
    put_artefact(store, artefact(version, {}), {"step.onnx": b"1"}, b"key")
    with pytest.raises(VerificationFailed, match=r"onnx-float32-linux-x86_64-2\.13\.0 was never compared"):
        store.promote("demo")
    put_artefact(store, artefact(version, {"step": 1e-6}), {"step.onnx": b"1"}, b"key")
    store.promote("demo")


def test_a_broken_runtime_keeps_its_version_out(store: ModelStore) -> None:
    version = store.put(fields(), {}, {}).version
    put_artefact(store, artefact(version, {"step": 1e-6}), {"step.onnx": b"1"}, b"key")
    (path,) = (store.root / "demo" / version / "runtimes").glob("*/step.onnx")
    path.write_bytes(b"2")
    with pytest.raises(VerificationFailed, match=r"step\.onnx is not what was stored"):
        store.promote("demo")


# -- window by window ---------------------------------------------------------------------------


def judged(
    errors: np.ndarray,
    number: int = 0,
    symbols: tuple[str, ...] = ("AAPL", "IBM"),
    interval: tuple[float, float] = (-1, 1),
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A manifest's fields and its windows: `errors` [N] of as many origins of each symbol, in turns."""
    count = len(errors)
    rng = np.random.default_rng(7)
    naive = np.repeat(rng.uniform(0.01, 0.03, 100 * 2)[:count, None], HORIZON, axis=1)
    places = np.arange(count)
    kept = window_scores(
        "test",
        times=1_700_000_000_000 + 3_600_000 * (places // len(symbols)),
        symbols=places % len(symbols),
        positions=places // len(symbols),
        errors=naive * errors[:, None],
        naive_errors=naive,
    )
    skill = 1 - float((naive[:, 0] * errors).sum() / naive[:, 0].sum())
    evaluation = {
        "windows": "test",
        "symbols": symbols,
        "start": "2010-01-01",
        "end": "2012-01-01",
        "interval": "1h",
        "horizon": HORIZON,
        "origins": count,
        "metrics": {"skill_vs_naive": {"value": skill, "low": skill + interval[0], "high": skill + interval[1]}},
    }
    return fields(number, evaluations=[evaluation]), kept


def put(store: ModelStore, errors: np.ndarray, number: int = 0, **options: Any) -> Manifest:
    given, kept = judged(errors, number, **options)
    return store.put(given, {}, {}, scores=kept)


def noisy(level: float, seed: int, count: int = 200) -> np.ndarray:
    return level + np.random.default_rng(seed).normal(0, 0.005, count)


def test_a_version_that_is_worse_on_the_same_windows_is_refused_though_its_own_interval_is_wide(
    store: ModelStore,
) -> None:
    """The intervals of both, ±1, say nothing; what they share on each window cancels in the difference."""
    store.promote(f"demo@{put(store, noisy(1.00, 1)).version}")
    worse = put(store, noisy(1.01, 2), 1)
    with pytest.raises(PromotionRefused, match=r"skill_vs_naive on the test windows is -0\.01\d+ \[.*--force REASON"):
        store.promote(f"demo@{worse.version}")
    store.promote(f"demo@{worse.version}", force="the recall")


def test_a_difference_within_the_noise_or_an_improvement_passes(store: ModelStore) -> None:
    """Though by its own interval, without width, the second is worse than the first."""
    store.promote(f"demo@{put(store, noisy(1.0, 1)).version}")
    for number, level in ((1, 1.0003), (2, 0.9)):
        store.promote(f"demo@{put(store, noisy(level, 5), number, interval=(0, 0)).version}")
        assert "beside the current version's" in store.log("demo")[-1]["gate"][-1]


def test_the_interval_of_the_lead_is_that_of_blocks_and_holds_the_lead() -> None:
    new, current = (
        Judged(Manifest.model_validate(given | {"files": {}}), kept)
        for given, kept in (judged(noisy(0.98, 3)), judged(noisy(1.0, 4)))
    )
    lead, low, high = paired_lead(new, current, current.manifest.evaluations[0]) or (0, 0, 0)
    assert low < lead < high
    assert lead == pytest.approx(0.02, abs=0.002)
    assert high - low < 0.005


@pytest.mark.parametrize("name", ["time", "naive", "symbol"])
def test_windows_that_are_not_the_same_are_not_compared_one_by_one(name: str) -> None:
    given, kept = judged(noisy(1.0, 1))
    new, current = (Judged(Manifest.model_validate(given | {"files": {}}), each) for each in (kept, dict(kept)))
    old = current.manifest.evaluations[0]
    assert paired_lead(new, current, old) is not None
    values = kept[f"test.{name}"].clone()
    values[5] = 1 - values[5] if name == "symbol" else values[5] + 1
    assert paired_lead(replace(new, windows=kept | {f"test.{name}": values}), current, old) is None
    assert paired_lead(replace(new, windows={}), current, old) is None


def test_a_symbols_version_is_compared_on_its_own_windows_alone(store: ModelStore) -> None:
    """It is better on AAPL and much worse on IBM, which it will not serve."""
    store.promote(f"demo@{put(store, noisy(1.0, 1)).version}")
    mixed = noisy(0.9, 2)
    mixed[1::2] = 1.5
    version = put(store, mixed, 1).version
    with pytest.raises(PromotionRefused):
        store.promote(f"demo@{version}")
    with pytest.raises(PromotionRefused):
        store.promote(f"demo@{version}", symbol="IBM")
    store.promote(f"demo@{version}", symbol="AAPL")
    store.promote(f"demo@{version}", symbol="MSFT")  # of which neither knows anything
    assert {alias for alias, target in store.aliases("demo").items() if target == version} == {"AAPL", "MSFT"}
