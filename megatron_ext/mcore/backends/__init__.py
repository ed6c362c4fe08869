"""Where layers come from: one LayerProvider for each library of kernels."""

from megatron_ext.mcore.layer_provider import LayerProvider
from megatron_ext.mcore.transformer_config import LayerConfig


def layer_provider(config: LayerConfig, *, fp8: bool = False) -> LayerProvider:
    """Return what the layers of `config` are built from; `transformer_config` wrote the choice into it.

    Args:
        fp8: for layers whose matrix products run in the torch backend's fp8.
    """
    if config.transformer_impl == "transformer_engine":
        # Imported only here: where Transformer Engine is missing, megatron-core has no such classes.
        from megatron_ext.mcore.backends.transformer_engine import TransformerEngineLayers

        return TransformerEngineLayers()
    from megatron_ext.mcore.backends.torch import Fp8TorchLayers, TorchLayers

    return Fp8TorchLayers() if fp8 else TorchLayers()
