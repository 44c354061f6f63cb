"""One runtime per version and machine: the fastest whose parity passed, timed once, remembered, shown."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from model_store.artefacts import machine_key, put_artefact
from model_store.manifest import MANIFEST, RUNTIMES, Artefact, Manifest, Parity
from model_store.store import LoadedVersion, ModelStore
from models.forecaster import Forecaster
from models.naive import NaiveForecaster
from models.runtimes.kinds import platform_name
from service.engine import selection as selecting
from service.engine.selection import Choice, Selection, time_again


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def manifest(store: ModelStore, put_tiny: Any) -> Manifest:
    found: Manifest = put_tiny(store, "toto")
    return found


@pytest.fixture
def eager(build_tiny: Any) -> Forecaster:
    found: Forecaster = build_tiny("toto")
    return found


@pytest.fixture
def put_runtime(store: ModelStore, manifest: Manifest, home: Path) -> Callable[..., Artefact]:
    """Put a runtime beside the version as if its parity had passed; bfloat16 run eagerly has no files."""

    def put(runtime: str = "eager", dtype: str = "bfloat16", files: Any = None, key: bytes = b"") -> Artefact:
        artefact = Artefact(
            model=manifest.model,
            version=manifest.version,
            runtime=runtime,
            dtype=dtype,
            platform=platform_name(torch.device("cpu")),
            torch=torch.__version__,
            files={},
            parity=Parity(functions={"forward": 0.0}, equal_tokens=1.0, budget={}),
            build_seconds=0.0,
            created_at="2025-01-01T00:00:00Z",
        )
        return put_artefact(store, artefact, files or {}, key or machine_key(home))

    return put


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What was timed, each time; bfloat16 always wins."""
    timed: list[list[str]] = []

    def measure(loaded: dict[str, Forecaster]) -> dict[str, tuple[float, float]]:
        timed.append(list(loaded))
        return {label: (1.0, 5.0) if label == "eager-bfloat16" else (2.0, 9.0) for label in loaded}

    monkeypatch.setattr(selecting, "_timed", measure)
    return timed


def select(store: ModelStore, home: Path, forced: str | None = None) -> Selection:
    return Selection(store, home, "cpu", forced)


def test_the_fastest_is_chosen_and_no_second_service_times_again(
    store: ModelStore, home: Path, manifest: Manifest, eager: Forecaster, put_runtime: Any, timings: Any
) -> None:
    put_runtime()
    choice, forecaster = select(store, home).settle(manifest, eager)
    assert choice == Choice("eager-bfloat16", {"eager-float32": (2.0, 9.0), "eager-bfloat16": (1.0, 5.0)}, True)
    assert forecaster.functions is not eager.functions
    again, _ = select(store, home).settle(manifest, eager)
    assert again == choice
    assert timings == [["eager-float32", "eager-bfloat16"]]
    select(store, home).settle(manifest, eager, again=True)
    assert len(timings) == 2


def test_real_times_of_both_batches_are_kept(
    store: ModelStore, home: Path, manifest: Manifest, eager: Forecaster, put_runtime: Any
) -> None:
    put_runtime()
    choice, _ = select(store, home).settle(manifest, eager)
    assert set(choice.times_ms) == {"eager-float32", "eager-bfloat16"}
    assert all(0 < alone < float("inf") and 0 < eight < float("inf") for alone, eight in choice.times_ms.values())
    assert choice.label == min(choice.times_ms, key=lambda label: sum(choice.times_ms[label]))


