"""Recovery: LUT values trained against the dense model, with the indices as they are."""
