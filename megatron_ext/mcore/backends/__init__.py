"""Where layers come from: one BackendSpecProvider for each library of kernels."""

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.transformer_config import TransformerConfig


def spec_provider(config: TransformerConfig, *, fp8: bool = False) -> BackendSpecProvider:
    """Return what the layers of `config` are built from; `transformer_config` wrote the choice into it.

    Args:
        fp8: for layers whose matrix products run in the torch backend's fp8.
    """
    if config.transformer_impl == "transformer_engine":
        # Imported only here: where Transformer Engine is missing, megatron-core has no such classes.
        from megatron_ext.mcore.backends.transformer_engine import TransformerEngineSpecProvider

        return TransformerEngineSpecProvider()
    from megatron_ext.mcore.backends.torch import Fp8TorchSpecProvider, TorchSpecProvider

    return Fp8TorchSpecProvider() if fp8 else TorchSpecProvider()
