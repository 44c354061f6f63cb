"""Backups: one tar with what Redis holds and the whole model store, as of one instant.

The instant is that of Redis' own snapshot, which the server makes as for a new replica: that costs it a fork, and works
for the private one as for one behind a URL, unless that forbids SYNC. Versions of the store never change; its aliases
are read before the snapshot and had not moved after it. The archive holds

- `history.rdb`                                       the snapshot: of the whole server, and Redis itself can load it,
- `store/<model>/<version>/<file>`                    every version, without its runtimes, which are built anew,
- `store/<model>/{aliases,audit,signatures}/<file>`,
- `index.json`                                        the instant, and size and SHA-256 of every file above,
- `index.sha256`                                      its own hash; what ends before it is no backup.

The file of API keys stays out: an old one, put back, would make keys count again that were revoked meanwhile.
"""

import asyncio
import contextlib
import hashlib
import io
import os
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import islice
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from redis import ConnectionPool
from redis.asyncio import Redis
from redis.exceptions import RedisError

from model_store.files import StoreError, VerificationFailed, entries_of
from model_store.manifest import MANIFEST, FileEntry, Manifest, canonical_json
from model_store.store import ALIASES, BESIDE, ModelStore, parse_manifest
from model_store.tar import add, bytes_of, parts_of, plain_members
from service.services import store_of
from service.settings import Settings
from service.snapshot import Kept, Snapshot, payloads
from service.state import REDIS_ERRORS, PrivateRedis, StateError, connect, raw

HISTORY: Final = "history.rdb"
INDEX, DIGEST = "index.json", "index.sha256"
_STORE: Final = "store"
_OURS: Final = b"cc:1:"
_PASSING: Final = (b"cc:1:f:", b"cc:1:quota:")  # the cache and what is spent: worth nothing on another day
_STAGED: Final = b"cc:restored:"  # before keys that are not in use yet
_SECONDS: Final = 120.0  # that one step of Redis may take
_AT_ONCE: Final = 500  # keys
_TRIES: Final = 5
_CHUNK: Final = 2**20


class RestoreRefused(RuntimeError):
    """Something is there already; the message says what."""


