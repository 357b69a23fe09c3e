"""The parts of `make_vectors.py`: standard library only, no code shared with any reader."""
