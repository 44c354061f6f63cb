"""Runtimes of a version: files in `<model>/<version>/runtimes/<runtime>-<dtype>-<platform>-<torch>/`, append-only."""

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from model_store.files import VerificationFailed, entries_of, open_regular, read_listed, write_directory
from model_store.manifest import MANIFEST, RUNTIMES, Artefact, canonical_json

if TYPE_CHECKING:
    from model_store.store import ModelStore

_MAX_MANIFEST_BYTES = 2**20
_KEY_BYTES = 32


def machine_key(home: Path) -> bytes:
    """The secret by which this machine knows what it built; made at the first call."""
    path = home / "machine.key"
    home.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        descriptor, temporary = tempfile.mkstemp(prefix=".machine.key-", dir=home)  # of mode 0600
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
        with contextlib.suppress(FileExistsError):  # another process was first: its key is the machine's
            os.link(temporary, path)
        os.unlink(temporary)
    with open_regular(path) as file:
        key = file.read()
    if len(key) != _KEY_BYTES:
        raise VerificationFailed(f"{path.name} is not a key: delete it, and export what it signed anew")
    return key


def put_artefact(store: "ModelStore", artefact: Artefact, contents: Mapping[str, bytes], key: bytes) -> Artefact:
    """Store an artefact whole or not at all, signed, in the place of one that this machine could not use."""
    complete = artefact.model_copy(update={"files": entries_of(contents)}).signed(key)
    data = canonical_json(complete.model_dump(mode="json"))
    home = _home(store, complete)
    if home.exists():
        shutil.rmtree(home)
    write_directory(home, {**contents, MANIFEST: data})
    return complete


def find_artefacts(store: "ModelStore", reference: str, *, platform: str, torch_version: str) -> dict[str, Artefact]:
    """The artefacts of a version that were tested on this platform and torch, by label."""
    model, version = store.resolve(reference)
    found = [(path, _read(path / MANIFEST)) for path in _whole(store.root / model / version)]
    wanted = (model, version, platform, torch_version)
    return {
        one.label: one
        for path, one in found
        if (one.model, one.version, one.platform, one.torch) == wanted and path == _home(store, one)
    }


def read_artefact(store: "ModelStore", artefact: Artefact, *, native: bool, key: bytes) -> dict[str, bytes]:
    """Its files, verified. Native code runs only where it was built: VerificationFailed unless `key` signed it."""
    what = f"{artefact.model}@{artefact.version} {artefact.label}"
    if native and not artefact.is_signed_by(key):
        raise VerificationFailed(f"{what} is native code that was not built on this machine: export it here")
    return read_listed(_home(store, artefact), artefact.files, beside=frozenset({MANIFEST}), what=what)


def check_runtimes(version: Path) -> None:
    """VerificationFailed unless every runtime in a version's folder is whole and was compared with float32."""
    for path in _whole(version):
        artefact, what = _read(path / MANIFEST), f"{version.parent.name}@{version.name} {path.name}"
        read_listed(path, artefact.files, beside=frozenset({MANIFEST}), what=what)
        if not artefact.parity.functions:
            raise VerificationFailed(f"{what} was never compared with float32: export it anew, or delete it")


def _whole(version: Path) -> list[Path]:
    home = version / RUNTIMES
    found = sorted(home.iterdir()) if home.is_dir() else []
    return [path for path in found if not path.name.startswith(".") and (path / MANIFEST).is_file()]


def _home(store: "ModelStore", artefact: Artefact) -> Path:
    folder = f"{artefact.label}-{artefact.platform}-{artefact.torch}"
    return store.root / artefact.model / artefact.version / RUNTIMES / folder


def _read(path: Path) -> Artefact:
    with open_regular(path) as file:
        data = file.read(_MAX_MANIFEST_BYTES)
    try:
        return Artefact.model_validate_json(data)
    except ValidationError as error:
        raise VerificationFailed(f"{path.parent.name}: {MANIFEST} is not an artefact's: {error}") from error
