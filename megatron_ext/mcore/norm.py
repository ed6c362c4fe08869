"""RMSNorm and LayerNorm in plain PyTorch that work under sequence parallelism."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with the mark that makes megatron-core sum its weight's gradient over the TP group.

    Under sequence parallelism each TP rank normalises its own part of the sequence, so each has only a part of the
    gradient. megatron-core's own wrapper around torch norms refuses that case.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, device=torch.get_default_device(), dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm (with bias) with the same mark on both parameters."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, device=torch.get_default_device(), dtype=config.params_dtype)
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
