"""Numerics on arrays: NumPy reference, Numba CPU kernels. Nothing here knows of files."""
