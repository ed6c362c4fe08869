"""What tests of parallel training need: Gloo processes, tiny models, the comparison of layouts. Open to users."""
