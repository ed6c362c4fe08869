"""Rotary position embedding with every scaling of the field, as inverse frequencies and a factor on cosine and sine."""

#   S sequence of the whole context-parallel group, R rotated width of a head

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.common.embeddings import RotaryEmbedding as CoreRotaryEmbedding
from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.config import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    ModelConfig,
    YarnRopeScaling,
)


def inverse_frequencies(model: ModelConfig, length: int) -> Tensor:
    """Angle in radians by which each pair of dimensions turns from one position to the next.

    Equal to what transformers' `ROPE_INIT_FUNCTIONS` return for the same parameters.

    Args:
        length: tokens of the sequence; dynamic scaling depends on it.

    Returns:
        [R / 2] in fp32, fastest first.
    """
    width, scaling = model.rotary_width, model.rope_scaling
    base = model.rotary_base
    if isinstance(scaling, DynamicRopeScaling):
        base = _dynamic_base(base, width, scaling, length, model.max_position_embeddings)
    frequencies = 1.0 / (base ** (torch.arange(0, width, 2, dtype=torch.float) / width))
    if isinstance(scaling, LinearRopeScaling):
        return frequencies / scaling.factor
    if isinstance(scaling, Llama3RopeScaling):
        return _llama3(frequencies, scaling)
    if isinstance(scaling, YarnRopeScaling):
        return _yarn(frequencies, base, scaling)
    return frequencies


def _dynamic_base(base: float, width: int, scaling: DynamicRopeScaling, length: int, original: int) -> float:
    """Theta that lets the slowest dimension turn as far over `length` as it did over `original` tokens."""
    stretch = scaling.factor * max(length, original) / original - (scaling.factor - 1)
    return float(base * stretch ** (width / (width - 2)))


def _llama3(frequencies: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    """Llama 3.1 (arXiv 2407.21783): by how often a dimension turns within the original context."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def _yarn(frequencies: Tensor, base: float, scaling: YarnRopeScaling) -> Tensor:
    """YaRN (arXiv 2309.00071), section 3.2: between the dimensions that turn `beta_slow` and `beta_fast` times."""
    width = 2 * len(frequencies)

    def dimension(turns: float) -> float:
        return width * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    ramp = (torch.arange(len(frequencies)) - first) / (last - first if last != first else 1e-3)
    interpolated = ramp.clamp(0, 1)
    return interpolated * frequencies / scaling.factor + (1 - interpolated) * frequencies


def attention_factor(model: ModelConfig) -> float:
    """Factor on cosine and sine of queries and keys (YaRN, section 3.3; DeepSeek's `mscale` changes it)."""
    scaling = model.rope_scaling
    if not isinstance(scaling, YarnRopeScaling):
        return 1.0
    if scaling.mscale and scaling.mscale_all_dim:
        return _magnitude(scaling.factor, scaling.mscale) / _magnitude(scaling.factor, scaling.mscale_all_dim)
    return _magnitude(scaling.factor, 1.0)


def softmax_factor(model: ModelConfig) -> float:
    """Factor on the logits of latent attention besides 1 / sqrt(head width): DeepSeek's `mscale_all_dim`, squared."""
    scaling = model.rope_scaling
    return _magnitude(scaling.factor, scaling.mscale_all_dim) ** 2 if isinstance(scaling, YarnRopeScaling) else 1.0


def _magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


class RotaryEmbedding(CoreRotaryEmbedding):
    """Angles of every position, in megatron-core's layout and under its interface.

    Attributes:
        attention_factor: what cosine and sine are multiplied by.
    """

    def __init__(self, model: ModelConfig, config: TransformerConfig, cp_group: torch.distributed.ProcessGroup) -> None:
        torch.nn.Module.__init__(self)
        self.model, self.rotary_interleaved, self.cp_group = model, config.rotary_interleaved, cp_group
        self.attention_factor = attention_factor(model)
        self.device = torch.get_default_device()
        self._angles: dict[tuple[int, int, bool], Tensor] = {}

    def set_base(self, base: float) -> None:
        """Turn with the base `base` from now on."""
        if base != self.model.rotary_base:
            self.model = replace(self.model, rotary_base=base)
            self._angles.clear()

    def forward(self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None) -> Tensor:
        """Angles [S, 1, 1, R] of `max_seq_len` positions from `offset` on; under CP those of this rank's tokens.

        Kept from call to call: a run has few lengths.
        """
        group = cp_group or self.cp_group
        split = group.size() > 1 and not packed_seq
        key = (max_seq_len, offset, split)
        if key not in self._angles:
            angles = self.get_emb(max_seq_len, offset)
            self._angles[key] = get_pos_emb_on_this_cp_rank(angles, 0, group) if split else angles
        return self._angles[key]

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Angles [S, 1, 1, R] before the context-parallel split."""
        frequencies = inverse_frequencies(self.model, offset + max_seq_len).to(self.device)
        positions = torch.arange(offset, offset + max_seq_len, device=self.device, dtype=torch.float)
        angles = torch.outer(positions, frequencies)
        both = torch.stack((angles, angles), dim=-1) if self.rotary_interleaved else torch.cat((angles, angles), dim=-1)
        return both.view(max_seq_len, 1, 1, -1)


class LatentRotaryEmbedding(RotaryEmbedding):
    """The same for multi-head latent attention, which takes the factor from here too."""

    def forward(  # type: ignore[override]
        self, max_seq_len: int, offset: int = 0, packed_seq: bool = False, cp_group: Any = None
    ) -> tuple[Tensor, float]:
        """The angles, and what cosine and sine are multiplied by."""
        return super().forward(max_seq_len, offset, packed_seq, cp_group), self.attention_factor


def cosines_and_sines(angles: Tensor, factor: float, *, neighbours: bool) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each pair of dimensions times `factor`, [S, R / 2]: what our own kernel takes.

    Args:
        angles: [S, 1, 1, R], which have each pair's twice.
        neighbours: side by side; otherwise R / 2 apart.
    """
    pairs = angles[..., ::2] if neighbours else angles[..., : angles.shape[-1] // 2]
    pairs_SR = pairs.reshape(len(angles), -1)
    return pairs_SR.cos().mul_(factor), pairs_SR.sin().mul_(factor)


def set_rotary_base(chunks: Iterable[torch.nn.Module], base: float) -> None:
    """Have every rotary embedding of `chunks` turn with the base `base`, as a stage of a run asks for."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, RotaryEmbedding):
                module.set_base(base)
