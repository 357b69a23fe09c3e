"""Exports of a model to formats of other programs: GGUF, and dense safetensors."""
