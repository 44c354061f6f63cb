"""Live weights of ensembles: they follow the realised scores of the members slowly, and every change can be undone.

A member's weight in a group of horizons is proportional to its published weight times exp(-Σ λᵃ (ℓ - ℓ̄)), the
exponentially weighted forecaster (Vovk 1990) with discounted losses (Cesa-Bianchi and Lugosi 2006, §2.11). ℓ is the
CRPS that the member's forecasts in a block of time were worth over the naive forecast's absolute error on the same
targets, ℓ̄ the members' mean, and a the block's age. λ halves a block's say in 20 blocks, so weights go back to the
published ones where members are alike again; one block moves a log ratio of weights by 1 at most.

The weights are a function of the ledger's sums over complete blocks, never of a single request, and are made anew at
most once per block. `cc:1:w:<name@version>` is the list of all that were ever in use, numbered from 1 on; 0 are the
published. Where somebody has gone back to former weights they stay until scores may move them again.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from model_store.files import StoreError, VerificationFailed, VersionNotFound
from model_store.store import ModelStore
from models.candles import Floats
from models.ensemble import EnsembleForecaster, Weights, checked_weights, weights_of
from service.engine.registry import LoadedModel
from service.score.evaluator import Owner, Series, at_blocks, by_block, first_unsealed
from service.score.ledger import Blocks
from service.state import REDIS_ERRORS, State, raw

_log = logging.getLogger(__name__)

HALF_LIFE_BLOCKS: Final = 20
_FARTHEST: Final = 0.5  # of a member's loss from the members' mean: one block of wild scores is no evidence
_LEAST_CHANGE: Final = 0.005  # of a weight: less is not worth another number, and forecasts that are made anew
_MOST_KEPT: Final = 500
_LOOKED_AT: Final = 16  # entries: the newest that can be read counts

Why = Literal["scores", "rollback", "released"]


@dataclass(frozen=True)
class InUse:
    """Weights that were in use from some instant on. Tuples by group of horizons; None where nothing was scored."""

    number: int = 0
    at: int = 0  # UTC ms
    why: Why = "scores"
    held: bool = False  # scores do not move them
    weights: Mapping[str, Weights] = field(default_factory=dict)  # by interval; the published elsewhere
    newest: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)  # block that is in them, by interval
    scores: Mapping[str, tuple[tuple[float, ...] | None, ...]] = field(default_factory=dict)  # of each member


@dataclass(frozen=True)
class Published:
    """What an ensemble's config says."""

    members: tuple[str, ...]  # name@version
    weights: Weights


