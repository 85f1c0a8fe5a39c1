"""A CoTNet as an ONNX graph, node by node from its known structure."""
