"""Redis' snapshots cut into keys, each in the form that RESTORE takes: redis.io, "RDB file format" and DUMP.

So a snapshot goes into any server that is not older than the one that made it, and needs none beside it to be read.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from mmap import mmap
from typing import Final

import numpy as np

_MAGIC: Final = b"REDIS"
_AUX, _SELECT, _SIZES, _IN_MS, _IN_SECONDS, _END = 0xFA, 0xFE, 0xFB, 0xFC, 0xFD, 0xFF
_FREQUENCY, _IDLE, _FUNCTION = 0xF9, 0xF8, 0xF5
_ONE_STRING: Final = {0, 9, 10, 11, 12, 13, 16, 17, 20}  # strings, and what is packed into one
_STRINGS: Final = {1: 1, 2: 1, 4: 2, 14: 1}  # of each element: lists, sets, hashes, quicklists
_SORTED_SETS, _QUICKLISTS = 5, 18
_POLYNOMIAL: Final = 0x95AC9329AC4BC9B5  # CRC-64 of Jones, reflected


@dataclass(frozen=True)
class Kept:
    """One key of a snapshot."""

    key: bytes
    value: bytes  # its type, and the value as the snapshot has it
    expires_at: int  # UTC ms; 0: never


@dataclass
class Snapshot:
    """A snapshot that begins at `place` of `data`. ValueError where it holds what is not known here."""

    data: mmap
    place: int = 0

    def __post_init__(self) -> None:
        if self._take(5) != _MAGIC:
            raise ValueError("this is no snapshot of Redis")
        self.version = int(self._take(4))
        self.made_at = 0  # UTC seconds

    def keys(self, database: int) -> Iterator[Kept]:
        """Those of one database; to be read once."""
        current, expires_at = 0, 0
        while (kind := self._byte()) != _END:
            if kind == _AUX:
                self._note(self._string(), self._string())
            elif kind == _SELECT:
                current = self._length()[0]
            elif kind == _SIZES:
                self._length(), self._length()
            elif kind == _IN_MS:
                expires_at = self._number("<q")
            elif kind == _IN_SECONDS:
                expires_at = 1000 * self._number("<i")
            elif kind == _FREQUENCY:
                self._byte()
            elif kind == _IDLE:
                self._length()
            elif kind == _FUNCTION:
                self._string()
            else:
                key, begin = self._string(), self.place
                self._pass_value(kind, key)
                if current == database:
                    yield Kept(key, bytes([kind]) + self.data[begin : self.place], expires_at)
                expires_at = 0

    def _note(self, name: bytes, value: bytes) -> None:
        if name == b"ctime":
            self.made_at = int(value)

    def _pass_value(self, kind: int, key: bytes) -> None:
        if kind in _ONE_STRING:
            self._pass_string()
            return
        if kind not in {*_STRINGS, _SORTED_SETS, _QUICKLISTS}:
            raise ValueError(f"{key[:80]!r} is of a type that is not ours, {kind}: a Redis of our own holds none")
        for _ in range(self._length()[0]):
            if kind == _QUICKLISTS:
                self._length()
            for _ in range(_STRINGS.get(kind, 1)):
                self._pass_string()
            if kind == _SORTED_SETS:
                self.place += 8  # the score

    def _pass_string(self) -> None:
        size, is_encoded = self._length()
        if is_encoded and size == 3:  # compressed
            size = self._length()[0]
            self._length()
        elif is_encoded:
            size = 1 << size
        self.place += size

    def _string(self) -> bytes:
        """A string; a number as its digits."""
        size, is_encoded = self._length()
        if not is_encoded:
            return self._take(size)
        if size > 2:
            length, whole = self._length()[0], self._length()[0]
            return _decompressed(self._take(length), whole)
        return b"%d" % self._number(("<b", "<h", "<i")[size])

    def _length(self) -> tuple[int, bool]:
        """A length; or, and then True, the number of an encoding."""
        first = self._byte()
        if first >> 6 == 0:
            return first, False
        if first >> 6 == 1:
            return (first & 63) << 8 | self._byte(), False
        if first >> 6 == 3:
            return first & 63, True
        return self._number(">I" if first == 0x80 else ">Q"), False

    def _number(self, form: str) -> int:
        (number,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return int(number)

    def _byte(self) -> int:
        return self._take(1)[0]

    def _take(self, size: int) -> bytes:
        found = self.data[self.place : self.place + size]
        if len(found) < size:
            raise ValueError("the snapshot ends early")
        self.place += size
        return found


def payloads(values: Sequence[bytes], version: int) -> list[bytes]:
    """What RESTORE takes: each value with the version of its snapshot and a checksum."""
    framed = [value + struct.pack("<H", version) for value in values]
    return [each + struct.pack("<Q", checksum) for each, checksum in zip(framed, _checksums(framed), strict=True)]


def _checksums(values: Sequence[bytes]) -> list[int]:
    """CRC-64 of each; all at once, from the left, where zeros before a value change nothing."""
    longest = max(map(len, values), default=0)
    columns = np.zeros((longest, len(values)), np.uint8)
    for place, value in enumerate(values):
        columns[longest - len(value) :, place] = np.frombuffer(value, np.uint8)
    found = np.zeros(len(values), np.uint64)
    for column in columns:
        found = _TABLE[(found ^ column) & np.uint64(255)] ^ (found >> np.uint64(8))
    return [int(each) for each in found]


def _table() -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    table = np.arange(256, dtype=np.uint64)
    for _ in range(8):
        table = (table >> np.uint64(1)) ^ (table & np.uint64(1)) * np.uint64(_POLYNOMIAL)
    return table


_TABLE: Final = _table()


def _decompressed(data: bytes, size: int) -> bytes:
    """LZF: runs of literals, and copies of what came before; keys of more than 20 bytes may be compressed."""
    found, place = bytearray(), 0
    while place < len(data):
        control = data[place]
        place += 1
        if control < 32:
            found += data[place : place + control + 1]
            place += control + 1
            continue
        length = control >> 5
        if length == 7:
            length += data[place]
            place += 1
        back = len(found) - ((control & 31) << 8 | data[place]) - 1
        place += 1
        for step in range(length + 2):
            found.append(found[back + step])
    if len(found) != size:
        raise ValueError("a key is damaged")
    return bytes(found)
