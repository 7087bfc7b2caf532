"""Servers that run the models of this package: a plug-in of vLLM, and a command for `transformers serve`."""
