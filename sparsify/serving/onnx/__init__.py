"""Exports as ONNX graphs for TensorRT."""
