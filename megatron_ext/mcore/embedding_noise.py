"""NEFTune's noise on embeddings, the same in every layout: drawn for whole rows, of which each rank takes its share."""

#   S sequence of all ranks, L sequence of this rank, B micro-batch, H hidden

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.canonical.seeds import seed_from_name
from megatron_ext.runtime.zigzag import zigzag_slice


def add_noise(
    embedded_LBH: Tensor,
    alpha: float,
    seeds_B: Tensor,
    documents: Sequence[Sequence[int]],
    *,
    context: dist.ProcessGroup,
    tensor: dist.ProcessGroup | None,
) -> Tensor:
    """Add noise between -1 and 1 times alpha / sqrt(tokens of the document x H), as arXiv 2310.05914 does in training.

    Args:
        seeds_B: of the samples; the noise is a pure function of them.
        documents: of each row the lengths of its documents, which fill the whole sequence.
        context: each of these ranks has a zigzag slice of the sequence.
        tensor: each of these ranks has a slice of that; None without sequence parallelism.
    """
    whole = [
        _row(int(seed), lengths, embedded_LBH.shape[-1], alpha, embedded_LBH.device)
        for seed, lengths in zip(seeds_B.tolist(), documents, strict=True)
    ]
    noise_LBH = zigzag_slice(torch.stack(whole, dim=1), context.rank(), context.size(), dim=0)
    if tensor is not None:
        noise_LBH = noise_LBH.chunk(tensor.size())[tensor.rank()]
    return embedded_LBH + noise_LBH.to(embedded_LBH.dtype)


def _row(seed: int, lengths: Sequence[int], hidden: int, alpha: float, device: torch.device) -> Tensor:
    """The noise of one row, [S, H] in fp32."""
    # Not the numbers that a noisy router draws for the sample.
    generator = torch.Generator(device).manual_seed(seed_from_name(seed, "embedding noise"))
    noise_SH = 2 * torch.rand(sum(lengths), hidden, generator=generator, device=device) - 1
    scales = torch.tensor([alpha / math.sqrt(length * hidden) for length in lengths], device=device)
    return noise_SH * scales.repeat_interleave(torch.tensor(lengths, device=device))[:, None]
