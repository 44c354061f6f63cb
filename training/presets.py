"""Fine-tune a version in the store on a folder of candles: a whole recipe, written from a preset."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from string import Template
from typing import Final

from model_store.store import ModelStore
from training.candle_files import Series
from training.packed import pack_folder
from training.recipe import parse_recipe
from training.windows import Part, Split, split_by_fractions

PRESETS: Final[Mapping[str, int]] = {"quick": 100, "full": 1000}  # origins in each part, one per symbol at least
_FOLDER: Final = Path(__file__).parent / "presets"


def write_recipe(
    preset: str,
    store: ModelStore,
    base: str,
    folder: Path,
    *,
    name: str | None = None,
    interval: str | None = None,
    unseen: Sequence[str] = (),
    cache: Path | None = None,
) -> str:
    """The TOML of `preset` that tunes `base` on the candles of `folder`, split where 70 and 85 % of them have passed.

    ValueError or CandleFileError say what does not fit.
    """
    manifest = store.manifest(base)
    template = _FOLDER / f"{manifest.family}-{preset}.toml"
    if not template.exists():
        raise ValueError(f"{base} is of the family {manifest.family}, which cannot be trained")
    series = pack_folder(folder, cache)
    interval = interval or _only_interval(folder, series)
    series = series.of_interval(interval)
    if not series:
        raise ValueError(f"{folder} has no {interval} candles")
    values: dict[str, object] = {
        "name": json.dumps(name or f"{manifest.model}-tuned"),
        "base": json.dumps(base),
        "folder": json.dumps(str(folder)),
        "interval": json.dumps(interval),
        "unseen": json.dumps(list(unseen)),
        "origins": PRESETS[preset],
    }
    text = Template(template.read_text())
    horizon = parse_recipe(text.substitute(values, **_UNSPLIT)).horizon
    split = split_by_fractions(series, 0.7, 0.15, horizon=horizon, unseen=unseen)
    parts: dict[str, Part] = {"val": "val", "test": "test", "unseen": "unseen" if unseen else "test"}
    strides = {f"{key}_stride": _stride(series, split, part, PRESETS[preset]) for key, part in parts.items()}
    moments = {"val_from": _moment(split.val_from), "test_from": _moment(split.test_from)}
    return text.substitute(values, **moments, **strides)


_UNSPLIT: Final = {"val_from": 0, "test_from": 0, "val_stride": 1, "test_stride": 1, "unseen_stride": 1}


def _only_interval(folder: Path, series: Sequence[Series]) -> str:
    found = sorted({item.interval for item in series})
    if len(found) > 1:
        raise ValueError(f"{folder} has candles of {', '.join(found)}: say which with --interval")
    return found[0]


def _stride(series: Sequence[Series], split: Split, part: Part, origins: int) -> int:
    """Candles between origins of which `part` then has about this many."""
    candles = sum(max(0, len(split.targets(item, part)) - split.horizon) for item in series)
    return max(1, round(candles / origins))


def _moment(millis: int) -> str:
    """As TOML has it: the day, and the time of it where that is not midnight."""
    return datetime.fromtimestamp(millis / 1000, UTC).isoformat().removesuffix("T00:00:00+00:00")
