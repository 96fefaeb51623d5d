"""A GGUF file as a checkpoint: the only place that knows the format and what llama.cpp means by it."""
