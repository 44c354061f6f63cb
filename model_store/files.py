"""Folders that are whole or absent, and files whose hash is checked on the bytes that are used."""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Final

from model_store.manifest import MANIFEST, FileEntry

_NAMED: Final = 8  # odd files of a folder, at most


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


def check_listing(home: Path, listed: Mapping[str, FileEntry], *, beside: frozenset[str], what: str) -> None:
    """VerificationFailed unless the folder has the listed files and, but for those named `beside`, no others."""
    odd = sorted(({entry.name for entry in os.scandir(home)} - beside) ^ set(listed))
    if odd:
        names = ", ".join(name if name.isprintable() else repr(name) for name in odd[:_NAMED])
        more = f" and {len(odd) - _NAMED} more" if len(odd) > _NAMED else ""
        raise VerificationFailed(f"{what}: missing or unlisted: {names}{more}")


def read_listed(home: Path, listed: Mapping[str, FileEntry], *, beside: frozenset[str], what: str) -> dict[str, bytes]:
    """Every listed file of a folder, verified; unlisted files (but those named `beside`) and links are refused."""
    check_listing(home, listed, beside=beside, what=what)
    return {name: read_file(home / name, entry, f"{what}: {name}") for name, entry in listed.items()}


def read_file(path: Path, listed: FileEntry, what: str) -> bytes:
    """A file's bytes; VerificationFailed, beginning with `what`, unless they are those that were listed."""
    with open_listed(path, listed, what) as file:
        data = file.read(listed.bytes)
    if hashlib.sha256(data).hexdigest() != listed.sha256:
        raise VerificationFailed(f"{what} is not what was stored")
    return data


def read_start(path: Path) -> bytes:
    """The first mebibyte of a plain file, or of the one that links lead to."""
    with open_regular(path.resolve()) as file:
        return file.read(2**20)


def verify_file(path: Path, listed: FileEntry, what: str) -> None:
    """As `read_file`, without keeping the bytes."""
    with open_listed(path, listed, what) as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != listed.sha256:  # type: ignore[arg-type]
            raise VerificationFailed(f"{what} is not what was stored")


@contextlib.contextmanager
def open_listed(path: Path, listed: FileEntry | None, what: str) -> Iterator[BinaryIO]:
    """A plain file of the listed size, which fits in memory: of sparse files a size says nothing."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if listed and size != listed.bytes:
            raise VerificationFailed(f"{what} is not what was stored: {size} bytes, not {listed.bytes}")
        if size > (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")):
            raise VerificationFailed(f"{what} has {size} bytes, this machine {memory} of memory")
        yield file


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
    where = "/".join(path.parts[-3:])  # of a version: its model, itself, its file
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would block for ever
    except OSError as error:
        what = "is a link" if error.errno == errno.ELOOP else f"cannot be read: {error.strerror}"
        raise VerificationFailed(f"{where} {what}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise VerificationFailed(f"{where} is not a plain file")
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
