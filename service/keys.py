"""API keys: what one looks like, and the file that knows each by its hash alone.

A key is `cc_<env>_<kid>_<secret><check>`: a word such as live or test, the public name that it is listed by, 43 base-62
digits (256 bits) that nobody keeps but its holder, and the CRC-32 of all that in 8 hexadecimal digits, so that a
mistyped key is known as one, and a scanner of leaked secrets takes nothing else for a key.

The file is one of the machine's or a mounted secret, and not in Redis: a key must count while Redis is down and after
it was flushed. Beside it lies the pepper that the hashes (BLAKE2b) are keyed with. One fast hash is enough: a secret of
256 bits cannot be guessed, and a slow one would let strangers keep the service busy.
"""

import contextlib
import fcntl
import hashlib
import hmac
import os
import re
import secrets
import string
import zlib
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    model_validator,
)

Scope = Literal["forecast", "ingest", "admin"]
Auth = Literal["auto", "on", "off"]  # whether keys are asked for; auto: once there are some

KEYS_FILE: Final = "keys.json"
PEPPER_FILE: Final = "keys.pepper"
_DIGITS: Final = string.digits + string.ascii_letters
_FORM: Final = re.compile(rb"(cc_[a-z0-9]{1,16}_([0-9A-Za-z]{10})_[0-9A-Za-z]{43})([0-9a-f]{8})")
_PATTERN: Final = re.compile(r"[A-Z0-9^*?][A-Z0-9._^=*?-]{0,31}")
_SECONDS: Final = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
_QUOTA: Final = re.compile(rf"(\d{{1,15}})/({'|'.join(_SECONDS)})")


class KeysUnreadable(RuntimeError):
    """The file of keys, or its pepper, is not what `candlecast keys` writes; the message says what to do."""


class Quota(BaseModel):
    """So many candles in any window of so many seconds, about."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    candles: PositiveInt
    seconds: PositiveInt

    def __str__(self) -> str:
        return f"{self.candles}/{next((name for name, its in _SECONDS.items() if its == self.seconds), self.seconds)}"


def parse_quota(text: str) -> Quota:
    """`100000/minute`; ValueError if it is nothing of the kind."""
    found = _QUOTA.fullmatch(text.strip())
    if found is None or not int(found[1]):
        raise ValueError(f"{text!r} is no quota: write candles per second, minute, hour or day, such as 100000/minute")
    return Quota(candles=int(found[1]), seconds=_SECONDS[found[2]])


def _symbol_pattern(text: str) -> str:
    """`btc/*` as `BTC-*`; ValueError if no symbol could look like it."""
    pattern = re.sub(r"[/:]", "-", text).upper() if text.isascii() else ""
    if not _PATTERN.fullmatch(pattern):
        raise ValueError(f"{text!r} is no pattern of symbols: write AAPL, BTC-* or ?SPX")
    return pattern


class Grant(BaseModel):
    """What its holder may do. `name` is the client's: keys of one name share their quota."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    env: str = Field("live", pattern=r"^[a-z0-9]{1,16}$")
    scopes: tuple[Scope, ...] = Field(min_length=1)
    symbols: tuple[Annotated[str, BeforeValidator(_symbol_pattern)], ...] = ()  # none: every symbol
    quota: Quota | None = None

    @model_validator(mode="after")
    def _admin_is_of_all(self) -> "Grant":
        if self.symbols and "admin" in self.scopes:
            raise ValueError("what an admin does concerns every symbol: give it no patterns of symbols")
        return self

    def covers(self, symbol: str) -> bool:
        """Whether a normalised symbol is one that it is for."""
        return not self.symbols or any(fnmatchcase(symbol, pattern) for pattern in self.symbols)


def grant(**fields: object) -> Grant:
    """A grant of these fields; ValueError in one line if they make none."""
    try:
        return Grant.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        raise ValueError(": ".join([*map(str, first["loc"][:1]), first["msg"].removeprefix("Value error, ")])) from None


