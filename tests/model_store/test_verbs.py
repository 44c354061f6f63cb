"""`candlecast store` as a user types it, on a folder and on a bucket."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from click.testing import CliRunner

from candlecast import main
from model_store.store import ModelStore


@pytest.fixture(params=["folder", "bucket"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CANDLECAST_HOME", str(tmp_path / "home"))
    where = str(tmp_path / "store") if request.param == "folder" else str(request.getfixturevalue("url"))
    monkeypatch.setenv("CANDLECAST_STORE_ROOT", where)
    return where


@pytest.fixture
def versions(root: str) -> list[str]:
    """Three of them, oldest first."""
    store = ModelStore(root)
    return [store.put(fields(number), {"width": number}, {}).version for number in range(3)]


def fields(number: int) -> dict[str, Any]:
    metric = {"value": 0.01 * number, "naive": 0.0, "low": -0.1, "high": 0.1}
    return {
        "model": "demo",
        "family": "naive",
        "origin": {"kind": "trained", "source": "demo.toml"},
        "limits": {"min_context": 2, "max_context": 512, "max_horizon": 64},
        "created_at": f"2026-01-02T03:04:{number:02d}+00:00",
        "evaluations": [
            {
                "windows": "test",
                "symbols": ["AAPL"],
                "start": "2010-01-01",
                "end": "2012-01-01",
                "interval": "1d",
                "horizon": 64,
                "origins": 100,
                "metrics": {"skill_vs_naive": metric},
            }
        ],
    }


def run(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(main, ["store", *words])
    assert done.exit_code == code, done.output
    return done.output


def as_json(*words: str) -> Any:
    return json.loads(run(*words, "--json"))


def test_the_life_of_a_version(versions: list[str]) -> None:
    first, second, third = versions
    run("promote", f"demo@{first}")
    told = run("promote", f"demo@{second}", "--reason", "wider")
    assert "skill_vs_naive on the test windows is +0.0100" in told
    run("promote", f"demo@{third}", "--symbol", "AAPL")
    assert f"demo@{third} forecasts 20% of requests too" in run("shadow", "demo", third, "--share", "0.2")
    assert as_json("shadow", "demo", "--off") == {"model": "demo", "version": None, "share": 0.0}
    rows = {row["model"]: row["aliases"] for row in as_json("list")}
    assert rows == {f"demo@{first}": "previous", f"demo@{second}": "production", f"demo@{third}": "AAPL"}
    assert as_json("rollback", "demo", "--reason", "too wide")["version"] == first
    assert "now serves AAPL as demo" in run("rollback", "demo", "--symbol", "AAPL")
    run("verify", "demo", f"demo@{second}")
    events = [(entry["event"], entry.get("reason")) for entry in as_json("log", "demo")]
    assert events == [
        *[("put", "trained from demo.toml")] * 3,
        ("promote", None),
        ("promote", "wider"),
        ("promote", None),
        ("shadow", None),
        ("shadow", None),
        ("rollback", "too wide"),
        ("rollback", None),
    ]
    assert "reason=too wide" in run("log", "demo")


@pytest.fixture
def service() -> Iterator[str]:
    """The address of one that has a shadow of demo, and of nothing else."""
    compared = {"interval": "1h", "steps": "1-8", "relative_mae": 0.93, "relative_mae_interval": [0.9, 0.97]}

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/models/demo/shadow"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(json.dumps({"shadow": "0123456789ab", "compared": [compared]}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answers) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_promotion_shows_what_the_shadow_was_worth(versions: list[str], service: str) -> None:
    told = run("promote", f"demo@{versions[0]}", "--url", service)
    assert "shadow 0123456789ab, 1h steps 1-8: error 0.930 x production's [0.900, 0.970]" in told
    assert "now serves as demo" in told
    assert "has no shadow of other" in run("promote", "other", "--url", service, code=1)


def test_two_versions_side_by_side(versions: list[str]) -> None:
    first, second, _ = (f"demo@{version}" for version in versions)
    rows = {row["what"]: (row[first], row[second]) for row in as_json("diff", first, second)}
    assert rows["config.width"] == ("0", "1")
    assert rows["evaluations.test.skill_vs_naive"] == ("0 [-0.1, 0.1], naive 0", "0.01 [-0.1, 0.1], naive 0")
    assert rows["created_at"] == ("2026-01-02T03:04:00+00:00", "2026-01-02T03:04:01+00:00")
    assert rows["files.config.json"][0].startswith("11 bytes, ")
    assert "limits.max_context" not in rows
    assert "config.width" in run("diff", first, second)


def test_collection_shows_before_it_deletes(versions: list[str]) -> None:
    gone, *kept = (f"demo@{version}" for version in versions)
    assert "0 versions" in run("gc")
    assert as_json("gc", "--keep", "2") == [gone]
    assert "would go: add --delete" in run("gc", "--keep", "2")
    assert len(as_json("list")) == 3
    assert "1 versions of 0.0 MB are deleted" in run("gc", "--keep", "2", "--delete", "--reason", "room")
    assert [row["model"] for row in as_json("list")] == kept


def test_a_version_is_carried_to_another_store(versions: list[str], tmp_path: Path) -> None:
    exact, file = f"demo@{versions[0]}", str(tmp_path / "demo.tar")
    run("pack", exact, file)
    other = ("--store", str(tmp_path / "other"))
    assert f"candlecast store promote {exact}" in run("unpack", file, *other)
    assert as_json("show", exact, *other) == as_json("show", exact)
    assert "exists" in run("pack", exact, file, code=1)
    (tmp_path / "demo.tar").write_bytes(b"x")
    assert "is not a packed version" in run("unpack", file, *other, code=1)


@pytest.mark.usefixtures("versions")
def test_errors_say_what_failed_and_what_to_do() -> None:
    for words in (("rollback", "demo"), ("log", "Demo"), ("diff", "demo@0123456789ab", "demo"), ("promote", "nothing")):
        lines = run(*words, code=1).splitlines()
        assert len(lines) <= 2
        assert lines[0].startswith("Error: ")
    assert "give a VERSION, or --off" in run("shadow", "demo", code=2)
