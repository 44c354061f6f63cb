"""Chunks of lines -> the service: every series by itself, with an account of what became of the candles."""

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from feeds.files import BadLine, Chunk, Part, Reader, chunks
from feeds.put import COUNTS, NoAnswer, Refused, Service

_TELLING: Final = 3  # candles whose steps tell the interval: two may lie on both sides of a weekend


class IngestError(RuntimeError):
    """The input ends here; the message names the line where one is at fault."""


@dataclass
class Tally:
    """What became of the lines so far."""

    lines: int = 0
    bad: int = 0
    first_bad: BadLine | None = None
    sent: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def as_json(self) -> dict[str, int]:
        told = {name: self.counts[name] for name in COUNTS if name != "received"}
        return {"lines": self.lines, "sent": self.sent, **told, "not_closed": self.not_closed, "bad": self.bad}

    @property
    def not_closed(self) -> int:
        return self.sent - self.counts["received"]

    def __str__(self) -> str:
        parts = [f"{self.sent} candles sent: {self.counts['new']} new"]
        others = {name: self.counts[name] for name in COUNTS if name not in ("received", "new")}
        others |= {"not closed yet": self.not_closed}
        parts += [f"{count} {name}" for name, count in others.items() if count]
        return ", ".join(parts)


class Ingest:
    """Sends candles on as they come; a series whose interval nobody named waits until three candles tell it."""

    def __init__(self, reader: Reader, service: Service, *, skip_bad: bool = False) -> None:
        self.tally = Tally()
        self._reader = reader
        self._service = service
        self._skip_bad = skip_bad
        self._intervals: dict[str, str] = {}
        self._held: dict[str, Part] = {}

    def run(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """Every chunk once its candles are stored; IngestError at the first that are not."""
        for chunk in chunks:
            self._take(chunk)
            yield chunk
        for part in self._held.values():
            self._send(part)

    def _take(self, chunk: Chunk) -> None:
        parts, bad = self._reader.read(chunk.lines)
        self.tally.lines += len(chunk.lines)
        if bad and not self._skip_bad:
            parts = [part.before(bad[0].number) for part in parts]
        for part in parts:
            self._hold_or_send(part)
        if bad and not self._skip_bad:
            raise IngestError(f"{self._reader.name} line {bad[0].number} {bad[0].reason}; --skip-bad leaves it out")
        self.tally.bad += len(bad)
        self.tally.first_bad = self.tally.first_bad or next(iter(bad), None)

    def _hold_or_send(self, part: Part) -> None:
        known = part.interval or self._intervals.get(part.symbol)
        if known is None and part.symbol in self._held:
            part = self._held.pop(part.symbol).with_later(part)
        if known is None and len(part) < _TELLING:
            self._held[part.symbol] = part
        elif len(part):
            self._send(part, known)

    def _send(self, part: Part, interval: str | None = None) -> None:
        try:
            put = self._service.put(part.symbol, part.timestamps, part.candles, interval)
        except Refused as error:
            where = f" line {part.lines[error.row]}" if error.row is not None and error.row < len(part) else ""
            raise IngestError(f"{self._reader.name}{where}: {error}") from error
        except NoAnswer as error:
            raise IngestError(f"{error}") from error
        self._intervals.setdefault(part.symbol, put.interval)
        self.tally.sent += len(part)
        self.tally.counts.update(put.counts)


def ingest_all(ingest: Ingest, file: Path | None, hear: Callable[[float | None, str], None]) -> None:
    """All of a file, or of standard input until it ends; `hear` is told the share of the file, and the tally."""
    size = file.stat().st_size if file else None
    with file.open("rb") if file else nullcontext(sys.stdin.buffer) as source:
        for chunk in ingest.run(chunks(source.fileno())):
            hear(chunk.read / size if size else None, f"{ingest.tally}")
