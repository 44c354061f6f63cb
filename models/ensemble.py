"""A forecaster blended of others: their quantiles averaged, with weights for each group of horizons.

Distributions are pooled by averaging quantiles (Vincentization): the blend's quantile of a log price relative to the
last close is the weighted mean of the members' at that level, so in prices it is the weighted geometric mean. The
alternative, the linear pool, averages the distribution functions. Where members are calibrated and disagree, the linear
pool is overdispersed (Hora 2004; Gneiting and Ranjan 2013), since their disagreement is added to their spread. Averaged
quantiles keep location, scale and shape at the average of the members' and are never less sharp than the linear pool
(Lichtendahl, Grushka-Cockayne and Winkler 2013, "Is it better to average probabilities or quantiles?"). Members that
are too narrow stay so: nothing here widens a band.

`prob_up` is the probability of one event, for which there are no quantiles to average: it is the weighted mean.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Self

import numpy as np

from models.candles import PRICES, VOLUME, Floats
from models.configs import finite_number, whole_number
from models.forecaster import (
    QUANTILE_COLUMNS,
    Batch,
    Forecast,
    Forecaster,
    ForecastInput,
    Limits,
    ModelError,
    Raw,
    Row,
    Sampling,
    Wanted,
    always,
    checked,
    served_sampling,
    usual_lookback,
)
from models.scoring import GROUPS, group_of, steps_of

ENSEMBLE: Final = "ensemble"  # the family

Weights = tuple[tuple[float, ...], ...]  # [G][M], each group's sum to one


@dataclass(frozen=True)
class Member:
    """One of the blended, and what it is asked for when it is asked for nothing special."""

    forecaster: Forecaster
    lookback: int
    sampling: Sampling

    def asked(self, item: ForecastInput) -> ForecastInput:
        """The part of a request to the ensemble that this member answers, with its own lookback and sampling."""
        kept = min(len(item.candles), self.lookback, self.forecaster.limits.room(item.horizon))
        return replace(
            item,
            timestamps=item.timestamps[-kept:],
            candles=item.candles[-kept:],
            local_times=item.local_times[-kept - item.horizon :],
            sampling=self.sampling,
            with_paths=False,
        )


def member_of(forecaster: Forecaster, serving: Mapping[str, Any]) -> Member:
    """A version as a member, by its manifest's serving defaults."""
    lookback = usual_lookback(forecaster.family, serving, forecaster.limits.max_context)
    return Member(forecaster, lookback, served_sampling(serving))


def members_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """`name@version` of an ensemble's members; ValueError unless its `config.json` names two or more."""
    found = config.get("members")
    if not isinstance(found, list) or len(found) < 2 or not all(isinstance(name, str) for name in found):
        raise ValueError("an ensemble's config names two members or more")
    return tuple(found)


def weights_of(config: Mapping[str, Any]) -> Weights:
    """The weights that an ensemble was published with; ValueError unless each group's are shares of its members."""
    return checked_weights(config.get("weights"), len(members_of(config)))


def checked_weights(given: Any, members: int) -> Weights:
    """`given` as weights; ValueError unless it holds, for each of the first groups, shares of so many members."""
    rows = given if isinstance(given, (list, tuple)) else []
    found = tuple(tuple(finite_number(share, "weights") for share in row) for row in rows)
    if not 1 <= len(found) <= len(GROUPS):
        raise ValueError(f"an ensemble has weights for 1 to {len(GROUPS)} groups of horizons")
    for row in found:
        if len(row) != members or min(row) < 0 or abs(sum(row) - 1) > 1e-9:
            raise ValueError("an ensemble's weights are one share for each member, and sum to one")
    return found


