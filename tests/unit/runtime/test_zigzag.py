"""Zigzag slices are megatron-core's, cover a sequence once, and are put back in order."""

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils

from megatron_ext.runtime.zigzag import zigzag_restore, zigzag_slice
from megatron_ext.testing.pool import GlooPool


@pytest.mark.parametrize("size", [1, 2, 4])
def test_slices_put_back_are_the_sequence(size: int) -> None:
    whole = torch.arange(48).view(16, 3)
    slices = [zigzag_slice(whole, rank, size, dim=0) for rank in range(size)]
    assert torch.equal(zigzag_restore(torch.cat(slices), size), whole)


def both_slices(size: int) -> tuple[list[list[int]], list[float]]:
    """This rank's slice of rows of positions, and the positions for which megatron-core rotates."""
    from megatron.core import parallel_state

    from megatron_ext.config import ParallelConfig, RuntimeConfig
    from megatron_ext.runtime.process_groups import split_process_group

    groups = split_process_group(ParallelConfig(context_parallel_size=size), RuntimeConfig(device="cpu"))
    rows = torch.arange(16).expand(2, 16)
    positions = torch.arange(16.0).view(16, 1, 1, 1)
    rotated = rope_utils.get_pos_emb_on_this_cp_rank(positions, 0, parallel_state.get_context_parallel_group())
    return zigzag_slice(rows, groups.cp.rank(), size, dim=1).tolist(), rotated.flatten().tolist()


@pytest.mark.parametrize("size", [2, 4])
def test_slices_are_those_that_megatron_core_rotates(size: int, pool: GlooPool) -> None:
    for ours, rotated in pool.run(size, both_slices, size):
        assert ours == [rotated, rotated]
