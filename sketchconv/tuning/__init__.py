"""Adaptation: a sketch's LUTs are trained on a task, its indices stay, and a delta is shipped."""
