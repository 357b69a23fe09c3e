"""One decoding step of a whole llama-like network in compiled code (CPU)."""
