"""Export: stored with its numbers if it agrees with float32, otherwise no trace is left and the number is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model_store.artefacts import find_artefacts, machine_key
from model_store.manifest import RUNTIMES, Artefact
from model_store.store import LoadedVersion, ModelStore
from models.runtimes.functions import functions_of
from models.runtimes.kinds import KINDS, platform_name
from models.runtimes.onnx import RuntimeUnavailable
from training import export as exporting
from training.candle_files import Series
from training.export import ExportRefused, calibration, export

WINDOWS = 12


@pytest.fixture
def store(tmp_path: Path, put_tiny: Any) -> ModelStore:
    store = ModelStore(tmp_path / "store")
    for family in ("toto", "kronos"):
        put_tiny(store, family)
    return store


Export = Callable[..., Artefact]


@pytest.fixture
def exported(store: ModelStore, samples: list[Series], tmp_path: Path) -> Export:
    def run(reference: str, label: str = "eager-bfloat16") -> Artefact:
        key = machine_key(tmp_path / "home")
        return export(store, reference, KINDS[label], samples[:3], key=key, device="cpu", windows=WINDOWS)

    return run


def traces(store: ModelStore) -> list[Path]:
    return [path for path in store.root.rglob("*") if RUNTIMES in path.relative_to(store.root).parts and path.is_file()]


def found(store: ModelStore, reference: str) -> dict[str, Artefact]:
    place = platform_name(torch.device("cpu"))
    return find_artefacts(store, reference, platform=place, torch_version=torch.__version__)


@pytest.mark.parametrize("model", ["toto-demo", "kronos-demo"])
def test_bfloat16_is_stored_with_numbers_within_their_budget(store: ModelStore, exported: Export, model: str) -> None:
    artefact = exported(model)
    assert found(store, model) == {"eager-bfloat16": artefact}
    parity = artefact.parity
    assert parity.windows >= WINDOWS // 2
    assert parity.mae_log_return is not None
    assert parity.mae_log_return_float32
    change = abs(parity.mae_log_return / parity.mae_log_return_float32 - 1)
    assert change <= parity.budget["mae_change"] == 0.01
    assert set(parity.quantile_shift) == {"0.1", "0.5", "0.9"}
    assert 0 < max(parity.quantile_shift.values()) <= parity.budget["quantile_shift"] == 0.05
    assert max(parity.functions.values()) > 0
    assert store.verify(model)


def test_exporting_twice_returns_the_first(exported: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    first = exported("toto-demo")
    monkeypatch.setattr(LoadedVersion, "build", None)  # nothing is built again
    assert exported("toto-demo") == first


@pytest.mark.parametrize(
    ("missed", "said"),
    [
        ("mae_change", "change of the forecasts' MAE"),
        ("quantile_bias", "bias of the 0.1 quantile"),
        ("quantile_shift", "shift of the 0.1 quantile"),
    ],
)
def test_a_missed_budget_is_named_and_leaves_no_trace(
    store: ModelStore, exported: Export, monkeypatch: pytest.MonkeyPatch, missed: str, said: str
) -> None:
    budgets = exporting.BUDGETS["bfloat16"] | {missed: 0.0}
    monkeypatch.setitem(exporting.BUDGETS, "bfloat16", budgets)
    before = sorted(store.root.rglob("*"))
    with pytest.raises(ExportRefused, match=said) as refused:
        exported("toto-demo")
    assert "its budget 0" in str(refused.value)
    assert sorted(store.root.rglob("*")) == before
    assert not traces(store)


def test_a_function_that_answers_wrong_is_never_stored(
    store: ModelStore, exported: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float32 runtime that is off by a ten-thousandth, with nothing to compile."""
    kind = KINDS["onnx-float32"]
    monkeypatch.setattr(type(kind), "build", lambda self, decoder: {"forward.onnx": b"a graph"})

    def load(_: Any, decoder: Any, *__: Any) -> Any:
        def forward(*arguments: Any) -> Any:
            right = decoder.forward(*arguments)
            return right._replace(outputs=right.outputs * 1.0001)

        return {**functions_of(decoder), "forward": forward}

    monkeypatch.setattr(type(kind), "load", load)
    with pytest.raises(ExportRefused, match=r"largest error of a function is 0\.0001, its budget 1e-05"):
        exported("toto-demo", "onnx-float32")
    assert not traces(store)


def test_a_runtime_that_does_not_load_leaves_no_trace(
    store: ModelStore, exported: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> Any:
        raise RuntimeUnavailable("its CUDA libraries did not load")

    monkeypatch.setattr(type(KINDS["onnx-float32"]), "load", load)
    with pytest.raises(RuntimeUnavailable):
        exported("toto-demo")
    assert not traces(store)


@pytest.mark.parametrize("label", ["eager-float32", "cuda_graph-float32", "cuda_graph-bfloat16"])
def test_what_needs_no_files_and_no_parity_is_not_exported(exported: Export, label: str) -> None:
    with pytest.raises(ValueError, match="needs no export"):
        exported("toto-demo", label)


def test_a_version_without_a_network_is_refused(store: ModelStore, exported: Export) -> None:
    manifest = {
        "model": "naive",
        "family": "naive",
        "origin": {"kind": "trained", "source": "test"},
        "limits": {"min_context": 2, "max_context": 64, "max_horizon": 64},
        "created_at": "2025-01-01T00:00:00Z",
    }
    store.promote(f"naive@{store.put(manifest, {'family': 'naive'}, {}).version}", force="test")
    with pytest.raises(ValueError, match="no network to export"):
        exported("naive")


def test_calibration_asks_with_the_versions_defaults_about_the_newest_candles(
    build_tiny: Any, samples: list[Series]
) -> None:
    asked = calibration(build_tiny("kronos"), {"samples": 7, "top_p": 0.5}, samples, 20)
    shapes = {(item.sampling.samples, item.sampling.top_p, item.horizon, len(item.candles)) for item in asked.inputs}
    assert shapes == {(7, 0.5, 30, 64)}
    assert asked.actual.shape == (len(asked.inputs), 30)
    assert len({item.seed for item in asked.inputs}) == len(asked.inputs)


def test_series_too_short_to_calibrate_with_are_refused(build_tiny: Any, make_series: Any) -> None:
    with pytest.raises(ValueError, match="no series has 64 candles"):
        calibration(build_tiny("toto"), {}, [make_series("A", np.linspace(1, 2, 50))], 4)
