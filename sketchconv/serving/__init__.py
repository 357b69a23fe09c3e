"""`sketchconv serve`: an OpenAI-compatible server of one sketch and its task adapters."""
