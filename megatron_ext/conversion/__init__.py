"""Between Megatron and Hugging Face: the engine that applies an architecture's tables, and the proof that it did."""
