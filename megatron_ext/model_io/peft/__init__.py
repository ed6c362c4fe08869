"""Adapters as the PEFT library has them, in both directions."""
