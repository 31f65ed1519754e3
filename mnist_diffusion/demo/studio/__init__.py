"""A static page that draws with pipelines in the visitor's browser, through ONNX Runtime's build for the web."""