class LiveWeights:
    """Which weights every ensemble has now. Reading costs next to nothing, since requests do.

    Where they are not `live` they are the published ones, and nothing is learnt.
    """

    def __init__(self, state: State, store: ModelStore, now: Callable[[], int], *, live: bool) -> None:
        self.live = live
        self._state = state
        self._store = store
        self._now = now
        self._append = state.script("weights")
        self._published: dict[str, Published | None] = {}  # by name@version; None: it is no ensemble
        self._in_use: dict[str, InUse] = {}

    async def weighted(self, model: LoadedModel, interval: str) -> LoadedModel:
        """The model with the weights that it has now for an interval, if it is an ensemble."""
        if self.live and model.members and model.exact not in self._in_use and self._state.up:
            with contextlib.suppress(*REDIS_ERRORS):
                await self._refresh(model.exact)
        return self.at_hand(model, interval)

    def at_hand(self, model: LoadedModel, interval: str) -> LoadedModel:
        """The same by what is known here; what another process changes is known within a minute."""
        if not self.number(model, interval):
            return model
        found = self._in_use[model.exact]
        ensemble = model.forecaster
        assert isinstance(ensemble, EnsembleForecaster)
        return replace(model, forecaster=ensemble.weighted(found.weights[interval]), weights=found.number)

    def number(self, model: LoadedModel, interval: str) -> int:
        """Which weights `at_hand` would give it; 0: those that it has."""
        found = self._in_use.get(model.exact) if self.live and model.members else None
        return found.number if found and interval in found.weights else 0

    def published(self, exact: str) -> Published:
        """VersionNotFound unless `name@version` is an ensemble."""
        if exact not in self._published:
            manifest = self._store.manifest(exact)
            members = self._store.members(manifest)
            try:
                weights = weights_of(self._store.config(manifest)) if members else ()
            except ValueError as error:
                raise VerificationFailed(f"{exact}: {error}") from error
            self._published[exact] = Published(members, weights) if members else None
        found = self._published[exact]
        if found is None:
            raise VersionNotFound(f"{exact} is no ensemble")
        return found

    async def former(self, exact: str) -> list[InUse]:
        """All that were in use and are kept, oldest first."""
        return (await self._read(exact, _MOST_KEPT))[0]

    async def go_back(self, exact: str, number: int | None) -> InUse:
        """Have former weights again, by default those before these, and keep them; LookupError if there are none."""
        while True:
            found, last = await self._read(exact, _MOST_KEPT)
            former = {each.number: each for each in [InUse(), *found]}
            newest = max(former)
            wanted = number if number is not None else max((each for each in former if each < newest), default=None)
            if wanted is None or wanted not in former:
                raise LookupError("there are no such former weights")
            entry = replace(former[newest], why="rollback", held=True, weights=former[wanted].weights)
            if await self._append_after(exact, last, entry):
                return self._in_use[exact]

    async def release(self, exact: str) -> InUse:
        """Let scores move the weights again, from the next complete block on."""
        while True:
            known, last = await self._refresh(exact)
            if await self._append_after(exact, last, replace(known, why="released", held=False)):
                return self._in_use[exact]

    async def follow(self, everything: Mapping[Series, Mapping[Owner, Blocks]]) -> None:
        """Have the weights of every ensemble that was scored follow the scores of its members; REDIS_ERRORS."""
        if not self.live:
            return
        scored = {model for each in everything.values() for model, _ in each}
        for exact in sorted({*scored, *self._in_use}):
            with contextlib.suppress(StoreError):  # it is not in this store any more, or is no ensemble
                published = await asyncio.to_thread(self.published, exact)
                known, last = await self._refresh(exact)
                if not known.held:
                    found = await asyncio.to_thread(_learnt, published, everything, self._now())
                    if _is_news(found, known, published):
                        await self._append_after(exact, last, replace(found, number=known.number))

    async def _refresh(self, exact: str) -> tuple[InUse, bytes]:
        """The weights in use, and the last entry of the list."""
        found, last = await self._read(exact, _LOOKED_AT)
        self._in_use[exact] = found[-1] if found else InUse()
        return self._in_use[exact], last

    async def _read(self, exact: str, count: int) -> tuple[list[InUse], bytes]:
        """The newest entries that can be read, and the last one as it is, empty where there is none."""
        members = len((await asyncio.to_thread(self.published, exact)).members)
        packed = raw(await self._state.redis.lrange(_key(exact), -count, -1))
        return [entry for each in packed if (entry := _unpacked(each, members))], packed[-1] if packed else b""

    async def _append_after(self, exact: str, last: bytes, found: InUse) -> bool:
        """Have weights in use, `found` naming the number before theirs; False where another process was first."""
        entry = replace(found, number=found.number + 1, at=self._now())
        if not await self._append(keys=[_key(exact)], args=[last, json.dumps(asdict(entry)), _MOST_KEPT]):
            return False
        _log.info("%s has weights %d now: %s", exact, entry.number, entry.why)
        self._in_use[exact] = entry
        return True


def live_shares(published: Sequence[float], losses: Floats, numbers: NDArray[np.int64]) -> tuple[float, ...]:
    """Weights of M members from their relative losses `[M, N]` in blocks of these numbers `[N]`, the newest last."""
    say = 0.5 ** ((numbers[-1] - numbers) / HALF_LIFE_BLOCKS)
    apart = np.clip(losses - losses.mean(axis=0), -_FARTHEST, _FARTHEST)
    evidence = -(apart * say).sum(axis=1)
    shares = np.array(published) * np.exp(evidence - evidence.max())
    return tuple((shares / shares.sum()).tolist())


