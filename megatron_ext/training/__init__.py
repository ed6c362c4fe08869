"""The training loop and everything one run has in its hands."""

import megatron_ext.runtime  # noqa: F401 - prepares for megatron-core, so it comes before it
