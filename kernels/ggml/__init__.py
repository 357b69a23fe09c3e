"""Blocks of ggml's quantized types: encoders that minimise a weighted error, and decoders."""
