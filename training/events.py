"""The lines of a training.log as TensorBoard shows them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class Events:
    """One event file: every number of a line is a scalar at its step, under its phase."""

    def __init__(self, folder: Path, lines: Iterable[Mapping[str, Any]]) -> None:
        """Put `lines` in the place of what `folder` has; RuntimeError without the package that writes the format."""
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise RuntimeError("event files need pip install 'candlecast[tensorboard]'") from error
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = SummaryWriter(str(folder))
        for line in lines:
            self._add(line)
        self._writer.flush()

    def write(self, line: Mapping[str, Any]) -> None:
        """Add one line, for whoever is watching."""
        self._add(line)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, line: Mapping[str, Any]) -> None:
        scalars = {name: value for name, value in line.items() if name not in ("phase", "step", "parts")}
        for name, value in (scalars | {f"loss/{part}": value for part, value in line["parts"].items()}).items():
            self._writer.add_scalar(f"{line['phase']}/{name}", value, line["step"])
