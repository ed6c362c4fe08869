"""The model on megatron-core: its layers, optimizer and state, built through megatron-core's extension points."""
