"""Checkpoints on disk: the torch_dist format, training state, and streams of canonically named tensors."""
