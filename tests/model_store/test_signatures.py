"""Signed versions: where a key is trusted, nothing else is used."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from candlecast import main
from model_store.files import StoreError, VerificationFailed
from model_store.store import ModelStore
from tests.forged import LIMITS


def new_key(folder: Path, name: str, algorithm: str = "ed25519") -> tuple[Path, Path]:
    """PEM files of a private key and of its public half, as the README has them made."""
    private, public = folder / f"{name}.key", folder / f"{name}.pub"
    for command in (
        ["openssl", "genpkey", "-algorithm", algorithm, "-out", private],
        ["openssl", "pkey", "-in", private, "-pubout", "-out", public],
    ):
        subprocess.run(command, check=True, capture_output=True, timeout=60)
    return private, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return new_key(tmp_path, "store")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def version(root: Path) -> str:
    manifest = {
        "model": "demo",
        "family": "toto",
        "origin": {"kind": "trained", "source": "demo.toml"},
        "limits": LIMITS,
        "created_at": "2025-01-01T00:00:00Z",
    }
    return f"demo@{ModelStore(root).put(manifest, {'max_context': 512}, {'weight': torch.ones(3)}).version}"


def signed_by_command(root: Path, version: str, key: Path) -> str:
    done = CliRunner().invoke(main, ["store", "sign", version, "--key", str(key), "--store", str(root)])
    assert done.exit_code == 0, done.output
    return done.output


def test_a_signed_version_is_used_and_an_unsigned_one_is_not(root: Path, version: str, keys: Any) -> None:
    private, public = keys
    trusting = ModelStore(root, public_key=public)
    for use in (trusting.load, trusting.verify, trusting.promote):
        with pytest.raises(
            VerificationFailed, match=rf"^{version} is not signed: candlecast store sign {version} --key"
        ):
            use(version)
    assert signed_by_command(root, version, private).startswith(version)
    assert trusting.load(version).weights["weight"].tolist() == [1.0, 1.0, 1.0]
    assert ModelStore(root).load(version).manifest == trusting.promote(version)[0]
    assert trusting.log("demo")[1]["event"] == "sign"


def test_the_key_of_the_environment_is_trusted(
    root: Path, version: str, keys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANDLECAST_STORE_PUBLIC_KEY", str(keys[1]))
    with pytest.raises(VerificationFailed, match="is not signed"):
        ModelStore(root).load(version)
    ModelStore(root).sign(version, keys[0])
    ModelStore(root).load(version)


@pytest.mark.parametrize("damage", ["another key", "another version", "a byte", "cut off", "nothing"])
def test_a_signature_that_is_not_of_this_manifest_by_this_key_is_refused(
    root: Path, version: str, keys: Any, tmp_path: Path, damage: str
) -> None:
    store = ModelStore(root)
    store.sign(version, keys[0])
    (signature,) = (root / "demo" / "signatures").iterdir()
    good = signature.read_bytes()
    if damage == "another key":
        store.sign(version, new_key(tmp_path, "other")[0])
    elif damage == "another version":
        changed = store.manifest(version).model_dump(mode="json") | {"created_at": "2026-01-01T00:00:00Z"}
        newer = store.put(
            {key: value for key, value in changed.items() if key not in ("version", "files")},
            {"max_context": 512},
            {"weight": torch.zeros(3)},
        )
        version = f"demo@{newer.version}"
        signature.rename(signature.with_name(f"{newer.version}.ed25519"))
    else:
        signature.write_bytes(
            {"a byte": good[:-1] + bytes([good[-1] ^ 1]), "cut off": good[:-1], "nothing": b""}[damage]
        )
    with pytest.raises(VerificationFailed, match=f"^{version} is not signed by the trusted key"):
        ModelStore(root, public_key=keys[1]).load(version)


def test_what_was_damaged_before_is_not_signed(root: Path, version: str, keys: Any) -> None:
    with open(root / version.replace("@", "/") / "weights.safetensors", "ab") as file:
        file.write(b"\0")
    with pytest.raises(VerificationFailed, match="is not what was stored"):
        ModelStore(root).sign(version, keys[0])
    assert not (root / "demo" / "signatures").exists()


@pytest.mark.parametrize("content", [b"", b"no key", None])
def test_a_key_that_is_none_stops_everything(root: Path, version: str, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "none.pem"
    if content is not None:
        path.write_bytes(content)
    unusable(root, version, path, path)


def test_a_key_of_another_kind_stops_everything(root: Path, version: str, tmp_path: Path) -> None:
    unusable(root, version, *new_key(tmp_path, "other", "x25519"))


def unusable(root: Path, version: str, private: Path, public: Path) -> None:
    with pytest.raises(StoreError, match="cannot be used"):
        ModelStore(root, public_key=public)
    with pytest.raises(StoreError, match="cannot be used"):
        ModelStore(root).sign(version, private)


def test_a_signature_can_be_checked_without_this_project(root: Path, version: str, keys: Any) -> None:
    ModelStore(root).sign(version, keys[0])
    (signature,) = (root / "demo" / "signatures").iterdir()
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", keys[1], "-rawin",
               "-in", root / version.replace("@", "/") / "manifest.json", "-sigfile", signature]  # fmt: skip
    assert b"Verified Successfully" in subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
