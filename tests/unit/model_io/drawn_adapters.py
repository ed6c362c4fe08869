"""Random adapters of a model, as a checkpoint of a run would have them."""

from pathlib import Path

import torch
from torch import Tensor

from megatron_ext.canonical.adapters import adapter_tensors
from megatron_ext.canonical.seeds import seed_from_name
from megatron_ext.checkpoint.streams import TensorSpec
from megatron_ext.config import LoraConfig, ModelConfig
from megatron_ext.model_io.adapters import stream_fingerprint, write_adapters
from megatron_ext.model_io.open import open_checkpoint


class Drawn:
    """A stream of adapter tensors drawn by name."""

    def __init__(self, model: ModelConfig, config: LoraConfig, std: float) -> None:
        self.specs = {name: TensorSpec(t.shape, torch.float32) for name, t in adapter_tensors(model, config).items()}
        self._std = std

    def read(self, name: str) -> Tensor:
        generator = torch.Generator().manual_seed(seed_from_name(0, name))
        shape = self.specs[name].shape
        std = self._std if name.endswith(".B") else shape[1] ** -0.5
        return torch.empty(shape).normal_(0, 1, generator=generator) * std


def write_drawn(
    base: Path, target: Path, config: LoraConfig, *, std: float = 0.1, tokenizer: Path | None = None
) -> Path:
    """Write adapters of the model at `base` whose B has this standard deviation; returns `target`."""
    opened = open_checkpoint(base)
    own = stream_fingerprint(opened.tensors, torch.float32, opened.model.vocab_size)
    write_adapters(target, Drawn(opened.model, config, std), opened.model, config, base, own, tokenizer=tokenizer)
    return target
