"""Plots as inline SVG whose colours are the page's: they follow its light and dark theme and need no script."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Final

import numpy as np
from numpy.typing import ArrayLike

_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 30, 42  # px around the plot
_TICKS: Final = 5
_STEPS: Final = (1, 2, 2.5, 5, 10)


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers from `low` to `high`."""
    raw = (high - low) / _TICKS or 1.0
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in _STEPS if factor * power >= raw * (1 - 1e-9))
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def span(values: Iterable[ArrayLike], *, margin: float = 0.06) -> tuple[float, float]:
    """From the least to the greatest finite value, and a little beyond."""
    found = np.concatenate([np.ravel(each) for each in values])
    found = found[np.isfinite(found)]
    low, high = (float(found.min()), float(found.max())) if len(found) else (0.0, 1.0)
    room = (high - low or abs(high) or 1.0) * margin
    return low - room, high + room


class Plot:
    """Axes in the units of the data. `colour` is a CSS colour such as `var(--c0)`; gaps are NaN."""

    def __init__(
        self,
        title: str,
        x: tuple[float, float],
        y: tuple[float, float],
        *,
        x_label: str = "",
        y_label: str = "",
        x_ticks: Sequence[float] | None = None,
        y_names: Sequence[str] | None = None,
        size: tuple[int, int] = (460, 290),
    ) -> None:
        self._x, self._y = x, y
        self._width, self._height = size
        self._left = _LEFT if y_names is None else 14 + 8 * max(map(len, y_names), default=0)
        self._grid: list[str] = []
        self._marks: list[str] = []  # nothing of these shows beyond the axes
        self._texts: list[str] = []
        self._title = title
        self._text(self._left, 16, title, "start", "title")
        self._text((self._left + self._width - _RIGHT) / 2, self._height - 6, x_label, "middle", "label")
        self._x_axis(ticks(*x) if x_ticks is None else x_ticks)
        if y_names is None:
            self._y_axis(ticks(*y), y_label)
        else:
            for row, name in enumerate(y_names):
                self._text(self._left - 6, self._down(row) + 4, name, "end", "tick")

    def line(
        self, x: ArrayLike, y: ArrayLike, colour: str, name: str, *, width: float = 2, dashed: bool = False
    ) -> None:
        """A line, in pieces where there are gaps."""
        at = np.column_stack([x, y])
        known = np.isfinite(at).all(axis=1)
        pieces = np.split(at[known], np.flatnonzero(np.diff(np.flatnonzero(known)) > 1) + 1)
        path = "".join("M" + "L".join(self._place(*point) for point in piece) for piece in pieces if len(piece))
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._mark(f'<path d="{path}" fill="none" style="stroke:{colour}" stroke-width="{width}"{dash}>', name, "path")

    def band(
        self, x: ArrayLike, low: ArrayLike, high: ArrayLike, colour: str, name: str, *, opacity: float = 0.15
    ) -> None:
        """The area between two lines; nothing where either is unknown throughout."""
        at = np.column_stack([x, low, high])
        at = at[np.isfinite(at).all(axis=1)]
        if len(at):
            edge = [*at[:, [0, 1]], *at[::-1, [0, 2]]]
            points = " ".join(self._place(*point) for point in edge)
            self._mark(f'<polygon points="{points}" style="fill:{colour}" opacity="{opacity}">', name, "polygon")

    def bar(
        self, x: tuple[float, float], y: tuple[float, float], colour: str, name: str, opacity: float = 0.75
    ) -> None:
        """A rectangle between two corners."""
        left, right = sorted(map(self._across, x))
        top, bottom = sorted(map(self._down, y))
        box = f'x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}"'
        self._mark(f'<rect {box} style="fill:{colour}" opacity="{opacity}">', name, "rect")

    def dot(self, x: float, y: float, colour: str, name: str, *, opacity: float = 0.85) -> None:
        """A point."""
        at = f'cx="{self._across(x):.1f}" cy="{self._down(y):.1f}" r="3.6"'
        self._mark(f'<circle {at} style="fill:{colour}" opacity="{opacity}">', name, "circle")

    def rule(self, name: str, *, x: float | None = None, y: float | None = None) -> None:
        """A dashed grey line at `x` or `y`, with its name at the end."""
        at_x = self._x if x is None else (x, x)
        at_y = self._y if y is None else (y, y)
        self.line(at_x, at_y, "var(--muted)", name, width=1.2, dashed=True)
        if y is None:
            self._text(self._across(at_x[1]) + 4, _TOP + 11, name, "start", "label")
        else:
            self._text(self._width - _RIGHT - 3, self._down(at_y[1]) - 5, name, "end", "label")

    def svg(self) -> str:
        """The element, as wide as its place allows."""
        head = f'<svg viewBox="0 0 {self._width} {self._height}" role="img" aria-label="{escape(self._title)}">'
        box = (self._left, _TOP, self._width - _RIGHT - self._left, self._height - _BOTTOM - _TOP)
        place = 'x="{}" y="{}" width="{}" height="{}" viewBox="{} {} {} {}"'.format(*box, *box)
        return f"{head}{''.join(self._grid)}<svg {place}>{''.join(self._marks)}</svg>{''.join(self._texts)}</svg>"

    def _x_axis(self, at: Sequence[float]) -> None:
        base = self._height - _BOTTOM
        for tick in at:
            across = self._across(tick)
            self._grid.append(f'<path class="grid" d="M{across:.1f},{_TOP}V{base}"/>')
            self._text(across, base + 15, f"{tick:g}", "middle", "tick")

    def _y_axis(self, at: Sequence[float], label: str) -> None:
        for tick in at:
            down = self._down(tick)
            self._grid.append(f'<path class="grid" d="M{self._left},{down:.1f}H{self._width - _RIGHT}"/>')
            self._text(self._left - 6, down + 4, f"{round(tick, 10):g}", "end", "tick")
        middle = (_TOP + self._height - _BOTTOM) / 2
        turned = f'transform="rotate(-90 12 {middle})"'
        self._texts.append(
            f'<text x="12" y="{middle}" text-anchor="middle" class="label" {turned}>{escape(label)}</text>'
        )

    def _text(self, x: float, y: float, text: str, anchor: str, kind: str) -> None:
        self._texts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>')

    def _mark(self, opening: str, name: str, tag: str) -> None:
        self._marks.append(f"{opening}<title>{escape(name)}</title></{tag}>")

    def _place(self, x: float, y: float) -> str:
        return f"{self._across(x):.1f},{self._down(y):.1f}"

    def _across(self, x: float) -> float:
        low, high = self._x
        return self._left + (x - low) / (high - low) * (self._width - self._left - _RIGHT)

    def _down(self, y: float) -> float:
        low, high = self._y
        return self._height - _BOTTOM - (y - low) / (high - low) * (self._height - _TOP - _BOTTOM)
