"""Cross-entropy over a split and padded vocabulary against torch's over the whole one in float64."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from megatron_ext.config import ParallelConfig, RuntimeConfig
from megatron_ext.mcore import cross_entropy
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.testing.pool import GlooPool

VOCABULARY, PADDED = 45, 64


def errors(dtype: torch.dtype, parallel: ParallelConfig) -> tuple[float, float, bool]:
    """Largest error of loss and log(Z), and of this rank's gradient; whether that lies in the logits' memory."""
    split_process_group(parallel, RuntimeConfig(device="cpu"))
    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    generator = torch.Generator().manual_seed(0)
    whole = (4 * torch.randn(3, 3, PADDED, generator=generator)).to(dtype)
    labels = torch.randint(0, VOCABULARY, (3, 3), generator=generator)
    upstream = torch.rand(2, 3, 3, generator=generator)
    exact = whole[..., :VOCABULARY].double().requires_grad_()
    losses = F.cross_entropy(exact.view(-1, VOCABULARY), labels.view(-1), reduction="none").view(3, 3)
    expected = torch.stack((losses, exact.logsumexp(dim=-1)))
    expected.backward(upstream.double())
    width = PADDED // group.size()
    logits = whole[..., group.rank() * width : (group.rank() + 1) * width].clone().requires_grad_()
    several_blocks = 2 * PADDED // dist.get_world_size()  # the last one smaller
    with mock.patch.dict(cross_entropy.BLOCK, cpu=several_blocks):
        measured = torch.stack(cross_entropy.vocab_parallel_cross_entropy(logits, labels, VOCABULARY, group))
        (gradient,) = torch.autograd.grad(measured, logits, upstream)
    wanted = F.pad(exact.grad, (0, PADDED - VOCABULARY))[..., group.rank() * width : (group.rank() + 1) * width]
    in_place = gradient.data_ptr() == logits.data_ptr()
    return float((measured.detach() - expected).abs().max()), float((gradient - wanted).abs().max()), in_place


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 4])
def test_equals_torch_in_float64(dtype: torch.dtype, ranks: int, pool: GlooPool) -> None:
    """Of four ranks the third has real and padded entries, the fourth padding alone."""
    for loss, gradient, in_place in pool.run(ranks, errors, dtype, ParallelConfig(tensor_model_parallel_size=ranks)):
        print(f"{dtype}, {ranks} ranks: loss {loss:.1e}, gradient {gradient:.1e}")
        assert loss < 2e-6  # computed in fp32 from the same logits: losses of about 10 times 6e-8
        assert gradient < (1e-6 if dtype == torch.float32 else 2e-3)  # of at most 1; bf16 rounds it to 2^-9
        assert in_place
