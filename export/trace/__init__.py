"""From a checkpoint's model to an ONNX graph: the modules that are traced, their caches, the trace."""
