"""Triton kernels for sketches on GPUs."""
