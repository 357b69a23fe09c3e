"""Calibration: sketches fitted to what a model's layers see on a text."""
