"""Compiled ahead of time: torch.export, then AOTInductor.

A package holds code alone and runs on the version's own tensors. That of a function which is repeated for every step
brings its weights in the layout in which the machine multiplies a few rows by them fastest, twice as fast on a CPU.
Packages are native code of the machine that built them. They are loaded without compiling anything.
"""

import io
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import nn

from models.runtimes.functions import Decoder, Flat, Function, Functions, rebuilt

_OPTIONS: Final = {"cpp.dynamic_threads": True}  # the number of threads is the service's choice, not the compiler's
_SHARED: Final = {"aot_inductor.package_constants_in_so": False}
_OWN: Final = {"freezing": True}


def compile_function(decoder: Decoder, name: str) -> bytes:
    """The package of one function; takes a minute or so and needs a C++ compiler."""
    program = Flat(decoder, name).exported()
    options = {**_OPTIONS, **(_OWN if name in decoder.repeated else _SHARED)}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        # Of the compiler: on its own use of torch, and for a GPU on precision and speed that it would trade.
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(Path(folder) / f"{name}.pt2"), inductor_configs=options
        )
        return Path(path).read_bytes()


def load_functions(decoder: Decoder, packages: Mapping[str, bytes]) -> Functions:
    """Functions that run `packages` on the tensors of `decoder`, which must live as long as they do."""
    return {name: _load(decoder, name, packages[name]) for name in decoder.functions}


def _load(decoder: Decoder, name: str, package: bytes) -> Function:
    assert isinstance(decoder, nn.Module)
    runner = torch._inductor.aoti_load_package(io.BytesIO(package))
    if name not in decoder.repeated:
        own = {f"decoder.{key}": tensor.detach() for key, tensor in decoder.state_dict(keep_vars=True).items()}
        wanted = {key: own[key] for key in runner.get_constant_fqns()}
        runner.load_constants(wanted, check_full_update=True, user_managed=True)
    # Strides are compiled in: those of `Flat.example`.
    return rebuilt(decoder, name, lambda tensors: runner(*(tensor.contiguous() for tensor in tensors)))
