"""Folders that are whole or absent, and files whose hash is checked on the bytes that are used."""

import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

from model_store.manifest import MANIFEST, FileEntry


class StoreError(RuntimeError):
    """Something is wrong with the model store."""


class VersionNotFound(StoreError):
    """No such model, version or alias."""


class VerificationFailed(StoreError):
    """A version's bytes are not what its manifest says."""


def entries_of(contents: Mapping[str, bytes]) -> dict[str, FileEntry]:
    """Size and hash of every file."""
    return {
        name: FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in contents.items()
    }


def read_listed(home: Path, listed: Mapping[str, FileEntry], *, beside: frozenset[str], what: str) -> dict[str, bytes]:
    """Every listed file, hashed on the way in; unlisted files (but those named `beside`) and links are refused."""
    found = {entry.name for entry in os.scandir(home)} - beside
    if found != set(listed):
        odd = ", ".join(sorted(found ^ set(listed)))
        raise VerificationFailed(f"{what}: missing or unlisted: {odd}")
    contents = {}
    for name, entry in listed.items():
        with open_regular(home / name) as file:
            data = file.read(entry.bytes + 1)
        if len(data) != entry.bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise VerificationFailed(f"{what}: {name} is not what was stored")
        contents[name] = data
    return contents


def write_directory(target: Path, contents: Mapping[str, bytes]) -> None:
    """All files or none, under a temporary name first; a folder that another writer stored meanwhile is kept."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".put-", dir=target.parent))
    try:
        for name, data in contents.items():
            write_synced(temporary / name, data)
        temporary.chmod(0o755)
        sync_directory(temporary)
        os.rename(temporary, target)
        sync_directory(target.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not (isinstance(error, OSError) and (target / MANIFEST).is_file()):
            raise


def open_regular(path: Path) -> BinaryIO:
    """Open a plain file without following a link, so that what is hashed cannot be swapped for another file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would block for ever
    except OSError as error:
        raise VerificationFailed(f"{path.parent.name}/{path.name}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise VerificationFailed(f"{path.parent.name}/{path.name} is not a plain file")
    return os.fdopen(descriptor, "rb")


def write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
