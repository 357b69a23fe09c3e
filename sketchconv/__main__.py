"""`python -m sketchconv` is the `sketchconv` command."""

from sketchconv.cli.main import run

run()