class Index(BaseModel):
    """What an archive says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    at: AwareDatetime  # by the clock of Redis, whole seconds
    database: int = Field(ge=0)  # the number of ours in the snapshot
    files: dict[str, FileEntry]

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(entry.bytes for entry in self.files.values())


async def backup(settings: Settings, path: Path) -> Index:
    """Write everything to `path`, whole or not at all, while the service runs or while it does not."""
    if path.exists():
        raise FileExistsError(f"{path} exists")
    if settings.redis_url is None and not (settings.home / "redis").is_dir():
        raise StateError(f"{settings.home} holds no history: name the service's home in CANDLECAST_HOME")
    store = store_of(settings)
    with tempfile.TemporaryDirectory(prefix=".backup-", dir=path.parent) as folder:
        history, draft = Path(folder) / HISTORY, Path(folder) / "draft.tar"
        async with _redis(settings, may_be_shared=True) as client:
            database = int(client.connection_pool.connection_kwargs.get("db") or 0)
            for _ in range(_TRIES):
                stamps = _stamps(store)
                versions = [f"{model}@{version}" for model in stamps for version in store.versions(model)]
                beside = {model: store.beside(model) for model in stamps}
                at = await asyncio.to_thread(_take_snapshot, settings, history)
                if _stamps(store) == stamps:
                    break
            else:
                raise StoreError("versions were promoted all the while: try again")
        index = await asyncio.to_thread(_write, draft, at, database, history, _members(store, versions, beside))
        draft.rename(path)
    return index


async def restore(settings: Settings, path: Path, *, replace: bool = False) -> Index:
    """Put back all that `path` holds, once all of it is verified, before the service is started.

    RestoreRefused where there is a history or another alias already, unless it may `replace` them; versions are added
    to those that are there. After a failure, history and aliases are as they were.
    """
    with _opened(path) as archive:
        store = store_of(settings)
        if not replace:
            _refuse_other_aliases(store, archive)
        async with _redis(settings) as target:
            if not replace and [key async for keys in _keys(target, _OURS) for key in keys]:
                raise RestoreRefused("there is a history already: --replace puts the archive's in its place")
            async with contextlib.AsyncExitStack() as undo:
                await _drop(target, _STAGED)  # of one that was killed
                undo.push_async_callback(_drop, target, _STAGED)
                await _stage(archive, target)
                archive.put_versions(store)
                for model, found in archive.beside.items():
                    undo.callback(store.put_beside, model, store.beside(model))
                    store.put_beside(model, found)
                await _put_in_use(target)
                undo.pop_all()
    return archive.index


class _Archive:
    """A verified archive; what its names say is checked here, before anything is written."""

    def __init__(self, tar: tarfile.TarFile, index: Index) -> None:
        self.index = index
        self._tar = tar
        self._manifests: list[Manifest] = []
        self.beside: dict[str, dict[str, bytes]] = {}  # by model
        for name in sorted(index.files.keys() - {HISTORY}, key=lambda name: not name.endswith(f"/{MANIFEST}")):
            _, model, kind, file = parts_of(tar.getmember(name))
            if file == MANIFEST:
                self._manifests.append(parse_manifest(self._bytes(name), model, kind))
                self.beside.setdefault(model, {})
            elif kind in BESIDE:
                self.beside[model][f"{kind}/{file}"] = self._bytes(name)
        for each in self._manifests:
            home = f"{_STORE}/{each.model}/{each.version}"
            if {name: index.files.get(f"{home}/{name}") for name in each.files} != each.files:
                raise VerificationFailed(f"{home} is not what its {MANIFEST} lists")

    def put_versions(self, store: ModelStore) -> None:
        """Add all that are not there yet."""
        for each in self._manifests:
            home = f"{_STORE}/{each.model}/{each.version}"
            contents = {name: self._bytes(f"{home}/{name}") for name in (*each.files, MANIFEST)}
            store.put_files(each, contents, reason=None)

    @contextlib.contextmanager
    def history(self) -> Iterator[Snapshot]:
        """The snapshot, where it lies in the archive."""
        with open(self._tar.name, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:  # type: ignore[arg-type]
            yield Snapshot(data, self._tar.getmember(HISTORY).offset_data)

    def _bytes(self, name: str) -> bytes:
        return bytes_of(self._tar, self._tar.getmember(name))


def _stamps(store: ModelStore) -> dict[str, str]:
    return {model: store.stamp(model) for model in store.models()}


def _refuse_other_aliases(store: ModelStore, archive: _Archive) -> None:
    for model, found in archive.beside.items():
        for path, data in store.beside(model).items():
            if path.startswith(f"{ALIASES}/") and found.get(path) != data:
                raise RestoreRefused(f"{model} has another {Path(path).stem} already: --replace gives it the archive's")


# -- the archive -------------------------------------------------------------------------------------


def _write(path: Path, at: datetime, database: int, history: Path, members: Iterator[tuple[str, bytes]]) -> Index:
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            with open(history, "rb") as snapshot:
                digest = hashlib.file_digest(snapshot, "sha256").hexdigest()
                first = tarfile.TarInfo(HISTORY)
                first.size = snapshot.tell()
                snapshot.seek(0)
                tar.addfile(first, snapshot)
            entries = {HISTORY: FileEntry(bytes=first.size, sha256=digest)}
            for name, data in members:
                add(tar, name, data)
                entries |= entries_of({name: data})
            index = Index(at=at, database=database, files=entries)
            told = canonical_json(index.model_dump(mode="json"))
            add(tar, INDEX, told)
            add(tar, DIGEST, hashlib.sha256(told).hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())
    return index


def _members(
    store: ModelStore, versions: Sequence[str], beside: Mapping[str, Mapping[str, bytes]]
) -> Iterator[tuple[str, bytes]]:
    """Every file of the store, by its name in the archive, verified; a version at a time."""
    for reference in versions:
        manifest, contents = store.files(reference)
        for name in sorted(contents):
            yield f"{_STORE}/{manifest.model}/{manifest.version}/{name}", contents[name]
    for model, found in beside.items():
        for path in sorted(found):
            yield f"{_STORE}/{model}/{path}", found[path]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[_Archive]:
    """VerificationFailed, beginning with the path, whatever shows that it is no backup."""
    with contextlib.ExitStack() as stack:
        try:
            tar = stack.enter_context(tarfile.open(path, mode="r:"))
            archive = _Archive(tar, _verified(tar))
        except (tarfile.TarError, EOFError, KeyError, ValueError, OverflowError) as error:
            raise VerificationFailed(f"{path} is damaged, or no backup: {error}") from error
        except VerificationFailed as error:
            raise VerificationFailed(f"{path}: {error}") from error
        yield archive


def _verified(tar: tarfile.TarFile) -> Index:
    """The index, once every file was hashed; VerificationFailed unless it lists these and no others."""
    found: dict[str, FileEntry] = {}
    for member in plain_members(tar):
        if member.name in found:
            raise VerificationFailed(f"{member.name} is there twice")
        with tar.extractfile(member) or io.BytesIO() as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        found[member.name] = FileEntry(bytes=member.size, sha256=digest)
    if not {HISTORY, INDEX, DIGEST} <= found.keys():
        raise VerificationFailed("it is cut off, or no backup")
    if bytes_of(tar, tar.getmember(DIGEST)).decode("ascii", "replace") != found.pop(INDEX).sha256:
        raise VerificationFailed(f"{INDEX} is not what was stored")
    del found[DIGEST]
    index = Index.model_validate_json(bytes_of(tar, tar.getmember(INDEX)))
    odd = ", ".join(sorted(name for name, _ in found.items() ^ index.files.items())[:8])
    if odd:
        raise VerificationFailed(f"missing, unlisted or not what was stored: {odd}")
    return index


# -- Redis -------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _redis(settings: Settings, *, may_be_shared: bool = False) -> AsyncIterator[Redis]:
    """The server that the settings mean: a private one is started, unless a service runs that it may be shared with."""
    private = PrivateRedis(settings.home / "redis")
    client = connect(_url(settings), _SECONDS)
    try:
        if settings.redis_url is None and not (may_be_shared and await _answers(client)):
            await private.start(client)
        yield client
    except RedisError as error:
        raise StateError(f"Redis: {error}") from error
    finally:
        await client.aclose()
        await private.stop()


def _url(settings: Settings) -> str:
    return settings.redis_url or PrivateRedis(settings.home / "redis").url


async def _answers(client: Redis) -> bool:
    with contextlib.suppress(*REDIS_ERRORS):
        return bool(await client.ping())
    return False


def _take_snapshot(settings: Settings, path: Path) -> datetime:
    """Have the server send all that it holds, as to a new replica, and write it to `path`; the instant of that."""
    connection: Any = ConnectionPool.from_url(_url(settings), protocol=2, socket_timeout=_SECONDS).make_connection()
    connection.connect()
    try:
        connection.send_packed_command([b"SYNC\r\n"], check_health=False)
        with connection._sock.makefile("rb") as replies, open(path, "wb") as file:
            told = b"\n"
            while told == b"\n":  # while the snapshot is made
                told = replies.readline()
            if not told.startswith(b"$") or told.startswith(b"$EOF"):
                raise StateError(f"Redis makes no snapshot: {told[:200].decode(errors='replace').strip()}")
            left = int(told[1:])
            while left:
                data = replies.read(min(left, _CHUNK))
                if not data:
                    raise StateError("Redis broke off its snapshot")
                file.write(data)
                left -= len(data)
    finally:
        connection.disconnect()
        if settings.redis_url is None:  # the private server never reads the copy that it leaves
            (settings.home / "redis" / "dump.rdb").unlink(missing_ok=True)
    with open(path, "rb") as snapshot, mmap(snapshot.fileno(), 0, access=ACCESS_READ) as data:
        read = Snapshot(data)
        deque(read.keys(0), maxlen=0)  # ValueError now, and not when it is needed
    return datetime.fromtimestamp(read.made_at, UTC)


async def _keys(client: Redis, prefix: bytes) -> AsyncIterator[list[bytes]]:
    """Those that begin so, a few at a time."""
    cursor: int | None = None
    while cursor != 0:
        cursor, keys = raw(await client.scan(cursor or 0, match=prefix + b"*", count=_AT_ONCE))
        yield [key for key in keys if not key.startswith(_PASSING)]


async def _stage(archive: _Archive, target: Redis) -> None:
    """Write all that is ours, under names that nobody reads."""
    now = time.time_ns() // 1_000_000
    with archive.history() as snapshot:
        ours = (each for each in snapshot.keys(archive.index.database) if _is_ours(each))
        kept = (each for each in ours if not 0 < each.expires_at <= now)
        while part := list(islice(kept, _AT_ONCE)):
            writing = target.pipeline(transaction=False)
            for each, payload in zip(part, payloads([each.value for each in part], snapshot.version), strict=True):
                writing.restore(_STAGED + each.key, each.expires_at, payload, replace=True, absttl=each.expires_at > 0)
            await writing.execute()


def _is_ours(kept: Kept) -> bool:
    return kept.key.startswith(_OURS) and not kept.key.startswith(_PASSING)


async def _put_in_use(target: Redis) -> None:
    """Have what was staged in the place of all that is ours, in one step."""
    step = target.pipeline(transaction=True)
    async for keys in _keys(target, _OURS):
        if keys:
            step.unlink(*keys)
    for key in {key async for keys in _keys(target, _STAGED) for key in keys}:  # a scan may tell one twice
        step.rename(key, key.removeprefix(_STAGED))
    await step.execute()


async def _drop(target: Redis, prefix: bytes) -> None:
    async for keys in _keys(target, prefix):
        if keys:
            await target.unlink(*keys)