def _learnt(published: Published, everything: Mapping[Series, Mapping[Owner, Blocks]], now: int) -> InUse:
    """What the scores say, by interval and group."""
    weights: dict[str, Weights] = {}
    newest: dict[str, tuple[int | None, ...]] = {}
    scores: dict[str, tuple[tuple[float, ...] | None, ...]] = {}
    for interval in sorted({interval for _, interval in everything}):
        blocks = [each for (_, its), each in sorted(everything.items()) if its == interval]
        groups = range(len(published.weights))
        found = [
            _group_losses(published.members, blocks, group, first_unsealed(now, interval, group)) for group in groups
        ]
        if not any(found):
            continue
        weights[interval] = tuple(
            live_shares(row, *each) if each else row for row, each in zip(published.weights, found, strict=True)
        )
        newest[interval] = tuple(int(each[1][-1]) if each else None for each in found)
        scores[interval] = tuple(tuple(each[0].mean(axis=1).tolist()) if each else None for each in found)
    return InUse(weights=weights, newest=newest, scores=scores)


def _group_losses(
    members: Sequence[str], series: Sequence[Mapping[Owner, Blocks]], group: int, unsealed: int
) -> tuple[Floats, NDArray[np.int64]] | None:
    """Relative losses `[M, N]` in the complete blocks in which every member was scored, over all series."""
    parts: list[list[Blocks]] = [[] for _ in members]
    for each in series:
        own = [each.get((member, group)) for member in members]
        if all(own):
            common = [blocks for blocks in own if blocks]
            numbers = common[0].numbers
            for other in common[1:]:
                numbers = np.intersect1d(numbers, other.numbers)
            for place, blocks in enumerate(common):
                parts[place].append(at_blocks(blocks, numbers[numbers < unsealed]))
    if not any(len(blocks.numbers) for blocks in parts[0]):
        return None
    numbers = np.unique(np.concatenate([blocks.numbers for blocks in parts[0]]))
    sums = [by_block(blocks) for blocks in parts]
    moved = np.all([each["naive_error"] > 0 for each in sums], axis=0)
    if not moved.any():
        return None
    return np.stack([_relative_crps(each[moved]) for each in sums]), numbers[moved]


def _relative_crps(sums: NDArray[Any]) -> Floats:
    """Twice the mean pinball loss over the three scored levels, over the naive forecast's absolute error."""
    pinball = sums["pinball_low"] + sums["error"] / 2 + sums["pinball_high"]
    return np.asarray(2 / 3 * pinball / sums["naive_error"])


def _is_news(found: InUse, known: InUse, published: Published) -> bool:
    """A block is complete that was not, and moves a weight by more than nothing."""
    for interval, newest in found.newest.items():
        before = known.newest.get(interval, (None,) * len(newest))
        weights = known.weights.get(interval, published.weights)
        later = any(new is not None and (old is None or new > old) for new, old in zip(newest, before, strict=True))
        if later and np.abs(np.subtract(found.weights[interval], weights)).max() > _LEAST_CHANGE:
            return True
    return False


def _key(exact: str) -> str:
    return f"cc:1:w:{exact}"


def _unpacked(packed: bytes, members: int) -> InUse | None:
    """An entry of the list; None, having logged it, where it is damaged."""
    try:
        found = json.loads(packed)
        return InUse(
            **found
            | {
                "weights": {its: checked_weights(rows, members) for its, rows in found["weights"].items()},
                "newest": {its: tuple(rows) for its, rows in found["newest"].items()},
                "scores": {its: tuple(row and tuple(row) for row in rows) for its, rows in found["scores"].items()},
            }
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        _log.error("an ensemble's weights in Redis cannot be read: %.80r", packed)
        return None
