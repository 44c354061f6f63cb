"""The client as it is installed: a wheel beside httpx and pandas, and nothing else."""

import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
sys.path[:0] = sys.argv[1:]
import candlecast_client
import pandas as pd
hours = pd.date_range("2026-01-01", periods=2, freq="h", tz="UTC")
frame = pd.DataFrame({"open": 1.0, "high": 2.0, "low": 0.5, "close": 1.5, "volume": 1.0}, hours)
try:
    candlecast_client.Candlecast("http://127.0.0.1:9", retries=0).forecast(frame, symbol="BTC")
except candlecast_client.NoAnswer:
    print(candlecast_client.__file__, *sys.modules)
"""


def needed(name: str, found: dict[str, str]) -> dict[str, str]:
    """A distribution with all that it needs, without extras: its name to its folder."""
    its = distribution(name)
    if canonicalize_name(name) not in found:
        found[canonicalize_name(name)] = name
        for text in its.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needed(requirement.name, found)
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(ROOT / "client")], check=True, timeout=300)
    (built,) = folder.glob("candlecast_client-*.whl")
    return built


def test_it_holds_one_package_with_its_types_and_licence(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"candlecast_client"}
    assert "candlecast_client/py.typed" in names
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_it_works_in_an_environment_that_has_nothing_but_what_it_asks_for(wheel: Path, tmp_path: Path) -> None:
    metadata = zipfile.ZipFile(wheel).read(f"{'-'.join(wheel.stem.split('-')[:2])}.dist-info/METADATA").decode()
    asked = [line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    assert sorted(Requirement(line).name for line in asked) == ["httpx", "pandas"]
    found: dict[str, str] = {}
    for line in asked:
        needed(Requirement(line).name, found)
    installed, beside = tmp_path / "installed", tmp_path / "beside"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*pip, str(installed), str(wheel)], check=True, timeout=300)
    beside.mkdir()
    for name in found.values():
        its = distribution(name)
        for top in {file.parts[0] for file in its.files or () if file.parts[0] not in ("..", "__pycache__")}:
            (beside / top).symlink_to(Path(str(its.locate_file(top))))
    empty = [sys.executable, "-I", "-S", "-W", "error", "-c", PROGRAM, str(installed), str(beside)]
    run = subprocess.run(empty, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    place, *modules = run.stdout.split()
    assert Path(place).is_relative_to(installed)
    foreign = {"torch", "pydantic", "fastapi", "redis", "service", "models", "model_store", "training", "candlecast"}
    assert foreign & {name.partition(".")[0] for name in modules} == set()
