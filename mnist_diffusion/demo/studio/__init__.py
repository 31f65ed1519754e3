"""A static page that samples from pipelines in the visitor's browser, with ONNX Runtime Web."""
