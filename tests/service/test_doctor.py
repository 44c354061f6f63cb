"""candlecast doctor: every reason why a machine would not serve, or slowly, is found and says what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from candlecast import main
from model_store.manifest import Manifest
from model_store.store import ModelStore
from service import doctor
from service.settings import Settings
from service.state import PrivateRedis, connect

Doctor = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """`run(CANDLECAST_DEVICE="cuda")` on a store with both demo models."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def diagnose(**variables: str) -> Result:
        usual = {"CANDLECAST_STORE_ROOT": str(store.root), "CANDLECAST_HOME": str(tmp_path)}
        return CliRunner().invoke(main, ["doctor", "--json"], env=usual | variables)

    return diagnose


def told(done: Result, topic: str) -> list[dict[str, str]]:
    return [each for each in json.loads(done.stdout)["findings"] if each["topic"] == topic]


def test_a_machine_that_serves_is_told_so_and_why_it_could_be_faster(
    run: Doctor, store: ModelStore, put_tiny: Callable[[ModelStore, str], Manifest]
) -> None:
    for family in ("toto", "kronos"):
        put_tiny(store, family)
    done = run()
    assert (done.exit_code, json.loads(done.stdout)["works"]) == (0, True), done.output
    topics = {each["topic"] for each in json.loads(done.stdout)["findings"]}
    assert topics >= {"python", "torch", "gpu", "processor", "threads", "memory", "redis", "store", "packages"}
    assert topics >= {"compiler", "disk", "clock"}
    assert told(done, "store") == [
        {"topic": "store", "level": "fine", "found": f"2 versions of 2 models in {store.root}", "advice": ""}
    ]
    slow = {each["found"].partition("@")[0]: each for each in told(done, "runtimes")}
    assert slow.keys() == {"toto-demo", "kronos-demo"}
    assert "candlecast export toto-demo --runtime compiled" in slow["toto-demo"]["advice"]
    assert "a private 6." in told(done, "redis")[0]["found"] or "a private 7." in told(done, "redis")[0]["found"]


def test_a_damaged_version_in_production_fails_and_another_is_only_named(
    run: Doctor, store: ModelStore, put_tiny: Callable[[ModelStore, str], Manifest]
) -> None:
    served, other = put_tiny(store, "toto"), put_tiny(store, "kronos")
    (store.root / other.model / "0123456789ab").mkdir()
    (store.root / other.model / "0123456789ab" / "manifest.json").write_text("{}")
    assert run().exit_code == 0
    weights = store.root / served.model / served.version / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    done = run()
    assert done.exit_code == 1
    levels = {each["found"].partition("@")[0]: each["level"] for each in told(done, "store") if each["level"] != "fine"}
    assert levels == {"toto-demo": "broken", "kronos-demo": "note"}


@pytest.mark.parametrize(
    ("variables", "topic", "advice"),
    [
        ({}, "store", "candlecast train RECIPE"),
        ({"CANDLECAST_DEVICE": "cuda"}, "gpu", "unset CANDLECAST_DEVICE"),
        ({"CANDLECAST_REDIS_URL": "redis://127.0.0.1:1/0"}, "redis", "unset CANDLECAST_REDIS_URL"),
        ({"CANDLECAST_HOME": f"{__file__}/home"}, "disk", "set CANDLECAST_HOME"),
        ({"CANDLECAST_HOME": f"/tmp/{'long' * 30}"}, "redis", "does not start"),
    ],
)
def test_what_will_not_work_ends_with_1_and_says_what_to_do(
    run: Doctor, variables: dict[str, str], topic: str, advice: str
) -> None:
    done = run(**variables)
    assert done.exit_code == 1
    [broken] = [each for each in told(done, topic) if each["level"] == "broken"]
    assert advice in broken["advice"]


def test_more_threads_than_cores_are_slow(run: Doctor) -> None:
    [found] = told(run(CANDLECAST_THREADS="4096"), "threads")
    assert found["level"] == "slow"
    assert "set CANDLECAST_THREADS=" in found["advice"]


def test_a_name_that_requests_mean_and_the_store_lacks_is_named(run: Doctor, store: ModelStore, put_tiny: Any) -> None:
    put_tiny(store, "toto")
    assert "no kronos-demo in production" in [each["found"] for each in told(run(), "store")]


@pytest.mark.anyio
async def test_the_redis_that_answers_is_told_with_its_version(tmp_path: Path) -> None:
    server, client = PrivateRedis(tmp_path / "redis"), connect(f"unix://{tmp_path / 'redis' / PrivateRedis.SOCKET}")
    await server.start(client)
    try:
        version = (await client.info("server"))["redis_version"]
        [found] = await doctor._redis(Settings(home=tmp_path))
    finally:
        await client.aclose()
        await server.stop()
    assert (found.level, found.found) == ("fine", f"{version} answers at {tmp_path}")


@pytest.mark.parametrize(
    ("cpuinfo", "level", "words"),
    [
        ("model name\t: Old\nflags\t\t: sse2 avx\n", "slow", "without AVX2"),
        ("model name\t: Usual\nflags\t\t: avx2 fma\n\nmodel name\t: Usual\n", "note", "bfloat16 is emulated"),
        ("model name\t: New\nflags\t\t: avx2 avx512f avx512_bf16 amx_bf16\n", "fine", ""),
        ("Features\t: fp asimd bf16 i8mm\n", "fine", ""),
        ("", "fine", ""),  # not on Linux
    ],
)
def test_a_processor_is_judged_by_its_instruction_sets(cpuinfo: str, level: str, words: str) -> None:
    [found] = doctor.processor(cpuinfo)
    assert (found.level, words in found.advice) == (level, True)


def test_packages_that_are_not_those_of_the_lock_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "requirements.lock"
    lock.write_text("numpy==0.0.1\n")
    [found] = doctor.packages(lock)
    assert found.level == "note"
    assert "requirements.lock: 0.0.1" in found.found
    monkeypatch.setattr(doctor, "_PACKAGES", ("numpy", "no-such-package"))
    assert [each.level for each in doctor.packages(lock)] == ["broken", "note"]


def test_a_clock_behind_what_is_stored_is_broken(store: ModelStore, put_naive: Callable[..., Any]) -> None:
    put_naive(created_at="2026-03-01T00:00:00+00:00")
    assert [each.level for each in doctor.clock(store, 1.7e9)] == ["broken"]
    assert [each.level for each in doctor.clock(store, 1.8e9)] == ["fine"]


def test_the_table_says_all_that_the_json_does(run: Doctor, store: ModelStore, tmp_path: Path) -> None:
    env = {"CANDLECAST_STORE_ROOT": str(store.root), "CANDLECAST_HOME": str(tmp_path)}
    text = "".join(CliRunner().invoke(main, ["doctor"], env=env).stdout.split())
    for each in json.loads(run().stdout)["findings"]:
        if each["topic"] not in ("memory", "disk", "clock"):  # which change meanwhile
            assert "".join(f"{each['level']}{each['topic']}{each['found']}{each['advice']}".split()) in text