@pytest.mark.usefixtures("timings")
def test_a_choice_is_dropped_when_the_artefacts_or_the_threads_change(
    store: ModelStore,
    home: Path,
    manifest: Manifest,
    eager: Forecaster,
    put_runtime: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    select(store, home).settle(manifest, eager)
    assert select(store, home).remembered(manifest) is not None
    put_runtime()
    assert select(store, home).remembered(manifest) is None
    assert select(store, home).settle(manifest, eager)[0].label == "eager-bfloat16"
    assert select(store, home).remembered(manifest) is not None
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert select(store, home).remembered(manifest) is None


@pytest.mark.usefixtures("timings")
def test_a_forced_runtime_is_used_and_not_remembered(
    store: ModelStore, home: Path, manifest: Manifest, eager: Forecaster, put_runtime: Any
) -> None:
    put_runtime()
    choice, forecaster = select(store, home, "eager-float32").settle(manifest, eager)
    assert (choice.label, choice.forced) == ("eager-float32", True)
    assert forecaster is eager
    assert select(store, home).remembered(manifest) is None
    assert not choice.times_ms
    assert select(store, home).settle(manifest, eager)[0].label == "eager-bfloat16"
    kept = (home / "runtimes.json").read_bytes()
    assert select(store, home, "eager-float32").settle(manifest, eager)[0].label == "eager-float32"
    assert (home / "runtimes.json").read_bytes() == kept


def test_an_unknown_runtime_is_an_error_that_names_those_there_are(store: ModelStore, home: Path) -> None:
    with pytest.raises(ValueError, match=r"no runtime is called quick: use eager-float32, .*onnx-int8"):
        select(store, home, "quick")


def test_a_forced_runtime_that_was_never_exported_is_said_and_eager_serves(
    store: ModelStore, home: Path, manifest: Manifest, eager: Forecaster, caplog: pytest.LogCaptureFixture
) -> None:
    choice, forecaster = select(store, home, "compiled-float32").settle(manifest, eager)
    assert (choice.label, choice.forced, forecaster) == ("eager-float32", False, eager)
    assert "has no compiled-float32 on this machine: candlecast export makes it" in caplog.text
    assert select(store, home).remembered(manifest) is None


@pytest.mark.parametrize("native", [False, True])
def test_an_artefact_that_does_not_load_is_logged_and_eager_serves(
    store: ModelStore,
    home: Path,
    manifest: Manifest,
    eager: Forecaster,
    put_runtime: Any,
    caplog: pytest.LogCaptureFixture,
    native: bool,
) -> None:
    files = {f"{name}.{'pt2' if native else 'onnx'}": b"neither" for name in ("forward", "prefill", "draw", "step")}
    put_runtime("compiled" if native else "onnx", "float32", files)
    choice, forecaster = select(store, home).settle(manifest, eager)
    assert (choice.label, forecaster) == ("eager-float32", eager)
    assert "does not load" in caplog.text


def test_native_code_that_another_machine_built_is_not_run(
    store: ModelStore,
    home: Path,
    manifest: Manifest,
    eager: Forecaster,
    put_runtime: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    put_runtime("compiled", "float32", {"forward.pt2": b"evil"}, key=b"another machine's")
    assert select(store, home).settle(manifest, eager)[0].label == "eager-float32"
    assert "was not built on this machine" in caplog.text


@pytest.mark.usefixtures("timings")
def test_a_remembered_runtime_whose_bytes_changed_is_left_out(
    store: ModelStore,
    home: Path,
    manifest: Manifest,
    eager: Forecaster,
    put_runtime: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    put_runtime()
    assert select(store, home).settle(manifest, eager)[0].label == "eager-bfloat16"
    (folder,) = (store.root / manifest.model / manifest.version / RUNTIMES).iterdir()
    (folder / "unlisted").write_bytes(b"")
    choice, forecaster = select(store, home).settle(manifest, eager)
    assert (choice.label, forecaster) == ("eager-float32", eager)
    assert "unlisted" in caplog.text


@pytest.mark.usefixtures("timings")
def test_a_memory_that_is_no_json_is_forgotten(
    store: ModelStore, home: Path, manifest: Manifest, eager: Forecaster, put_runtime: Any
) -> None:
    put_runtime()
    home.mkdir(exist_ok=True)
    (home / "runtimes.json").write_text("{half")
    assert select(store, home).settle(manifest, eager)[0].label == "eager-bfloat16"
    assert len(json.loads((home / "runtimes.json").read_text())) == 1


def test_a_forecaster_without_functions_has_no_choice(store: ModelStore, home: Path, put_naive: Any) -> None:
    naive = NaiveForecaster()
    choice, forecaster = select(store, home).settle(put_naive(), naive)
    assert (choice, forecaster) == (Choice("eager-float32"), naive)


def test_times_are_taken_again_for_all_in_production(
    store: ModelStore, home: Path, manifest: Manifest, put_runtime: Any, timings: Any
) -> None:
    put_runtime()
    exact = f"{manifest.model}@{manifest.version}"
    for count, references in enumerate(([], [manifest.model]), start=1):
        assert (
            time_again(store.root, references, home=home, device="cpu", threads=None)[exact].label == "eager-bfloat16"
        )
        assert len(timings) == count


# -- in the service ------------------------------------------------------------------------------


@pytest.mark.usefixtures("timings")
@pytest.mark.anyio
async def test_eager_answers_uncached_while_the_choice_settles_then_the_chosen_one(
    running: Any,
    rows: Any,
    manifest: Manifest,
    put_runtime: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_runtime()
    may_settle, settle = threading.Event(), Selection.settle

    def held(self: Selection, *arguments: Any, **options: Any) -> Any:
        assert may_settle.wait(30)
        return settle(self, *arguments, **options)

    monkeypatch.setattr(Selection, "settle", held)
    body = {"model": f"toto-demo@{manifest.version}", "candles": rows(80), "interval": "1h", "seed": 1}

    async def ask(client: Any) -> Any:
        answer = await client.post("/forecast/BTC", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def shown(client: Any) -> Any:
        models = (await client.get("/models")).json()["models"]
        return next(model["runtime"] for model in models if model["version"] == manifest.version)

    async with running(build=LoadedVersion.build) as (client, app):
        assert await shown(client) is None
        try:
            for _ in range(2):
                first = await ask(client)
                assert (first["model"]["runtime"], first["model"]["dtype"]) == ("eager", "float32")
                assert first["meta"]["degraded"] == ["runtime"]
                assert first["meta"]["cache"] != "hit"
            assert (await shown(client))["settled"] is False
            assert (await client.get("/readyz")).status_code == 200
        finally:
            may_settle.set()
        await app.state.services.registry.idle()
        later = await ask(client)
        assert (later["model"]["runtime"], later["model"]["dtype"]) == ("eager", "bfloat16")
        assert not later["meta"]["degraded"]
        assert later["meta"]["cache"] == "miss"
        assert (await ask(client))["meta"]["cache"] == "hit"
        assert await shown(client) == {
            "name": "eager",
            "dtype": "bfloat16",
            "settled": True,
            "forced": False,
            "times_ms": {"eager-float32": [2.0, 9.0], "eager-bfloat16": [1.0, 5.0]},
            "batch_invariant": True,
            "base": None,
            "canary_moved": None,
        }


@pytest.mark.anyio
async def test_a_damaged_artefact_manifest_leaves_the_version_to_eager(
    running: Any, rows: Any, store: ModelStore, manifest: Manifest, put_runtime: Any
) -> None:
    put_runtime()
    (folder,) = (store.root / manifest.model / manifest.version / RUNTIMES).iterdir()
    (folder / MANIFEST).write_text("{}")
    body = {"model": f"toto-demo@{manifest.version}", "candles": rows(80), "interval": "1h"}
    async with running(build=LoadedVersion.build) as (client, app):
        for _ in range(2):
            answer = await client.post("/forecast/BTC", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.json()["model"]["runtime"] == "eager"
            await app.state.services.registry.idle()
