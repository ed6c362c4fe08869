"""The training loop and everything one run has in its hands."""
