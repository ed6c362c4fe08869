"""What is known of the tensors of a model: names, shapes, placement, initial values, storage names, seeds. No torch."""