class ApiKey(BaseModel):
    """What the file says of a key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kid: str
    grant: Grant
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = None
    revoked_at: AwareDatetime | None = None
    hash: str = Field(repr=False)

    def has_expired(self, now: datetime) -> bool:
        """Whether its time is over."""
        return self.expires_at is not None and self.expires_at <= now


class Keys:
    """The keys that were not revoked, at one reading of the file."""

    def __init__(self, pepper: bytes, keys: Iterable[ApiKey] = ()) -> None:
        self._pepper = pepper
        self._keys = {key.kid: key for key in keys if key.revoked_at is None}
        self._nobodys = _hash(pepper, secrets.token_bytes(32))

    def find(self, key: bytes) -> ApiKey | None:
        """Whose key it is; None, after the same work, where its name is unknown or revoked or its secret is wrong."""
        form = _FORM.fullmatch(key)
        known = self._keys.get(form[2].decode()) if form else None
        is_right = hmac.compare_digest(_hash(self._pepper, key), known.hash if known else self._nobodys)
        return known if is_right else None

    def named(self, kid: str) -> ApiKey | None:
        """The key of a public name, if there is one that was not revoked."""
        return self._keys.get(kid)

    def beside(self, key: str, record: ApiKey) -> "Keys":
        """These and one more."""
        known = record.model_copy(update={"hash": _hash(self._pepper, key.encode())})
        return Keys(self._pepper, [*self._keys.values(), known])


def is_wellformed(key: bytes) -> bool:
    """Whether these bytes can be a key at all: of its form, and not mistyped."""
    found = _FORM.fullmatch(key)
    return found is not None and _check(found[1]) == found[3]


class _Contents(BaseModel):
    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    pepper: str  # a hash of it: without its own one a file would deny everybody
    keys: tuple[ApiKey, ...] = ()


class KeyFile:
    """A file of keys, with its pepper beside it. Every change replaces the file in one step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pepper = path.with_name(PEPPER_FILE)

    def read(self) -> Keys:
        """The keys that count; KeysUnreadable or FileNotFoundError."""
        text = self.path.read_bytes()
        pepper = self._read_pepper()
        return Keys(pepper, self._parse(text, pepper).keys)

    def all(self) -> tuple[ApiKey, ...]:
        """Every key that was made, those that no longer count too."""
        return self._parse(self.path.read_bytes(), self._read_pepper()).keys if self.path.exists() else ()

    def make(self, grant: Grant, lasts: timedelta | None = None) -> tuple[str, ApiKey]:
        """A new key, which is told this once, and what the file knows of it."""
        now = _now()
        with self._changing() as (pepper, keys):
            secret, key = make_key(pepper, grant, now, now + lasts if lasts else None)
            keys.append(key)
        return secret, key

    def rotate(self, kid: str, overlap: timedelta) -> tuple[str, ApiKey]:
        """A key that may do what `kid` may, which itself goes on for `overlap`; LookupError if it counts no more."""
        now = _now()
        with self._changing() as (pepper, keys):
            old = keys[place := _place(keys, kid)]
            if old.revoked_at or old.has_expired(now):
                raise LookupError(f"{kid} does not count any more: make a new key")
            expires_at = old.expires_at and now + (old.expires_at - old.created_at)
            secret, key = make_key(pepper, old.grant, now, expires_at)
            ends = min(now + overlap, old.expires_at or now + overlap)
            keys[place] = old.model_copy(update={"expires_at": ends})
            keys.append(key)
        return secret, key

    def revoke(self, kid: str) -> ApiKey:
        """End a key now; again changes nothing. LookupError if there is none of that name."""
        with self._changing() as (_, keys):
            old = keys[place := _place(keys, kid)]
            keys[place] = revoked = old.model_copy(update={"revoked_at": old.revoked_at or _now()})
        return revoked

    @contextlib.contextmanager
    def _changing(self) -> Iterator[tuple[bytes, list[ApiKey]]]:
        """The pepper, and the keys as they will be written; one process at a time."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            _write_privately(self._pepper, secrets.token_hex(32).encode(), os.O_EXCL)
        with self._pepper.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            pepper, keys = self._read_pepper(), list(self.all())
            yield pepper, keys
            contents = _Contents(pepper=_fingerprint(pepper), keys=tuple(keys))
            beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            _write_privately(beside, contents.model_dump_json(indent=2, exclude_none=True).encode() + b"\n", os.O_TRUNC)
            beside.replace(self.path)

    def _read_pepper(self) -> bytes:
        try:
            pepper = bytes.fromhex(self._pepper.read_text())
        except (OSError, ValueError) as error:
            raise KeysUnreadable(f"{self._pepper} must lie beside {self.path}: without it no key counts") from error
        if not 16 <= len(pepper) <= hashlib.blake2b.MAX_KEY_SIZE:
            raise KeysUnreadable(f"{self._pepper} is not one that `candlecast keys make` wrote")
        return pepper

    def _parse(self, text: bytes, pepper: bytes) -> _Contents:
        try:
            contents = _Contents.model_validate_json(text)
        except ValidationError as error:
            where = "/".join(str(part) for part in error.errors(include_input=False)[0]["loc"])
            raise KeysUnreadable(f"{self.path} is no file of keys (at {where or 'its start'})") from None
        if not hmac.compare_digest(contents.pepper, _fingerprint(pepper)):
            raise KeysUnreadable(f"{self._pepper} is not the one that {self.path} was written with")
        return contents


def make_key(pepper: bytes, grant: Grant, now: datetime, expires_at: datetime | None = None) -> tuple[str, ApiKey]:
    """A key that was never told before, and its record."""
    kid = _drawn(10)
    begin = f"cc_{grant.env}_{kid}_{_drawn(43)}".encode()
    key = begin + _check(begin)
    return key.decode(), ApiKey(kid=kid, grant=grant, created_at=now, expires_at=expires_at, hash=_hash(pepper, key))


def _drawn(digits: int) -> str:
    return "".join(secrets.choice(_DIGITS) for _ in range(digits))


def _check(begin: bytes) -> bytes:
    return b"%08x" % zlib.crc32(begin)


def _hash(pepper: bytes, key: bytes) -> str:
    return hashlib.blake2b(key, key=pepper, digest_size=32).hexdigest()


def _fingerprint(pepper: bytes) -> str:
    return hashlib.sha256(b"pepper of a file of keys" + pepper).hexdigest()


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _place(keys: list[ApiKey], kid: str) -> int:
    for place, key in enumerate(keys):
        if key.kid == kid:
            return place
    raise LookupError(f"no key is called {kid}: `candlecast keys list` shows them")


def _write_privately(path: Path, data: bytes, how: int) -> None:
    """Only its owner may read it, from its first byte on."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | how, 0o600)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
