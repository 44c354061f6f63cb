"""The runtimes by name: what each needs on disk, and the functions it then offers."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from models.runtimes import compiled, onnx
from models.runtimes.cuda_graph import CudaGraphs
from models.runtimes.functions import Decoder, Functions, functions_of

Files = Mapping[str, bytes]
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
FP32_EAGER: Final = "eager-float32"


@dataclass(frozen=True)
class Kind:
    """One runtime with one dtype."""

    runtime: str
    dtype: str
    native: bool = False  # its files are code of the machine that made them

    @property
    def label(self) -> str:
        return f"{self.runtime}-{self.dtype}"

    @property
    def fours(self) -> bool:
        """Whether products need a multiple of 4 rows to give a row the same bits at any count."""
        return self.dtype == "float32" or self.runtime == "onnx"

    def build(self, decoder: Decoder) -> dict[str, bytes]:
        """The files of the artefact, by name; minutes, for a compiled one."""
        if self.runtime in ("eager", "cuda_graph"):
            return {}
        served = self.served(decoder)
        return {self._file(name): self._built(served, name) for name in decoder.functions}

    def load(self, decoder: Decoder, files: Files, threads: int) -> Functions:
        """The functions, on the device where `decoder` lies."""
        served = self.served(decoder)
        if self.runtime == "eager":
            return functions_of(served)
        if self.runtime == "cuda_graph":
            return CudaGraphs(served, functions_of(served))
        parts = {name: files[self._file(name)] for name in decoder.functions}
        if self.runtime == "compiled":
            return compiled.load_functions(served, parts)
        return onnx.load_functions(served, parts, decoder.device, threads)

    def served(self, decoder: Decoder) -> Decoder:
        """What is executed: `decoder`, or a copy of it in reduced precision. ONNX files are reduced by themselves."""
        return decoder if self.dtype == "float32" or self.runtime == "onnx" else decoder.reduced(DTYPES[self.dtype])

    def _built(self, decoder: Decoder, name: str) -> bytes:
        if self.runtime == "compiled":
            return compiled.compile_function(decoder, name)
        return onnx.export_function(decoder, name, int8=self.dtype == "int8")

    def _file(self, name: str) -> str:
        return f"{name}.{'pt2' if self.runtime == 'compiled' else 'onnx'}"


KINDS: Final = {
    kind.label: kind
    for kind in (
        Kind("eager", "float32"),
        Kind("eager", "bfloat16"),
        Kind("eager", "int8"),
        Kind("compiled", "float32", native=True),
        Kind("compiled", "bfloat16", native=True),
        Kind("compiled", "int8", native=True),
        Kind("onnx", "float32"),
        Kind("onnx", "int8"),
        Kind("cuda_graph", "float32"),
        Kind("cuda_graph", "bfloat16"),
    )
}


def platform_name(device: torch.device) -> str:
    """What compiled code and measured times hold for, such as `linux-x86_64-avx512` or `…-sm90`."""
    machine = f"{platform.system()}-{platform.machine()}".lower()
    if device.type == "cuda":
        return f"{machine}-sm{''.join(map(str, torch.cuda.get_device_capability(device)))}"
    return f"{machine}-{torch.backends.cpu.get_cpu_capability().lower()}"
