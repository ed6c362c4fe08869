"""Hugging Face architectures: each a table of config fields and a table of weights, read in both directions."""
