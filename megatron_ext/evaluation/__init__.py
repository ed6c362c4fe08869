"""What a model is worth, and what it forgot: losses on texts, samples, routing, choices among checkpoints."""
