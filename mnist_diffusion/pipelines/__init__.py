"""The pipeline class, samplers, pipeline folders, model cards, ONNX export."""