class EnsembleForecaster:
    """Members answer as they do alone, each from its own lookback; seeds are the ensemble's.

    A request is for the median and brings no sampling settings of its own.
    """

    family = ENSEMBLE

    def __init__(self, members: Sequence[Member], weights: Weights, max_horizon: int) -> None:
        """`weights` reach as far as `max_horizon`; ValueError where they or a member do not."""
        limits = [member.forecaster.limits for member in members]
        if max_horizon > min(GROUPS[len(weights) - 1], *(each.max_horizon for each in limits)):
            raise ValueError(f"these members and weights do not reach {max_horizon} steps")
        self.members = tuple(members)
        self.weights = weights
        self.limits = Limits(
            min_context=max(each.min_context for each in limits),
            max_context=max(member.lookback for member in members),
            max_horizon=max_horizon,
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any], members: Sequence[Member]) -> "EnsembleForecaster":
        """From a version's `config.json`; KeyError or ValueError if it is none of these members."""
        horizon = whole_number(config["max_horizon"], "max_horizon")
        return cls(members, checked_weights(config["weights"], len(members)), horizon)

    def weighted(self, weights: Weights) -> Self:
        """The same members with other weights."""
        return type(self)(self.members, weights, self.limits.max_horizon)

    def over(self, forecasters: Sequence[Forecaster]) -> Self:
        """The same ensemble, its members run otherwise."""
        pairs = zip(self.members, forecasters, strict=True)
        members = [replace(member, forecaster=forecaster) for member, forecaster in pairs]
        return type(self)(members, self.weights, self.limits.max_horizon)

    def check(self, item: ForecastInput) -> None:
        self.limits.check(item)
        if item.aggregate != "median":
            raise ModelError("the point of an ensemble is its median: leave aggregate out", "aggregate")
        for member in self.members:
            member.forecaster.check(member.asked(item))

    def max_rows(self, item: ForecastInput) -> int:
        return min(member.forecaster.max_rows(member.asked(item)) for member in self.members)

    def bucket(self, item: ForecastInput) -> Hashable:
        return tuple(member.forecaster.bucket(member.asked(item)) for member in self.members)

    def encode(self, item: ForecastInput) -> Row:
        return {
            f"{place}.{name}": values
            for place, member in enumerate(self.members)
            for name, values in member.forecaster.encode(member.asked(item)).items()
        }

    def prepare(self, inputs: Sequence[ForecastInput], rows: Sequence[Row] | None = None) -> Batch:
        batches = {
            str(place): member.forecaster.prepare(
                [member.asked(item) for item in inputs], [_of_member(row, place) for row in rows] if rows else None
            )
            for place, member in enumerate(self.members)
        }
        return Batch(inputs, batches, max(batch.rows for batch in batches.values()))

    def run(self, batch: Batch, wanted: Wanted = always) -> Raw:
        return {place: self.members[int(place)].forecaster.run(each, wanted) for place, each in batch.tensors.items()}

    def finish(self, raw: Raw, batch: Batch) -> list[Forecast]:
        found = [self.members[int(place)].forecaster.finish(raw[place], each) for place, each in batch.tensors.items()]
        return [self.combined(forecasts) for forecasts in zip(*found, strict=True)]

    def combined(self, forecasts: Sequence[Forecast]) -> Forecast:
        """The blend of the members' forecasts of one request, in their order."""
        first = forecasts[0]
        shares = shares_by_step(self.weights, len(first.point))
        point = np.empty_like(first.point)
        point[:, PRICES] = _geometric(shares[:, :, None], [each.point[:, PRICES] for each in forecasts])
        point[:, VOLUME] = average(shares, [each.point[:, VOLUME] for each in forecasts])
        return checked(
            Forecast(
                point=point,
                levels=first.levels,
                quantiles={
                    name: _geometric(shares[:, None], [each.quantiles[name] for each in forecasts])
                    for name in QUANTILE_COLUMNS
                },
                prob_up=average(shares, [each.prob_up for each in forecasts]),
                warnings=tuple(dict.fromkeys(text for each in forecasts for text in each.warnings)),
            )
        )


def shares_by_step(weights: Weights, horizon: int) -> Floats:
    """`[M, H]` weights of every step."""
    shares = np.empty((len(weights[0]), horizon))
    for group in range(group_of(horizon) + 1):
        shares[:, steps_of(group, horizon)] = np.reshape(weights[group], (-1, 1))
    return shares


def average(shares: Floats, values: Sequence[Floats]) -> Floats:
    """Σ share · value over the members, in their order: what a row costs no other row's bits depend on."""
    total = shares[0] * values[0]
    for share, value in zip(shares[1:], values[1:], strict=True):
        total = total + share * value
    return np.asarray(total)


def _geometric(shares: Floats, prices: Sequence[Floats]) -> Floats:
    return np.asarray(np.exp(average(shares, [np.log(each) for each in prices])))


def _of_member(row: Row, place: int) -> Row:
    prefix = f"{place}."
    return {name.removeprefix(prefix): values for name, values in row.items() if name.startswith(prefix)}
