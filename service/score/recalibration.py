"""Bands as wide as they need to be: the scale that the ledger fits to the misses, applied to quantiles.

For every symbol, model and group of horizons one number c stretches the distance of each quantile from the median, in
logarithms. After every closed candle log c moves by (mean miss of the group - 0.2) / 4h, with h the group's last step,
and stays between log 1/4 and log 8 (service/scripts/put.lua): a tracker of a quantile, as in Angelopoulos et al. (2023,
arXiv 2307.16895), that can never make a band infinite. The step shrinks with h because misses of forecasts that overlap
come in runs: with one step for all, bands of 9 to 30 steps of the S&P 500 scored up to 14 % worse than uncalibrated.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from models.candles import Floats
from models.scoring import group_name, group_of, steps_of

Mode = Literal["off", "shadow", "on"]
MODES: Final = ("off", "shadow", "on")


@dataclass(frozen=True)
class Calibration:
    """The scale `[H]` of each step's band, and whether it is applied, only shown, or neither."""

    mode: Mode
    scale: Floats
    by_group: Mapping[str, float]

    def applied(self, quantiles: Floats, middle: Floats) -> Floats:
        """Prices `[Q, H]` moved away from their median `[H]`."""
        centre = np.log(middle)
        return np.asarray(np.exp(centre + (np.log(quantiles) - centre) * self.scale))


def calibration_for(mode: Mode, scales: Mapping[tuple[str, int], float], model: str, horizon: int) -> Calibration:
    """Of a forecast of so many steps; 1 where nothing was scored yet."""
    scale, by_group = np.ones(horizon), {}
    for group in range(group_of(horizon) + 1):
        found = scales.get((model, group), 1.0)
        scale[steps_of(group, horizon)] = found
        by_group[group_name(group)] = found
    return Calibration(mode, scale, by_group)
