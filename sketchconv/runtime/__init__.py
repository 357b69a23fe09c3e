"""Sketches at run time: torch modules, the transformers quantizer, loading, generation."""
