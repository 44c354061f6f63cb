"""Settings that another repository found, a JSON file for each symbol, as the first trials of a search."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from models.quantiles import parse_aggregate
from training.recipe import Knob, Recipe, Value

_COUNTERPARTS: Final[Mapping[str, tuple[str, Callable[[Any], Value]]]] = {
    "temperature": ("temperature", float),
    "T": ("temperature", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", int),
    "samples": ("samples", int),
    "sample_count": ("samples", int),
    "num_samples": ("samples", int),
    "max_context": ("lookback", int),
    "context_length": ("lookback", int),
    "lookback": ("lookback", int),
    "aggregate": ("aggregate", str),
}
_LABELS: Final = {"name"}  # of the settings as a whole
_LOOKBACK: Final = "serving.lookback"


@dataclass(frozen=True)
class Imported:
    """What one file says; `left` are its settings that have no counterpart here."""

    path: Path
    symbol: str
    family: str | None
    settings: Mapping[str, Value]  # by serving.<name>
    left: tuple[str, ...]


def read_imported(source: Path) -> list[Imported]:
    """The JSON file, or each of a folder; ValueError names one that says nothing of use, or a folder without any."""
    found = [_read(path) for path in ([source] if source.is_file() else sorted(source.glob("*.json")))]
    if not found:
        raise ValueError(f"{source} holds no .json file")
    return found


def _read(path: Path) -> Imported:
    try:
        content = json.loads(path.read_text())
        config = content.get("config", content)
        known = {name: value for name, value in config.items() if name in _COUNTERPARTS and value is not None}
        settings = {f"serving.{_COUNTERPARTS[name][0]}": _COUNTERPARTS[name][1](value) for name, value in known.items()}
        parse_aggregate(str(settings.get("serving.aggregate", "median")))
        left = tuple(sorted(config.keys() - _COUNTERPARTS.keys() - _LABELS)) if "config" in content else ()
        symbol, family = str(content.get("symbol") or path.stem).upper(), content.get("model")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no file of settings: {error}") from error
    if not settings:
        raise ValueError(f"{path} has no setting of {', '.join(_COUNTERPARTS)}")
    return Imported(path, symbol, family if family in ("toto", "kronos") else None, settings, left)


def first_trials(
    imported: Sequence[Imported],
    recipe: Recipe,
    space: Mapping[str, Knob],
    current: Mapping[str, Value],
    lookbacks: tuple[int, int],
    warn: Callable[[str], None],
) -> list[dict[str, Value]]:
    """Whole trials of what was imported, with `current` for all it does not say; the lookback stays within bounds.

    What cannot be tried is told to `warn`. ValueError where the recipe has no such value.
    """
    trials: list[dict[str, Value]] = []
    for each in imported:
        if each.family not in (None, recipe.family):
            warn(f"{each.path}: left out, it is of {each.family}")
            continue
        unused = [*each.left, *(name for name in each.settings if name not in space)]
        if unused:
            warn(f"{each.path}: not tried, nothing here is searched by that name: {', '.join(unused)}")
        settings = {name: value for name, value in ({**current, **each.settings}).items() if name in space}
        if _LOOKBACK in settings:
            wanted = int(settings[_LOOKBACK])
            settings[_LOOKBACK] = min(max(wanted, lookbacks[0]), lookbacks[1])
            if settings[_LOOKBACK] != wanted:
                warn(f"{each.path}: a lookback of {wanted} becomes {settings[_LOOKBACK]}, for the model's context")
        try:
            recipe.with_settings(settings)
        except ValueError as error:
            raise ValueError(f"{each.path}: {error}") from error
        if settings not in trials:
            trials.append(settings)
    return trials


def widened(space: Mapping[str, Knob], trials: Sequence[Mapping[str, Value]]) -> dict[str, Knob]:
    """The space with all that the trials have in it."""
    return {name: _widened(knob, [trial[name] for trial in trials if name in trial]) for name, knob in space.items()}


def _widened(knob: Knob, values: Sequence[Value]) -> Knob:
    if knob.choices:
        return Knob(choices=tuple(dict.fromkeys([*knob.choices, *values])))
    ends: list[Any] = [knob.low, knob.high, *values]
    return Knob(low=min(ends), high=max(ends), log=knob.log)
