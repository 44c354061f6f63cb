"""Tiny networks of both families with random weights, for tests of what lies around them."""

import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from bench.published import KRONOS_TINY, TOTO_TINY, random_weights, toto_config
from bench.service import put_version
from model_store.canary import canary_of
from model_store.manifest import Manifest
from model_store.store import ModelStore
from models.ensemble import EnsembleForecaster, member_of
from models.families import build_forecaster
from models.forecaster import Forecaster
from tests.scripted import Scripted


def write_short_recipes(folder: Path) -> None:
    """The recipes of the demo models, cut down to a few steps and windows."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("toto-demo", "kronos-demo"):
        text = (Path(__file__).parents[1] / "training" / "recipes" / f"{name}.toml").read_text()
        text = re.sub(r"^steps = \d+", "steps = 3", text, flags=re.MULTILINE)
        text = re.sub(r"^(unseen_)?stride = (?:16|4)$", r"\1stride = 400", text, flags=re.MULTILINE)
        (folder / f"{name}.toml").write_text(text.replace("samples = 64", "samples = 8"))


@pytest.fixture
def scripted() -> Iterator[Callable[..., Scripted]]:
    servers: list[Scripted] = []

    def start(*answers: Any) -> Scripted:
        servers.append(Scripted(*answers))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def packaged_candles() -> Callable[[str], Path]:
    """A CSV file of the backtesting package, found without importing it."""
    spec = importlib.util.find_spec("backtesting")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "test"
    return lambda name: folder / name


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """A bucket of a real S3 server, whose address and credentials are in the usual environment."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    usual = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (usual | {"DEFAULT_REGION": "us-east-1", "MAX_ATTEMPTS": "1"}).items():
            patch.setenv(f"AWS_{name}", value)
        fsspec.filesystem("s3").mkdir("candles")
        yield "s3://candles"
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


@pytest.fixture
def url(bucket: str, request: pytest.FixtureRequest) -> str:
    """A prefix of its own in the bucket."""
    return f"{bucket}/{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]}"


class Tiny(NamedTuple):
    config: dict[str, Any]
    weights: dict[str, torch.Tensor]

    def build(self, family: str, device: str = "cpu") -> Forecaster:
        return build_forecaster(family, self.config, self.weights, device)


def make_tiny(seed: int) -> dict[str, Tiny]:
    configs = {"toto": toto_config(TOTO_TINY | {"num_layers": 2}, 512), "kronos": KRONOS_TINY}
    return {family: Tiny(config, random_weights(family, config, seed)) for family, config in configs.items()}


@pytest.fixture(scope="session")
def tiny() -> dict[str, Tiny]:
    """By family; every network has 2 layers, 32 wide."""
    return make_tiny(seed=3)


@pytest.fixture(scope="session")
def tinies() -> Callable[[int], dict[str, Tiny]]:
    """As `tiny`, by seed: the same code over other weights."""
    return make_tiny


@pytest.fixture(scope="session")
def build_tiny(tiny: dict[str, Tiny]) -> Callable[..., Forecaster]:
    """A forecaster of its own, by family, whose weights a test may change."""

    def build(family: str, device: str = "cpu") -> Forecaster:
        config, weights = tiny[family]
        return Tiny(config, {name: tensor.clone() for name, tensor in weights.items()}).build(family, device)

    return build


@pytest.fixture(scope="session")
def put_tiny(tiny: dict[str, Tiny]) -> Callable[[ModelStore, str], Manifest]:
    """Store and promote `toto-demo` or `kronos-demo`."""

    def put(store: ModelStore, family: str) -> Manifest:
        config, weights = tiny[family]
        cloned = {name: tensor.clone() for name, tensor in weights.items()}
        return store.manifest(put_version(store, f"{family}-demo", family, config, cloned))

    return put


@pytest.fixture(scope="session")
def put_ensemble() -> Callable[..., Manifest]:
    """Store an ensemble of production versions: `put(store, ["toto-demo", "kronos-demo"], [[0.25, 0.75], ...])`."""

    numbers = count()

    def put(store: ModelStore, names: Sequence[str], weights: Sequence[Sequence[float]], horizon: int = 30) -> Manifest:
        members = ["@".join(store.resolve(name)) for name in names]
        config = {"members": members, "weights": weights, "max_horizon": horizon, "learnt": {"until": "2010-05-28"}}
        fields = {
            "model": "ensemble",
            "family": "ensemble",
            "origin": {"kind": "trained", "source": f"blend of {', '.join(members)}"},
            "limits": {"min_context": 2, "max_context": 512, "max_horizon": horizon},
            "created_at": f"2025-02-01T00:00:{next(numbers):02d}Z",
        }
        parts = [store.load(member) for member in members]
        built = [member_of(part.build(), part.manifest.serving) for part in parts]
        canary = canary_of(EnsembleForecaster.from_config(config, built))
        found = store.put(fields | {"canary": canary}, config, {})
        store.promote(f"ensemble@{found.version}", force="test")
        return found

    return put
