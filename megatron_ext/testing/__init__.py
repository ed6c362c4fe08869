"""What tests of parallel training need: Gloo processes, tiny models, and the comparison of layouts. Public: users prove their own runs with it."""
