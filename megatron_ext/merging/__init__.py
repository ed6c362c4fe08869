"""One model out of several of the same shape: sums of their tensors, streamed."""
