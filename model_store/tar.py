"""A version as one file: the same bytes wherever it is packed, and nothing but the version."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from model_store.files import VerificationFailed, entries_of
from model_store.manifest import MANIFEST, RUNTIMES, Manifest
from model_store.store import ModelStore, parse_manifest

_MAX_MANIFEST_BYTES: Final = 16 * 2**20


def pack(store: ModelStore, reference: str, path: Path) -> Manifest:
    """Write the version's files, verified, to `path`; its runtimes are built anew where it goes."""
    manifest, contents = store.files(reference)
    with open(path, "xb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(contents, key=lambda name: (name != MANIFEST, name)):
            add(tar, f"{manifest.model}/{manifest.version}/{name}", contents[name])
    return manifest


def unpack(store: ModelStore, path: Path, *, reason: str | None = None) -> Manifest:
    """Store the version in `path`; VerificationFailed, and nothing stored, unless it is one, whole and alone."""
    try:
        with tarfile.open(path, mode="r:") as tar:
            manifest, contents = _read(tar)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise VerificationFailed(f"{path} is not a packed version: {error}") from error
    except VerificationFailed as error:
        raise VerificationFailed(f"{path}: {error}") from error
    store.put_files(manifest, contents, reason=reason or f"unpacked from {path.name}")
    return manifest


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Append a plain file, without owner or time."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))


def _read(tar: tarfile.TarFile) -> tuple[Manifest, dict[str, bytes]]:
    members = plain_members(tar)
    first = next(members, None)
    model, version, name = parts_of(first) if first else ("", "", "")
    if first is None or name != MANIFEST or first.size > _MAX_MANIFEST_BYTES:
        raise VerificationFailed(f"a packed version begins with its {MANIFEST}")
    data = bytes_of(tar, first)
    manifest = parse_manifest(data, model, version)
    contents = {MANIFEST: data}
    for member in members:
        *home, name = parts_of(member)
        if home[:2] == [model, version] and home[2:3] == [RUNTIMES]:
            continue  # native code of another machine, for all that is known
        entry = manifest.files.get(name)
        if home != [model, version] or entry is None or name in contents:
            raise VerificationFailed(f"{member.name} is unlisted")
        if member.size != entry.bytes:
            raise VerificationFailed(f"{member.name} is not what was stored")
        contents[name] = bytes_of(tar, member)
        if entries_of({name: contents[name]})[name] != entry:
            raise VerificationFailed(f"{member.name} is not what was stored")
    missing = ", ".join(sorted(manifest.files.keys() - contents.keys()))
    if missing:
        raise VerificationFailed(f"missing: {missing}")
    return manifest, contents


def plain_members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Its members in order; VerificationFailed at the first that is not a plain file."""
    for member in tar:
        if not member.isreg() or member.issparse():
            raise VerificationFailed(f"{member.name} is not a plain file")
        yield member


def parts_of(member: tarfile.TarInfo) -> list[str]:
    """Of its name, which is relative and goes nowhere but down."""
    parts = member.name.split("/")
    if len(parts) < 3 or not all(parts) or {".", ".."} & set(parts):
        raise VerificationFailed(f"{member.name!r} is no name of a version's file")
    return parts


def bytes_of(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """All of a member; VerificationFailed where the archive ends within it."""
    file = tar.extractfile(member)
    data = file.read() if file else b""
    if len(data) != member.size:
        raise VerificationFailed(f"{member.name} is truncated")
    return data
