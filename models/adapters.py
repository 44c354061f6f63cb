"""Adapters of low rank (Hu et al. 2021, arXiv 2106.09685) beside a network that many share: y = W x + B A x.

The rows of one batch may have an A and B each, or none (as in Chen et al. 2023, arXiv 2310.18547). A row's bits do not
depend on the company: what is added to it is computed with those of its own rank alone, however many they are.
Axes: B rows of a batch, G those with adapters of one rank, R rank.
"""

import re
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from models.layers import WeightsMismatch

# A product of one column takes another path alone than in company; ranks are padded to a multiple of this.
_RANKS: Final = 4
_STORED: Final = re.compile(r"(.+)\.lora_([AB])\.default\.weight")  # peft's names

Matrices = Mapping[str, tuple[Tensor, Tensor]]  # by the published name of a layer: A [R, in] and B [out, R]


class LowRank(NamedTuple):
    """What is added to a product whose outputs are `parts` layers side by side, with an axis of rows once stacked."""

    down: Tensor  # [parts * R, in]
    up: Tensor  # [parts, R, out]


class Adapter(dict[str, LowRank]):
    """One adapter, by the names of the products that a network is served by."""

    @property
    def shape(self) -> Hashable:
        """Equal for adapters that can be stacked."""
        return tuple((name, low.up.shape[1]) for name, low in self.items())


@runtime_checkable
class Adaptable(Protocol):
    """A forecaster whose batches take adapters."""

    def adapted(self, matrices: Matrices) -> Self:
        """The same eager network with an adapter beside it; batches of both mix. WeightsMismatch if it does not fit."""
        ...


@dataclass(frozen=True)
class _Group:
    """The rows `[G]` of a batch whose adapters are of one shape, and these stacked."""

    rows: Tensor
    stacked: Mapping[str, LowRank]


class Adapters:
    """Those of a batch: one for each row, or None."""

    def __init__(self, rows: Sequence[Adapter | None]) -> None:
        alike: dict[Hashable, list[int]] = defaultdict(list)
        for place, adapter in enumerate(rows):
            if adapter:
                alike[adapter.shape].append(place)
        self._groups = [
            _group(places, [found for place in places if (found := rows[place])]) for places in alike.values()
        ]

    def __bool__(self) -> bool:
        return bool(self._groups)

    def add(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        """`out` `[B, …, parts * out]`, the product called `name` of `x` `[B, …, in]`, and what the rows add to it."""
        for group in self._groups:
            if name in group.stacked:
                low = group.stacked[name]
                rows = x.index_select(0, group.rows).flatten(1, -2)  # [G, n, in]
                out = _added(out, group.rows, torch.bmm(rows, low.down.transpose(1, 2)), low.up)
        return out

    def look_up(self, name: str, tokens: Tensor, out: Tensor) -> Tensor:
        """As `add`, for the rows `out` `[B, …, out]` of a table at `tokens` `[B, …]`: each x is 1 at its token."""
        for group in self._groups:
            if name in group.stacked:
                low = group.stacked[name]
                places = tokens.index_select(0, group.rows).flatten(1).unsqueeze(1).expand(-1, low.down.shape[1], -1)
                out = _added(out, group.rows, low.down.gather(2, places).transpose(1, 2), low.up)
        return out


NO_ADAPTERS: Final = Adapters(())


def _group(places: Sequence[int], adapters: Sequence[Adapter]) -> _Group:
    first = adapters[0]
    stacked = {
        name: LowRank(*(torch.stack(parts) for parts in zip(*(each[name] for each in adapters), strict=True)))
        for name in first
    }
    return _Group(torch.tensor(places, device=next(iter(first.values())).up.device), stacked)


def _added(out: Tensor, rows: Tensor, inner: Tensor, up: Tensor) -> Tensor:
    """`out` with the products of `inner` `[G, n, parts * R]` and `up` `[G, parts, R, out]` added to its `rows`."""
    G, parts, R, _ = up.shape
    apart = inner.unflatten(-1, (parts, R)).transpose(1, 2).flatten(0, 1)  # [G * parts, n, R]
    found = torch.bmm(apart, up.flatten(0, 1)).unflatten(0, (G, parts)).transpose(1, 2)  # [G, n, parts, out]
    return out.index_add(0, rows, found.reshape(G, *out.shape[1:]))


def matrices_of(tensors: Mapping[str, Tensor], scale: float) -> dict[str, tuple[Tensor, Tensor]]:
    """The stored `tensors` of an adapter by layer, `scale` multiplied in; WeightsMismatch if they are not of one."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        known = _STORED.fullmatch(name)
        if known is None or tensor.ndim != 2 or not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise WeightsMismatch(f"adapter: {name[:200]!r} is no finite matrix of low rank")
        found[known[1]][known[2]] = tensor.float()
    if lame := [name for name, pair in found.items() if len(pair) < 2 or len(pair["A"]) != pair["B"].shape[1]]:
        raise WeightsMismatch(f"adapter: {lame[0][:200]!r} has not both its matrices, of one rank")
    return {name: (pair["A"], scale * pair["B"]) for name, pair in found.items()}


class Fitting:
    """Takes the matrices of an adapter, one served product after the other; what is left over at the end is refused."""

    def __init__(self, matrices: Matrices, device: torch.device) -> None:
        self._left = dict(matrices)
        self._device = device
        self._fitted = Adapter()

    def product(self, name: str, weight: Tensor, layers: Sequence[str], order: Tensor | None = None) -> None:
        """Fit what is beside `layers`, whose outputs are those of `weight` `[parts * out, in]`, or are in `order`."""
        outputs, inputs = weight.shape
        found = [self.take(layer, inputs, outputs // len(layers)) for layer in layers]
        there = [pair for pair in found if pair is not None]
        if there:
            none = torch.zeros(0, inputs), torch.zeros(outputs // len(layers), 0)
            self.fit(name, [pair or none for pair in found], order)

    def take(self, layer: str, inputs: int, outputs: int) -> tuple[Tensor, Tensor] | None:
        """A and B beside a published layer, if it has any; WeightsMismatch if they are of another size."""
        found = self._left.pop(layer, None)
        if found and (found[0].shape[1], found[1].shape[0]) != (inputs, outputs):
            wrong = f"{found[0].shape[1]} to {found[1].shape[0]}"
            raise WeightsMismatch(f"adapter: {layer} maps {wrong}, the network's {inputs} to {outputs}")
        return found

    def fit(self, name: str, pairs: Sequence[tuple[Tensor, Tensor]], order: Tensor | None = None) -> None:
        """Fit the A and B of every part of a served product."""
        rank = -(-max(len(down) for down, _ in pairs) // _RANKS) * _RANKS
        down = torch.stack([_padded(down, rank) for down, _ in pairs]).flatten(0, 1)
        up = torch.stack([_padded((up if order is None else up[order.to(up.device)]).T, rank) for _, up in pairs])
        self._fitted[name] = LowRank(down.to(self._device), up.to(self._device))

    def done(self) -> Adapter:
        """The adapter; WeightsMismatch if there are matrices that nothing took."""
        if self._left:
            raise WeightsMismatch(f"adapter: the network has no {next(iter(self._left))[:200]!r} to put it beside")
        return self._fitted


def _padded(matrix: Tensor, rank: int) -> Tensor:
    """`[R, n]` with zeros up to `rank`."""
    return torch.nn.functional.pad(matrix, (0, 0, 0, rank - len(matrix)))
