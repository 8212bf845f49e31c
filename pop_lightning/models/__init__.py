"""How Hugging Face decoders are built and loaded."""
