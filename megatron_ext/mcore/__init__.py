"""The model on megatron-core: its layers, optimizer and state, built through megatron-core's extension points."""

import megatron_ext.runtime  # noqa: F401 - prepares for megatron-core, so it comes before it
