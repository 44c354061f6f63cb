"""Where a store lies: a folder, or an object store that is read through a mirror on this machine.

Paths are relative and have slashes. An object is replaced whole; a version appears whole, by its manifest.
"""

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Protocol

from model_store.files import (
    StoreError,
    VerificationFailed,
    open_regular,
    sync_directory,
    write_directory,
    write_synced,
)
from model_store.manifest import MANIFEST, VERSION, FileEntry

_MAX_OBJECT_BYTES: Final = 16 * 2**20
_CHUNK: Final = 32 * 2**20


class Root(Protocol):
    """What a store needs of the place that it lies in."""

    folder: Path  # where versions are read from: all of a local root, of another those that were asked for

    def names(self, path: str) -> list[str]:
        """Of the folders directly under `path`."""
        ...

    def read(self, path: str) -> bytes | None:
        """The object at `path`; None where there is none."""
        ...

    def read_all(self, path: str) -> dict[str, bytes]:
        """The objects directly under `path`, by name."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """Put `data` at `path` in the place of what was there, so that readers see either."""
        ...

    def remove(self, path: str) -> None:
        """Delete the object at `path`; there need be none."""
        ...

    def stamp(self, path: str) -> str:
        """Changes whenever an object directly under `path` is written or removed."""
        ...

    def locked(self, model: str) -> contextlib.AbstractContextManager[None]:
        """Nobody else changes the model's aliases meanwhile, where the place has locks."""
        ...

    def versions(self, model: str) -> list[str]:
        """Those with a manifest, in no order."""
        ...

    def manifest(self, version: str) -> bytes | None:
        """The manifest of `model/version`; None where there is none."""
        ...

    def publish(self, version: str, contents: Mapping[str, bytes]) -> None:
        """Make `model/version` whole or not at all."""
        ...

    def bring(self, version: str, files: Mapping[str, FileEntry]) -> None:
        """Have the files of `model/version` under `folder`."""
        ...

    def check(self, version: str, files: Mapping[str, FileEntry]) -> None:
        """VerificationFailed where the place itself can tell, without reading them, that files are not these."""
        ...

    def forget(self, version: str) -> None:
        """What lies under `folder` is not what was stored: have it brought anew."""
        ...

    def withdraw(self, version: str) -> None:
        """Delete `model/version`: it is gone at once, its files soon."""
        ...


def root_of(where: str | Path, cache: Path) -> Root:
    """A path or `file://` is a folder, any other URL an object store with its mirror under `cache`."""
    scheme, is_url, rest = str(where).partition("://")
    if not is_url:
        return LocalRoot(Path(where))
    return LocalRoot(Path(rest)) if scheme == "file" else RemoteRoot(str(where).rstrip("/"), cache)


