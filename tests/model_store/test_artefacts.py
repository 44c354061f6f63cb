"""Artefacts beside a version: whole, signed, verified, and never in the way of the version itself."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from model_store.artefacts import find_artefacts, machine_key, put_artefact, read_artefact
from model_store.files import VerificationFailed
from model_store.manifest import MANIFEST, RUNTIMES, Artefact, Parity
from model_store.store import ModelStore

PLATFORM, TORCH = "linux-x86_64-avx512", "2.13.0"
FILES = {"forward.pt2": b"code", "step.pt2": b"more code"}
KEY, OTHER_KEY = b"k" * 32, b"o" * 32


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "store")


@pytest.fixture
def version(store: ModelStore) -> str:
    manifest = {
        "model": "demo",
        "family": "toto",
        "origin": {"kind": "trained", "source": "demo.toml"},
        "limits": {"min_context": 2, "max_context": 512, "max_horizon": 64},
        "created_at": "2025-01-01T00:00:00Z",
    }
    return store.put(manifest, {"max_context": 512}, {"weight": torch.ones(3)}).version


def artefact(version: str, **changes: Any) -> Artefact:
    fields = {
        "model": "demo",
        "version": version,
        "runtime": "compiled",
        "dtype": "float32",
        "platform": PLATFORM,
        "torch": TORCH,
        "files": {},
        "parity": Parity(functions={"forward": 1e-7}, equal_tokens=1.0, budget={"functions": 1e-5}),
        "build_seconds": 1.5,
        "created_at": "2025-01-01T00:00:00Z",
    }
    return Artefact(**fields | changes)


def find(store: ModelStore, version: str, **changes: str) -> dict[str, Artefact]:
    return find_artefacts(store, f"demo@{version}", **{"platform": PLATFORM, "torch_version": TORCH} | changes)


def folder(store: ModelStore, version: str) -> Path:
    (only,) = (store.root / "demo" / version / RUNTIMES).iterdir()
    return only


def test_what_was_put_is_found_and_read(store: ModelStore, version: str) -> None:
    put = put_artefact(store, artefact(version), FILES, KEY)
    found = find(store, version)
    assert found == {"compiled-float32": put}
    assert read_artefact(store, found["compiled-float32"], native=True, key=KEY) == FILES
    assert folder(store, version).name == f"compiled-float32-{PLATFORM}-{TORCH}"


def test_a_second_put_takes_the_place_of_the_first_whole(store: ModelStore, version: str) -> None:
    put_artefact(store, artefact(version), {"forward.pt2": b"another machine's", "more.pt2": b""}, b"x" * 32)
    second = put_artefact(store, artefact(version, build_seconds=9.0), FILES, KEY)
    found = find(store, version)["compiled-float32"]
    assert found == second
    assert read_artefact(store, found, native=True, key=KEY) == FILES
    assert len(list(folder(store, version).parent.iterdir())) == 1


def test_what_a_killed_export_left_is_no_artefact(store: ModelStore, version: str) -> None:
    put_artefact(store, artefact(version), FILES, KEY)
    home = folder(store, version)
    home.rename(home.with_name(".put-abc"))
    assert find(store, version) == {}


def test_a_key_that_was_never_written_whole_is_refused(tmp_path: Path) -> None:
    (tmp_path / "machine.key").write_bytes(b"")
    with pytest.raises(VerificationFailed, match="is not a key"):
        machine_key(tmp_path)


@pytest.mark.parametrize("platform", [PLATFORM, "linux-aarch64-default"])
def test_an_artefact_of_another_machine_or_torch_is_not_found(store: ModelStore, version: str, platform: str) -> None:
    put_artefact(store, artefact(version), FILES, KEY)
    assert find(store, version, platform=platform, torch_version="2.14.0") == {}
    assert bool(find(store, version, platform=platform)) == (platform == PLATFORM)


def test_one_changed_byte_is_refused(store: ModelStore, version: str) -> None:
    put = put_artefact(store, artefact(version), FILES, KEY)
    (folder(store, version) / "step.pt2").write_bytes(b"MORE code")
    with pytest.raises(VerificationFailed, match=r"step\.pt2 is not what was stored"):
        read_artefact(store, put, native=True, key=KEY)


def test_missing_and_unlisted_files_are_refused(store: ModelStore, version: str) -> None:
    put = put_artefact(store, artefact(version), FILES, KEY)
    (folder(store, version) / "step.pt2").rename(folder(store, version) / "extra.pt2")
    with pytest.raises(VerificationFailed, match=r"extra\.pt2, step\.pt2"):
        read_artefact(store, put, native=True, key=KEY)


def test_a_link_in_the_place_of_a_file_is_refused(store: ModelStore, version: str, tmp_path: Path) -> None:
    put = put_artefact(store, artefact(version), FILES, KEY)
    (tmp_path / "elsewhere").write_bytes(FILES["step.pt2"])
    (folder(store, version) / "step.pt2").unlink()
    (folder(store, version) / "step.pt2").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(VerificationFailed, match=r"step\.pt2"):
        read_artefact(store, put, native=True, key=KEY)


def test_native_code_of_another_machine_is_refused_other_files_are_not(store: ModelStore, version: str) -> None:
    put = put_artefact(store, artefact(version), FILES, KEY)
    with pytest.raises(VerificationFailed, match="not built on this machine"):
        read_artefact(store, put, native=True, key=OTHER_KEY)
    assert read_artefact(store, put, native=False, key=OTHER_KEY) == FILES


def test_a_manifest_that_was_edited_with_its_files_lost_its_signature(store: ModelStore, version: str) -> None:
    """Who can write files can also write their hashes, but does not have the key."""
    put_artefact(store, artefact(version), FILES, KEY)
    home = folder(store, version)
    (home / "step.pt2").write_bytes(b"evil")
    forged = artefact(version).model_copy(update={"files": {}}).model_dump(mode="json")
    kept = json.loads((home / MANIFEST).read_text())
    (home / MANIFEST).write_text(json.dumps(kept | {"build_seconds": 0.0, "files": forged["files"]}))
    with pytest.raises(VerificationFailed, match="not built on this machine"):
        read_artefact(store, find(store, version)["compiled-float32"], native=True, key=KEY)


def test_the_version_still_verifies_and_loads_with_runtimes_beside_it(store: ModelStore, version: str) -> None:
    put_artefact(store, artefact(version), FILES, KEY)
    assert store.verify(f"demo@{version}").version == version
    assert store.load(f"demo@{version}").weights["weight"].tolist() == [1.0, 1.0, 1.0]
    assert store.versions("demo") == [version]


def test_a_manifest_that_is_none_is_refused(store: ModelStore, version: str) -> None:
    put_artefact(store, artefact(version), FILES, KEY)
    (folder(store, version) / MANIFEST).write_text('{"runtime": "compiled"}')
    with pytest.raises(VerificationFailed, match="is not an artefact's"):
        find(store, version)
    assert store.verify(f"demo@{version}").version == version


def test_an_artefact_in_another_versions_folder_is_not_found(store: ModelStore, version: str) -> None:
    put_artefact(store, artefact(version), FILES, KEY)
    home = folder(store, version)
    kept = json.loads((home / MANIFEST).read_text())
    (home / MANIFEST).write_text(json.dumps(kept | {"version": "0" * 12}))
    assert find(store, version) == {}


def test_the_machine_key_is_made_once_and_nobody_else_reads_it(tmp_path: Path) -> None:
    home = tmp_path / "not" / "there"
    key = machine_key(home)
    assert len(key) == 32
    assert machine_key(home) == key
    assert stat.S_IMODE((home / "machine.key").stat().st_mode) == 0o600
    assert machine_key(tmp_path / "other") != key
