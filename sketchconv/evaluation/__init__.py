"""Evaluation: what a model predicts, against a text and against the model that it came from."""
