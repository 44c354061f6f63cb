"""CUDA graphs over any torch runtime: functions are captured per shape at warm-up and replayed, never captured late.

A shape that was not captured runs uncaptured; `hits` and `misses` count both.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from models.runtimes.functions import Decoder, Function, Functions, flattened, nested, result_type

Key = tuple[str, tuple[tuple[torch.Size, torch.dtype], ...]]

_ALIGNED = 256  # bytes, as allocations of their own would be
_WARM_UPS = 3  # libraries choose their kernels and workspaces in the first runs, which a capture must not see


@dataclass(frozen=True)
class _Captured:
    graph: Any
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def replay(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Results in memory of their own: the next replay overwrites the graph's."""
        torch._foreach_copy_(list(self.inputs), list(tensors), non_blocking=True)
        self.graph.replay()
        return tuple(output.clone() for output in self.outputs)


class CudaGraphs(Mapping[str, Function]):
    """`functions` captured: a call made while `capturing` records a graph, later ones of its shapes replay it."""

    def __init__(self, decoder: Decoder, functions: Functions) -> None:
        self._functions = {name: self._wrapped(decoder, name, plain) for name, plain in functions.items()}
        self._captured: dict[Key, _Captured] = {}
        self._pool: Any = None
        self._memory = torch.empty(0, dtype=torch.uint8)
        self.capturing = False
        self.hits: Counter[str] = Counter()
        self.misses: Counter[str] = Counter()

    def __getitem__(self, name: str) -> Function:
        return self._functions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)

    @property
    def graphs(self) -> int:
        """How many were captured."""
        return len(self._captured)

    def _wrapped(self, decoder: Decoder, name: str, plain: Function) -> Function:
        kind = result_type(decoder, name)

        def function(*arguments: Any) -> Any:
            tensors = flattened(arguments)
            key = (name, tuple((tensor.shape, tensor.dtype) for tensor in tensors))
            found = self._captured.get(key)
            if found is None and self.capturing:
                found = self._captured[key] = self._capture(plain, arguments)
            if found is None:
                self.misses[name] += 1
                return plain(*arguments)
            self.hits[name] += 1
            return nested(kind, iter(found.replay(tensors)))

        return function

    def _inputs_like(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Memory for `tensors`, contiguous: the same for every graph, since no two ever run at once."""
        sizes = [-(-tensor.nbytes // _ALIGNED) * _ALIGNED for tensor in tensors]
        if sum(sizes) > self._memory.nbytes:
            self._memory = torch.empty(sum(sizes), dtype=torch.uint8, device=tensors[0].device)
        places = self._memory[: sum(sizes)].split(sizes)
        return tuple(
            place[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for place, tensor in zip(places, tensors, strict=True)
        )

    def _capture(self, plain: Function, arguments: Sequence[Any]) -> _Captured:
        leaves, structure = _pytree.tree_flatten(list(arguments))
        inputs = self._inputs_like(leaves)
        torch._foreach_copy_(list(inputs), leaves)
        static = _pytree.tree_unflatten(list(inputs), structure)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                plain(*static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):  # others go on serving
            outputs = flattened(plain(*static))
        self._pool = self._pool or graph.pool()
        return _Captured(graph, inputs, outputs)
