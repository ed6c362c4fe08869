"""The parts of a MoE layer that this framework brings: router, experts and their statistics."""