class LocalRoot:
    """A folder of this machine, or one that is mounted as such."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self, path: str) -> list[str]:
        folder = self.folder / path
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []

    def read(self, path: str) -> bytes | None:
        if not os.path.lexists(self.folder / path):
            return None
        with open_regular(self.folder / path) as file:
            return file.read(_MAX_OBJECT_BYTES)

    def read_all(self, path: str) -> dict[str, bytes]:
        folder = self.folder / path
        names = sorted(os.listdir(folder)) if folder.is_dir() else []
        found = {name: self.read(f"{path}/{name}") for name in names if not name.startswith(".")}
        return {name: data for name, data in found.items() if data is not None}

    def write(self, path: str, data: bytes) -> None:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
        write_synced(temporary, data)
        os.replace(temporary, target)
        _touch(target.parent)

    def remove(self, path: str) -> None:
        target = self.folder / path
        if os.path.lexists(target):
            target.unlink(missing_ok=True)
            _touch(target.parent)

    def stamp(self, path: str) -> str:
        try:
            return str(os.stat(self.folder / path).st_mtime_ns)
        except FileNotFoundError:
            return ""

    @contextlib.contextmanager
    def locked(self, model: str) -> Iterator[None]:
        with open(self.folder / model / ".lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def versions(self, model: str) -> list[str]:
        return [
            name
            for name in self.names(model)
            if VERSION.fullmatch(name) and (self.folder / model / name / MANIFEST).is_file()
        ]

    def manifest(self, version: str) -> bytes | None:
        home = self.folder / version
        if home.is_symlink() or home.parent.is_symlink():
            raise VerificationFailed(f"{version.replace('/', '@')} is a link")
        return self.read(f"{version}/{MANIFEST}")

    def publish(self, version: str, contents: Mapping[str, bytes]) -> None:
        write_directory(self.folder / version, contents)

    def bring(self, version: str, files: Mapping[str, FileEntry]) -> None:
        """They are there."""

    def check(self, version: str, files: Mapping[str, FileEntry]) -> None:
        """Only reading them tells."""

    def forget(self, version: str) -> None:
        """There is no other copy."""

    def withdraw(self, version: str) -> None:
        target = self.folder / version
        hidden = target.with_name(f".removed-{target.name}-{secrets.token_hex(4)}")
        os.rename(target, hidden)
        shutil.rmtree(hidden)


class RemoteRoot:
    """An object store behind fsspec: `s3://`, `gs://`. Credentials come from where its client looks for them.

    Objects are asked for each time. Versions, which never change, are kept in a mirror that is a local root; one that
    was brought in part lies beside it under another name, and goes on where it was.
    """

    def __init__(self, url: str, cache: Path) -> None:
        self._url = url
        self.folder = cache / hashlib.sha256(url.encode()).hexdigest()[:16]
        self._mirror = LocalRoot(self.folder)
        self._manifests: dict[str, bytes] = {}

    @cached_property
    def _files(self) -> tuple[Any, str]:
        """The file system, and the root's path in it."""
        from fsspec.core import url_to_fs

        try:
            files, path = url_to_fs(self._url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            extra = {"s3": "s3", "gs": "gs", "gcs": "gs"}.get(self._url.partition("://")[0])
            hint = f": pip install 'candlecast[{extra}]'" if extra else ""
            raise StoreError(f"{self._url} cannot be opened: {error}{hint}") from error
        return files, path.rstrip("/")

    def names(self, path: str) -> list[str]:
        return [Path(entry["name"]).name for entry in self._list(path) if entry["type"] == "directory"]

    def read(self, path: str) -> bytes | None:
        files, root = self._files
        with self._reaching(path), contextlib.suppress(FileNotFoundError):
            return bytes(files.cat_file(f"{root}/{path}"))
        return None

    def read_all(self, path: str) -> dict[str, bytes]:
        found = [Path(entry["name"]).name for entry in self._list(path) if entry["type"] == "file"]
        return self._read_these({name: f"{path}/{name}" for name in found})

    def write(self, path: str, data: bytes) -> None:
        files, root = self._files
        with self._reaching(path):
            files.pipe_file(f"{root}/{path}", data)

    def remove(self, path: str) -> None:
        files, root = self._files
        with self._reaching(path), contextlib.suppress(FileNotFoundError):
            files.rm_file(f"{root}/{path}")

    def stamp(self, path: str) -> str:
        entries = sorted(repr(sorted(entry.items(), key=str)) for entry in self._list(path))
        return hashlib.sha256("\n".join(entries).encode()).hexdigest() if entries else ""

    def locked(self, model: str) -> contextlib.AbstractContextManager[None]:
        """Object stores have no locks: of two who change an alias at once, the last one has."""
        return contextlib.nullcontext()

    def versions(self, model: str) -> list[str]:
        found = [name for name in self.names(model) if VERSION.fullmatch(name)]
        new = [f"{model}/{name}" for name in found if f"{model}/{name}" not in self._manifests]
        self._manifests |= self._read_these({version: f"{version}/{MANIFEST}" for version in new})
        return [name for name in found if f"{model}/{name}" in self._manifests]

    def manifest(self, version: str) -> bytes | None:
        if version not in self._manifests:
            found = self._mirror.manifest(version) or self.read(f"{version}/{MANIFEST}")
            if found is None:
                return None
            self._manifests[version] = found
        return self._manifests[version]

    def publish(self, version: str, contents: Mapping[str, bytes]) -> None:
        for name in sorted(contents, key=lambda name: name == MANIFEST):  # which makes it a version, last
            self.write(f"{version}/{name}", contents[name])

    def bring(self, version: str, files: Mapping[str, FileEntry]) -> None:
        target, model = self.folder / version, self.folder / Path(version).parent
        if (target / MANIFEST).is_file():
            return
        partial = target.with_name(f".partial-{target.name}")
        partial.mkdir(parents=True, exist_ok=True)
        with self._mirror.locked(model.name):
            if (target / MANIFEST).is_file():
                return  # by another process
            for name, entry in files.items():
                self._download(f"{version}/{name}", partial / name, entry)
            write_synced(partial / MANIFEST, self.manifest(version) or b"")
            sync_directory(partial)
            os.rename(partial, target)
            sync_directory(model)

    def _download(self, path: str, target: Path, entry: FileEntry) -> None:
        """Go on where `target` ends; VerificationFailed, and nothing left of it, if it is not `entry`'s."""
        files, root = self._files
        with open(target, "ab", buffering=0) as file, contextlib.suppress(FileNotFoundError):
            while (done := file.tell()) < entry.bytes:
                end = min(done + _CHUNK, entry.bytes)
                with self._reaching(path):
                    data = files.cat_file(f"{root}/{path}", start=done, end=end)
                file.write(data)
                if len(data) < end - done:
                    break
            os.fsync(file.fileno())
        with open(target, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != entry.sha256:
            target.unlink()
            raise VerificationFailed(f"{self._url}/{path} is not what was stored")

    def check(self, version: str, files: Mapping[str, FileEntry]) -> None:
        there = {Path(entry["name"]).name: entry["size"] for entry in self._list(version)}
        wanted = {name: entry.bytes for name, entry in files.items()}
        there.pop(MANIFEST, None)
        odd = ", ".join(sorted(name for name, _ in there.items() ^ wanted.items()))
        if odd:
            raise VerificationFailed(f"{self._url}/{version}: missing, unlisted or of another size: {odd}")

    def forget(self, version: str) -> None:
        if (self.folder / version).is_dir():
            self._mirror.withdraw(version)
        self._manifests.pop(version, None)

    def withdraw(self, version: str) -> None:
        files, root = self._files
        self.remove(f"{version}/{MANIFEST}")
        with self._reaching(version), contextlib.suppress(FileNotFoundError):
            files.rm(f"{root}/{version}", recursive=True)
        self.forget(version)

    def _list(self, path: str) -> list[dict[str, Any]]:
        files, root = self._files
        with self._reaching(path), contextlib.suppress(FileNotFoundError):
            found: list[dict[str, Any]] = files.ls(f"{root}/{path}".rstrip("/"), detail=True)
            return [entry for entry in found if not entry["name"].endswith("/")]  # a console's empty folders
        return []

    def _read_these(self, paths: Mapping[str, str]) -> dict[str, bytes]:
        """Several objects at once, by the names of their paths; those that are gone meanwhile are left out."""
        files, root = self._files
        if not paths:
            return {}
        with self._reaching(next(iter(paths.values()))):
            found = files.cat([f"{root}/{path}" for path in paths.values()], on_error="return")
        results = {name: found[f"{root}/{path}"] for name, path in paths.items()}
        for name, result in results.items():
            if isinstance(result, Exception) and not isinstance(result, FileNotFoundError):
                raise StoreError(f"{self._url}/{paths[name]}: {result}") from result
        return {name: result for name, result in results.items() if isinstance(result, bytes)}

    @contextlib.contextmanager
    def _reaching(self, path: str) -> Iterator[None]:
        """StoreError, whatever the client calls it, unless it is that nothing is there."""
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:
            raise StoreError(f"{self._url}/{path}: {error}") from error


def _touch(folder: Path) -> None:
    """Sync the folder and move its time."""
    with contextlib.suppress(PermissionError):  # another user's folder
        os.utime(folder, ns=(time.time_ns(),) * 2)  # of its own accord it moves by whole ticks of the kernel
    sync_directory(folder)
