"""Quantized checkpoints of other projects as sketches: indices and tables taken over, exactly."""
