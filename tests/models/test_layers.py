"""Errors of torch, ONNX Runtime and Python are told apart from those that say that memory ran out."""

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from models.layers import ran_out_of_memory


def of_onnx_runtime() -> None:
    size = onnx.helper.make_tensor_value_info("size", onnx.TensorProto.INT64, [1])
    zeros = onnx.helper.make_tensor_value_info("zeros", onnx.TensorProto.FLOAT, [None])
    graph = onnx.helper.make_graph([onnx.helper.make_node("ConstantOfShape", ["size"], ["zeros"])], "", [size], [zeros])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    session.run(None, {"size": np.array([1 << 50])})


@pytest.mark.parametrize("take", [lambda: bytearray(1 << 60), lambda: torch.empty(1 << 58), of_onnx_runtime])
def test_whoever_runs_out_of_memory_is_understood(take: Callable[[], object]) -> None:
    with pytest.raises(Exception) as found:  # noqa: PT011 - each has its own kind
        take()
    assert ran_out_of_memory(found.value)


def test_other_errors_are_others() -> None:
    with pytest.raises(RuntimeError) as found:
        torch.zeros(2) @ torch.zeros(3)
    assert not ran_out_of_memory(found.value)
