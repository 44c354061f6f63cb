"""Ways to execute a decoder's named functions: eager, compiled, onnx, cuda_graph."""
