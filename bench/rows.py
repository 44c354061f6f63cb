"""What a benchmark says: rows of the table, curves under it, and the file beside it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

Better = Literal["higher", "lower"]
SCHEMA_VERSION: Final = 1


@dataclass(frozen=True)
class Row:
    """One number and what it should be."""

    work: str
    against: str
    reached: float
    reach: float
    better: Better
    unit: str
    detail: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not math.isfinite(self.reached):
            raise ValueError(f"{self.work}: {self.reached} is not a measurement")

    @property
    def passed(self) -> bool:
        return self.reached >= self.reach if self.better == "higher" else self.reached <= self.reach

    @property
    def verdict(self) -> str:
        return "reached" if self.passed else "missed"

    def shown(self) -> tuple[str, str]:
        """The number reached and the number to reach, as the table has them."""
        sign = "≥" if self.better == "higher" else "≤"
        return f"{_digits(self.reached)}{self.unit}", f"{sign} {_digits(self.reach)}{self.unit}"


@dataclass(frozen=True)
class Curve:
    """Milliseconds per forecast over one axis, one line per contender."""

    title: str
    axis: str
    values: Sequence[int]
    milliseconds: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Failure:
    """A measurement that could not be taken."""

    name: str
    error: str


@dataclass(frozen=True)
class Report:
    """Everything that one run found."""

    machine: Mapping[str, Any]
    rows: Sequence[Row]
    curves: Sequence[Curve]
    failures: Sequence[Failure]

    def content(self) -> dict[str, Any]:
        """JSON: `rows` of work, reached, reach, better; the rest is detail."""
        return {
            "schema_version": SCHEMA_VERSION,
            "machine": dict(self.machine),
            "rows": [{**asdict(row), "verdict": row.verdict} for row in self.rows],
            "curves": [asdict(curve) for curve in self.curves],
            "failures": [asdict(failure) for failure in self.failures],
        }

    def write(self, folder: Path, name: str) -> Path:
        """Write `<folder>/<name>.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.json"
        path.write_text(json.dumps(self.content(), indent=1, allow_nan=False) + "\n")
        return path


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100 or value == int(value):
        return f"{value:.0f}"
    return f"{value:.3g}"
