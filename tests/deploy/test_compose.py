"""docker-compose.yml: valid, closed to the outside, and each command of it run for real."""

import json
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import redis
from safetensors.torch import save_file

from model_store.store import ModelStore
from service.settings import Settings
from tests.conftest import write_short_recipes
from training.sample_data import write_samples

ROOT = Path(__file__).parents[2]
PROFILES = ("cpu", "gpu")

Services = dict[str, dict[str, Any]]


def lasting(services: Services) -> Services:
    return {name: spec for name, spec in services.items() if spec.get("restart") == "unless-stopped"}


def test_the_file_is_valid_by_the_schema_of_compose() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, ROOT / "docker-compose.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_service_can_do_or_take_more_than_it_needs(services: Services) -> None:
    for name, spec in services.items():
        assert spec["read_only"] or "devices" in spec["deploy"]["resources"].get("reservations", {}), name
        assert spec["cap_drop"] == ["ALL"], name
        assert spec["security_opt"] == ["no-new-privileges:true"], name
        assert "build" in spec or not spec["user"].startswith(("0", "root")), name
        assert set(spec["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}, name
        assert not {"privileged", "network", "pid", "ipc", "cap_add"} & set(spec), name
        assert spec.get("network_mode", "none") == "none", name


def test_nothing_can_be_reached_from_another_machine(services: Services) -> None:
    ports = [port for spec in services.values() for port in spec.get("ports", [])]
    assert len(ports) > len(PROFILES)
    assert [port for port in ports if not re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port)] == []
    assert "ports" not in services["redis"]


def test_images_are_pinned(services: Services) -> None:
    for name, spec in services.items():
        assert "build" in spec or re.search(r":v?\d+\.\d+\.\d+", spec["image"]), name
        assert "latest" not in spec["image"], name
        assert "build" not in spec or spec["image"].startswith(f"candlecast:{version('candlecast')}"), name


def test_services_that_last_are_watched_and_the_others_end(services: Services) -> None:
    for name, spec in services.items():
        watched = "build" in spec or "start_period" in spec.get("healthcheck", {})  # the image brings its own
        disabled = spec.get("healthcheck") == {"disable": True}
        assert watched and not disabled if name in lasting(services) else "build" not in spec or disabled, name
        for other, wanted in spec.get("depends_on", {}).items():
            expected = "service_healthy" if other in lasting(services) else "service_completed_successfully"
            assert wanted["condition"] == expected, f"{name} waits for {other}"
            assert set(services[other].get("profiles", [])) <= set(spec.get("profiles", [])), f"{name}, {other}"


def test_each_profile_has_the_service_under_one_name(services: Services) -> None:
    for profile in PROFILES:
        (spec,) = [each for each in lasting(services).values() if each.get("profiles") == [profile]]
        assert spec["networks"] == {"default": {"aliases": ["candlecast"]}}
    assert (ROOT / ".env").read_text() == "COMPOSE_PROFILES=cpu\n"


def test_every_setting_exists(services: Services) -> None:
    fields = {f"CANDLECAST_{name.upper()}" for name in Settings.model_fields}
    named = {name for spec in services.values() for name in spec.get("environment", {})}
    assert {name for name in named if name.startswith("CANDLECAST_")} - fields == set()
    assert any(name.startswith("CANDLECAST_") for name in named)


def test_every_mounted_file_is_there(services: Services) -> None:
    mounted = [volume for spec in services.values() for volume in spec["volumes"] if str(volume).startswith("./")]
    assert mounted
    assert [volume for volume in mounted if not (ROOT / volume.partition(":")[0]).exists()] == []
    assert [volume for volume in mounted if not volume.endswith(":ro")] == []


def redis_address(machine: Any, port: int) -> str:
    """The URL that was drawn for the service, at this machine's port."""
    drawn = Settings(_secrets_dir=machine.volume("secrets")).redis_url
    assert drawn is not None
    return drawn.replace("@redis:6379", f"@127.0.0.1:{port}")


def test_redis_asks_for_the_password_that_was_drawn_once(machine: Callable[..., Any]) -> None:
    place = machine()
    place.run("secrets")
    drawn = (place.volume("secrets") / "redis.conf").read_text()
    assert re.fullmatch(r"requirepass [0-9a-f]{48}\n", drawn)
    place.run("secrets")
    assert (place.volume("secrets") / "redis.conf").read_text() == drawn
    with place.up("redis") as (port, _):
        with redis.Redis.from_url(redis_address(place, port)) as client:
            kept = client.config_get("append*") | client.config_get("maxmemory-policy")
        with redis.Redis(port=port) as stranger, pytest.raises(redis.AuthenticationError):
            stranger.ping()
    assert (kept["appendonly"], kept["appendfsync"], kept["maxmemory-policy"]) == ("yes", "everysec", "noeviction")
    assert list(place.volume("redis").glob("appendonly*"))


@pytest.mark.parametrize("service", ["prometheus", "alertmanager"])
def test_the_monitors_start_with_their_files_and_are_ready(machine: Callable[..., Any], service: str) -> None:
    with machine().up(service) as (port, _), urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready") as answer:
        assert answer.status == 200


def first_start(place: Any) -> list[dict[str, Any]]:
    """What `docker compose up` runs on an empty machine, in its order; the answers to the requests that it prints."""
    write_short_recipes(place.workdir / "training" / "recipes")  # tests/training/test_recipes.py takes all steps
    write_samples(place.workdir / "data" / "samples")
    place.run("secrets")
    place.run("models-cpu")
    with place.up("redis") as (port, _):
        address = redis_address(place, port)
        with place.up("candlecast-cpu", CANDLECAST_REDIS_URL=address) as (_, process):
            printed = [process.stdout.readline() for _ in range(4)]
            assert printed[1] == "Try it:\n"
            assert all(" http://127.0.0.1:" in line for line in printed[2:])
            forecasts = [answer_to(line) for line in printed[2:]]
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
    return forecasts


def answer_to(curl: str) -> dict[str, Any]:
    words = shlex.split(curl)
    (url,) = [word for word in words if word.startswith("http")]
    kind = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, words[-1].encode(), kind), timeout=60) as answer:
        return dict(json.load(answer))


@pytest.mark.long
def test_the_first_start_ends_with_a_forecast_of_each_model(machine: Callable[..., Any], put_tiny: Any) -> None:
    place = machine()
    for family in ("toto", "kronos"):  # so that there is nothing to train
        put_tiny(ModelStore(place.volume("models")), family)
    kronos, toto = first_start(place)
    assert (len(kronos["forecast"]), len(toto["forecast"])) == (30, 64)


@pytest.mark.long
def test_the_first_start_trains_the_demo_models(machine: Callable[..., Any]) -> None:
    place = machine()
    kronos, toto = first_start(place)
    assert (len(kronos["forecast"]), len(toto["forecast"])) == (30, 64)
    assert place.run("models-cpu").count("@") == len(ModelStore(place.volume("models")).models()) == 2


def test_one_setting_imports_a_published_checkpoint_instead(
    machine: Callable[..., Any], tiny: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "Toto-Tiny-1.0"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny["toto"].config["network"]))
    save_file(dict(tiny["toto"].weights), folder / "model.safetensors")
    place = machine(CHECKPOINT=str(folder))
    place.run("models-cpu")
    store = ModelStore(place.volume("models"))
    assert store.models() == ["toto-tiny-1.0"]
    assert "production" in store.aliases("toto-tiny-1.0")
