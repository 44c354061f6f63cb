"""A folder's candles parsed once into one file that is mapped, not read: training needs no memory for all of them."""

import json
import mmap
import os
from collections.abc import Collection, Iterable, Sequence
from hashlib import sha256
from inspect import getsource
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryFile
from typing import IO, Final, NamedTuple, overload

import numpy as np
import pandas as pd

import models.candles
from models.candles import COLUMNS, Floats, Millis
from training import candle_files, splits
from training.candle_files import Series, candle_paths, read_folder
from training.splits import without_splits

_WORD: Final = 8  # bytes of a timestamp and of a value
_RESIDENT: Final = 64 << 20  # bytes of series handed out before their pages are given back


class _Entry(NamedTuple):
    """Where a series lies: `rows` timestamps from the word `start`, then their candles."""

    symbol: str
    interval: str
    start: int
    rows: int


class _Pages:
    """The mapped file. Arrays stay right for ever; what was read long ago is read again from the file's cache."""

    def __init__(self, file: IO[bytes]) -> None:
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        index = int.from_bytes(self._map[-_WORD:], "little")
        self.entries = [_Entry(*entry) for entry in json.loads(self._map[-_WORD - index : -_WORD])]
        self._words: Floats = np.frombuffer(self._map, np.float64, (len(self._map) - _WORD - index) // _WORD)
        self._gives_back = len(self._map) > _RESIDENT and hasattr(mmap, "MADV_DONTNEED")
        self._handed_out = 0

    def read(self, start: int, rows: int) -> tuple[Millis, Floats]:
        """Timestamps `[rows]` and candles `[rows, 6]`, read-only."""
        self._handed_out += rows * (1 + len(COLUMNS)) * _WORD
        if self._gives_back and self._handed_out > _RESIDENT:
            self._map.madvise(mmap.MADV_DONTNEED)  # or the kernel counts as ours all that it still remembers
            self._handed_out = 0
        candles = start + rows
        words = self._words[candles : candles + rows * len(COLUMNS)]
        return self._words[start:candles].view(np.int64), words.reshape(rows, len(COLUMNS))


class Packed(Sequence[Series]):
    """The series of a packed file, each made of views as it is asked for."""

    def __init__(self, pages: _Pages, entries: Sequence[_Entry] | None = None) -> None:
        self._pages = pages
        self._entries = pages.entries if entries is None else entries

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> Series: ...
    @overload
    def __getitem__(self, index: slice) -> "Packed": ...
    def __getitem__(self, index: int | slice) -> "Series | Packed":
        if isinstance(index, slice):
            return Packed(self._pages, self._entries[index])
        symbol, interval, start, rows = self._entries[index]
        return Series(symbol, interval, *self._pages.read(start, rows))

    @property
    def symbols(self) -> list[str]:
        return [entry.symbol for entry in self._entries]

    def of_interval(self, interval: str) -> "Packed":
        """The series of this interval."""
        return Packed(self._pages, [entry for entry in self._entries if entry.interval == interval])

    def of_symbols(self, symbols: Collection[str]) -> "Packed":
        """The series of these symbols."""
        return Packed(self._pages, [entry for entry in self._entries if entry.symbol in symbols])


def pack(series: Iterable[Series], place: Path | None = None) -> Packed:
    """The series in a file without a name in the folder `place`, which lasts as long as it is used."""
    with TemporaryFile(dir=place) as file:
        _write(file, series)
        return Packed(_Pages(file))


def pack_folder(folder: Path, cache: Path | None = None, *, adjust: bool = False, undo_splits: bool = False) -> Packed:
    """What `candle_files.load` gives of `folder`, bit for bit, or that without suspected splits; its errors too.

    It is kept in `cache`, where there is one, until a candle file or the way they are read changes.
    """
    read = (item for item, _ in read_folder(folder, adjust=adjust))
    series = map(without_splits, read) if undo_splits else read
    if cache is None:
        return pack(series)
    name = sha256(f"{folder.resolve()}\n{adjust}{undo_splits}".encode()).hexdigest()[:16]
    path = cache / f"{name}-{_state(folder)}.candles"
    if not path.exists():
        _replace(path, series)
        for old in set(cache.glob(f"{name}-*.candles")) - {path}:
            old.unlink(missing_ok=True)  # whoever has it mapped keeps it
    with path.open("rb") as file:
        return Packed(_Pages(file))


def _state(folder: Path) -> str:
    """Changes with any candle file of the folder, and with the code that reads them."""
    state = sha256(pd.__version__.encode())
    for module in (candle_files, splits, models.candles):
        state.update(getsource(module).encode())
    for path in candle_paths(folder):
        facts = path.stat()
        state.update(f"{path.name}\n{facts.st_size}\n{facts.st_mtime_ns}\n{facts.st_ctime_ns}\n".encode())
    return state.hexdigest()[:16]


def _replace(path: Path, series: Iterable[Series]) -> None:
    """Write the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            _write(file, series)
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink()
            raise


def _write(file: IO[bytes], series: Iterable[Series]) -> None:
    """Timestamps and candles of each series, then the entries as JSON, then the JSON's length."""
    entries, start = [], 0
    for item in series:
        file.write(np.ascontiguousarray(item.timestamps, np.int64).tobytes())
        file.write(np.ascontiguousarray(item.candles, np.float64).tobytes())
        entries.append(_Entry(item.symbol, item.interval, start, len(item)))
        start += len(item) * (1 + len(COLUMNS))
    index = json.dumps(entries).encode()
    file.write(index + len(index).to_bytes(_WORD, "little"))
    file.flush()
