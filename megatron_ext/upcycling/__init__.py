"""Dense checkpoints to MoE checkpoints: methods over a stream of tensors, and the check of what they promise."""
