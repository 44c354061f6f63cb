"""What runtimes execute: a decoder's named functions, tensors in and tensors out.

Arguments are tensors or NamedTuples of them, results NamedTuples, which may hold others; the function's return
annotation says which. Exported forms know flat lists of tensors only: `Flat` is the way there, `rebuilt` the way back.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Protocol, Self, get_type_hints, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils import _pytree

Function = Callable[..., Any]
Functions = Mapping[str, Function]


class Decoder(Protocol):
    """A network ready to serve. It is a module; `functions` names its methods that runtimes execute.

    `repeated` are those that a forecast calls many times for a few rows.
    """

    functions: tuple[str, ...]
    repeated: tuple[str, ...]

    @property
    def device(self) -> torch.device: ...

    def examples(self, size: int) -> Mapping[str, tuple[Any, ...]]:
        """Arguments of every function; those of `size` 0 and 1 differ in every dimension that may change."""
        ...

    def reduced(self, dtype: torch.dtype) -> Self:
        """A copy whose matrices are of `dtype`."""
        ...


@runtime_checkable
class Executable(Protocol):
    """A forecaster whose functions can be executed by another runtime."""

    decoder: Decoder
    functions: Functions

    def executed_by(self, functions: Functions, *, fours: bool = True) -> Self:
        """The same forecaster on other functions; both share all else.

        Where `fours` is true products need a multiple of 4 rows to give a row the same bits at any count.
        """
        ...


def functions_of(decoder: Decoder) -> Functions:
    """The decoder's own methods: the eager runtime."""
    return {name: getattr(decoder, name) for name in decoder.functions}


def flattened(arguments: Sequence[Any]) -> tuple[Tensor, ...]:
    """The tensors of `arguments`, in order."""
    return tuple(_pytree.tree_leaves(list(arguments)))


class Flat(nn.Module):
    """One function as a module over a flat list of tensors, with example tensors and its dimensions that may change."""

    def __init__(self, decoder: Decoder, name: str) -> None:
        super().__init__()
        small, large = (decoder.examples(size)[name] for size in (0, 1))
        self.decoder = decoder
        self._name = name
        self._structure = _pytree.tree_structure(list(large))
        # A compiler takes over the strides too, and runtimes are called with contiguous tensors.
        self.example = tuple(tensor.contiguous() for tensor in flattened(large))
        self.changing = [
            [axis for axis in range(a.ndim) if a.shape[axis] != b.shape[axis]]
            for a, b in zip(flattened(small), self.example, strict=True)
        ]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        arguments = _pytree.tree_unflatten(list(tensors), self._structure)
        return flattened(getattr(self.decoder, self._name)(*arguments))

    def exported(self) -> torch.export.ExportedProgram:
        """Traced once for every shape; a branch on data fails here."""
        dynamic = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in self.changing)
        with torch.no_grad():
            return torch.export.export(self, self.example, dynamic_shapes=(dynamic,), strict=False)


def rebuilt(decoder: Decoder, name: str, execute: Callable[[tuple[Tensor, ...]], Sequence[Tensor]]) -> Function:
    """`execute`, which knows flat tensors, with the arguments and the result of the function called `name`."""
    kind = result_type(decoder, name)

    def function(*arguments: Any) -> Any:
        return nested(kind, iter(execute(flattened(arguments))))

    return function


def result_type(decoder: Decoder, name: str) -> Any:
    """What the function called `name` returns."""
    return get_type_hints(getattr(type(decoder), name))["return"]


def nested(kind: Any, tensors: Iterator[Tensor]) -> Any:
    """The next tensor, or the NamedTuple `kind` of the next ones."""
    if kind is Tensor:
        return next(tensors)
    return kind(*(nested(field, tensors) for field in _fields(kind)))


@cache
def _fields(kind: Any) -> tuple[Any, ...]:
    """The types of a NamedTuple's fields."""
    return tuple(get_type_hints(kind).values())
