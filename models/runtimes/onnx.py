"""ONNX Runtime over the exported functions, on torch's own memory: inputs and outputs are bound, never copied."""

import contextlib
import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from models.runtimes.functions import Decoder, Flat, Function, Functions, rebuilt

_ELEMENTS: Final = {
    torch.float32: np.float32,
    torch.float64: np.float64,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.bool: np.bool_,
}
_BLOCK: Final = 32  # weights that share a scale


class RuntimeUnavailable(RuntimeError):
    """This machine cannot execute the artefact."""


def export_function(decoder: Decoder, name: str, *, int8: bool = False) -> bytes:
    """The function as one ONNX file, weights included; `int8` keeps matrices in 8 bits with a scale per 32 weights.

    Activations stay in float32: scales taken from them would couple the rows of a batch.
    """
    if decoder.device.type != "cpu":  # a file knows no device, and norms on a GPU are an operator that ONNX lacks
        assert isinstance(decoder, nn.Module)
        decoder = copy.deepcopy(decoder).cpu()
    program = Flat(decoder, name).exported()
    program.example_inputs = None  # else its shape guards are traced too, which fails for a scalar input
    with _quietly():
        exported = torch.onnx.export(program, dynamo=True, verbose=False, external_data=False)
    assert exported is not None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.onnx"
        exported.save(path)
        return _quantised(path) if int8 else path.read_bytes()


def load_functions(decoder: Decoder, files: Mapping[str, bytes], device: torch.device, threads: int) -> Functions:
    """Functions that run `files`; RuntimeUnavailable if ONNX Runtime cannot use `device`."""
    return {name: _load(decoder, name, files[name], device, threads) for name in decoder.functions}


def _load(decoder: Decoder, name: str, file: bytes, device: torch.device, threads: int) -> Function:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    wanted: Any = "CPUExecutionProvider"
    if device.type == "cuda":
        wanted = ("CUDAExecutionProvider", {"device_id": device.index or 0})
    try:
        session = onnxruntime.InferenceSession(file, options, providers=[wanted])
    except Exception as error:  # its errors have no other base in common
        raise RuntimeUnavailable(f"ONNX Runtime does not load {name}: {error}") from error
    used = session.get_providers()[0]
    if used != (wanted if isinstance(wanted, str) else wanted[0]):
        raise RuntimeUnavailable(f"ONNX Runtime offers {used} only: its CUDA libraries did not load")
    return rebuilt(decoder, name, _bound(session, Flat(decoder, name), device))


def _bound(session: Any, flat: Flat, device: torch.device) -> Callable[[tuple[Tensor, ...]], Sequence[Tensor]]:
    names = [node.name for node in session.get_inputs()], [node.name for node in session.get_outputs()]
    templates: dict[tuple[torch.Size, ...], list[tuple[torch.Size, torch.dtype]]] = {}

    def execute(tensors: tuple[Tensor, ...]) -> Sequence[Tensor]:
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in templates:
            templates[shapes] = _output_shapes(flat, tensors)
        tensors = tuple(tensor.contiguous() for tensor in tensors)
        results = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in templates[shapes]]
        binding = session.io_binding()
        for bind, group, whose in ((binding.bind_input, tensors, names[0]), (binding.bind_output, results, names[1])):
            for label, tensor in zip(whose, group, strict=True):
                kind = _ELEMENTS[tensor.dtype]
                bind(label, device.type, device.index or 0, kind, tuple(tensor.shape), tensor.data_ptr())
        if device.type == "cuda":  # ONNX Runtime has a stream of its own: it does not take torch's default one
            torch.cuda.current_stream(device).synchronize()
        session.run_with_iobinding(binding)
        return results

    return execute


def _output_shapes(flat: Flat, tensors: Sequence[Tensor]) -> list[tuple[torch.Size, torch.dtype]]:
    """From a run without numbers."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, torch.no_grad():
        outputs = flat(*(fake.from_tensor(tensor) for tensor in tensors))
    return [(output.shape, output.dtype) for output in outputs]


def _quantised(path: Path) -> bytes:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.WARNING)  # it reports every node
    quantiser = MatMulNBitsQuantizer(onnx.load(path), bits=8, block_size=_BLOCK, is_symmetric=True, accuracy_level=1)
    quantiser.process()
    buffer = io.BytesIO()
    onnx.save(quantiser.model.model, buffer)
    return buffer.getvalue()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without remarks about packages that are not installed and about the exporter's own use of torch."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
