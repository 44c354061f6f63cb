"""Tensors of the Open Inference Protocol as the candles of a request, and a forecast as tensors.

A message is JSON. A tensor with `binary_data_size` among its parameters has its values behind the JSON, raw and
little-endian, in the order of the tensors; the header Inference-Header-Content-Length then says where the JSON ends.
"""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.forecaster import QUANTILE_COLUMNS
from service.api.errors import InputError, MalformedBody
from service.api.schemas import ForecastRequest, InferInput, InferRequest, TensorAnswer
from service.api.wire import strict_json, validated

HEADER_LENGTH: Final = "Inference-Header-Content-Length"
INPUTS: Final = (
    TensorAnswer(name="candles", datatype="FP64", shape=[-1, -1]),
    TensorAnswer(name="timestamp", datatype="INT64", shape=[-1]),
)
OUTPUTS: Final = (
    TensorAnswer(name="forecast", datatype="FP64", shape=[-1, 5]),
    TensorAnswer(name="timestamp", datatype="INT64", shape=[-1]),
    TensorAnswer(name="levels", datatype="FP64", shape=[-1]),
    TensorAnswer(name="quantiles", datatype="FP64", shape=[3, -1, -1]),
    TensorAnswer(name="prob_up", datatype="FP64", shape=[-1]),
)
_TYPES: Final = {"FP64": "<f8", "INT64": "<i8"}
_NEITHER: Final = ("model", "candles", "paths")  # the path, the tensors, and what no output holds
_UNNAMED: Final = "UNNAMED"


def read_inference(body: bytes, header_length: str | None) -> tuple[InferRequest, bytes]:
    """A request, and the raw tensors behind it; MalformedBody or RequestValidationError if it is none."""
    length = len(body)
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit() and int(header_length[:10]) <= length):
            raise MalformedBody(f"{HEADER_LENGTH} must be a length within the body")
        length = int(header_length[:10])
    return validated(strict_json(body[:length]), InferRequest), body[length:]


def forecast_asked(request: InferRequest, raw: bytes, reference: str) -> tuple[str, ForecastRequest]:
    """The symbol, and what a POST for the same forecast would hold; InputError or RequestValidationError."""
    given = dict(request.parameters)
    for name in _NEITHER:
        if name in given:
            raise InputError("is no parameter here", f"/parameters/{name}")
    given.pop("binary_data_output", None)
    symbol = given.pop("symbol", _UNNAMED if request.inputs else None)
    if not isinstance(symbol, str):
        raise InputError("name a symbol whose candles are stored, or send candles", "/parameters/symbol")
    if isinstance(levels := given.get("quantiles"), str):
        given["quantiles"] = _levels(levels)
    if type(microseconds := given.pop("timeout", None)) is int and microseconds > 0:
        given.setdefault("timeout_ms", max(1, microseconds // 1000))
    return symbol, validated({**given, "model": reference, "candles": _candles(request.inputs, raw)}, ForecastRequest)


def forecast_tensors(answer: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """A ForecastAnswer of H steps as its OUTPUTS; `quantiles` are those of high, low and close at each of `levels`."""
    times, *columns = zip(*answer["forecast"], strict=True)
    return {
        "forecast": np.array(columns, "<f8").T,
        "timestamp": np.array(times, "<i8"),
        "levels": np.array([float(level) for level in answer["quantiles"]["close"]], "<f8"),
        "quantiles": np.array([list(answer["quantiles"][name].values()) for name in QUANTILE_COLUMNS], "<f8"),
        "prob_up": np.array(answer["returns"]["prob_up"], "<f8"),
    }


def written(told: Mapping[str, Any], request: InferRequest, tensors: Mapping[str, NDArray[Any]]) -> tuple[bytes, int]:
    """An answer that says `told` and holds the tensors asked for, and the length of its JSON."""
    all_binary = request.parameters.get("binary_data_output") is True
    asked: dict[str, Mapping[str, Any]] = {each.name: each.parameters for each in request.outputs or ()}
    asked = asked or {name: {} for name in tensors}
    outputs, raw = [], []
    for its in (each for each in OUTPUTS if each.name in asked):
        values = tensors[its.name]
        described = {"name": its.name, "datatype": its.datatype, "shape": list(values.shape)}
        if asked[its.name].get("binary_data", all_binary) is True:
            raw.append(values.tobytes())
            outputs.append({**described, "parameters": {"binary_data_size": values.nbytes}})
        else:
            outputs.append({**described, "data": values.ravel().tolist()})
    head = json.dumps({**told, "outputs": outputs}).encode()
    return b"".join((head, *raw)), len(head)


def _candles(inputs: Sequence[InferInput], raw: bytes) -> list[list[Any]] | None:
    """Rows of the open's UTC ms, five prices and sizes, and perhaps the amount; None where no tensor was sent."""
    if not inputs:
        return None
    places = {each.name: place for place, each in enumerate(inputs)}
    if len(inputs) != len(places) or len(places) != len(INPUTS):
        raise InputError("must be candles and timestamp, each once, or neither", "/inputs")
    shape = inputs[places["candles"]].shape
    if len(shape) != 2 or shape[1] not in (5, 6):
        raise InputError("must be [T, 5] or [T, 6]", f"/inputs/{places['candles']}/shape")
    if inputs[places["timestamp"]].shape != shape[:1]:
        raise InputError("must be [T], as many as there are candles", f"/inputs/{places['timestamp']}/shape")
    values: dict[str, Sequence[Any]] = {}
    for place, each in enumerate(inputs):
        values[each.name], raw = _values(each, raw, f"/inputs/{place}")
    if raw:
        raise MalformedBody("there are more bytes than the inputs take")
    cells, width = values["candles"], shape[1]
    return [[time, *cells[row * width : (row + 1) * width]] for row, time in enumerate(values["timestamp"])]


def _values(tensor: InferInput, raw: bytes, pointer: str) -> tuple[Sequence[Any], bytes]:
    """The values of a tensor in the order of its last index, and the raw bytes that are left."""
    expected = next(each.datatype for each in INPUTS if each.name == tensor.name)
    if tensor.datatype != expected:
        raise InputError(f"must be {expected}", f"{pointer}/datatype")
    count, size = math.prod(tensor.shape), tensor.parameters.get("binary_data_size")
    if size is None:
        data: Sequence[Any] = tensor.data or []
        if len(tensor.shape) == 2 and all(type(row) is list and len(row) == tensor.shape[1] for row in data):
            data = list(chain.from_iterable(data))
        if len(data) != count:
            raise InputError("does not fit the shape", f"{pointer}/data")
        return data, raw
    if type(size) is not int or size != 8 * count or size > len(raw):
        raise InputError("must be what the shape takes, and so many bytes be there", f"{pointer}/parameters")
    return np.frombuffer(raw[:size], _TYPES[tensor.datatype]).tolist(), raw[size:]


def _levels(text: str) -> list[float]:
    try:
        return [float(level) for level in text.split(",")]
    except ValueError:
        raise InputError("must be numbers with commas between them", "/parameters/quantiles") from None
