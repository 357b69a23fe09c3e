"""Where weights come from: Hugging Face folders, the Hub, GGUF files."""
