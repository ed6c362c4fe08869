"""Where layers come from: one BackendSpecProvider for each library of kernels."""

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.transformer_config import TransformerConfig


def spec_provider(config: TransformerConfig) -> BackendSpecProvider:
    """Return what the layers of `config` are built from; `transformer_config` wrote the choice into it."""
    if config.transformer_impl == "transformer_engine":
        # Imported only here: where Transformer Engine is missing, megatron-core has no such classes.
        from megatron_ext.mcore.backends.transformer_engine import TransformerEngineSpecProvider

        return TransformerEngineSpecProvider()
    from megatron_ext.mcore.backends.torch import TorchSpecProvider

    return TorchSpecProvider()
