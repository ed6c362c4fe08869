"""The loss by parts of the vocabulary, and products added to fp32 sums, on a GPU and on CPU in fp32 or more."""

import pytest
import torch
import torch.nn.functional as F

from megatron_ext.mcore import cross_entropy
from megatron_ext.mcore.output_layer import _OutputLoss
from megatron_ext.mcore.products import add_product
from megatron_ext.runtime.accelerators import kernels_fault, this_machine

TOKENS, HIDDEN, VOCABULARY, PADDED = 256, 512, 5000, 5120


class OneRank:
    """Stands for the TP group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


@pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_and_gradients_are_those_of_all_logits(
    dtype: torch.dtype, triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if triton and (missing := kernels_fault(this_machine())):
        pytest.skip(missing)
    monkeypatch.setitem(cross_entropy.BLOCK, "cuda", TOKENS * 1024)  # five parts
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, 1, HIDDEN, generator=generator).to(dtype)
    weight = (torch.randn(PADDED, HIDDEN, generator=generator) / 16).to(dtype)
    labels = torch.randint(0, VOCABULARY, (TOKENS, 1), generator=generator)
    upstream = torch.rand(2, TOKENS, 1, generator=generator)
    exact = [t.float().requires_grad_() for t in (hidden, weight)]
    logits = F.linear(*exact)[..., :VOCABULARY]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
    expected = torch.stack((losses, logits.logsumexp(dim=-1)))
    wanted = torch.autograd.grad(expected, exact, upstream)
    here = [t.cuda().requires_grad_() for t in (hidden, weight)]
    measured = torch.stack(_OutputLoss.apply(*here, None, labels.cuda(), VOCABULARY, OneRank(), False, triton))
    found = torch.autograd.grad(measured, here, upstream.cuda())
    # bf16: logits, their gradients and what is given back are each rounded to 2^-9 of themselves.
    limit = 1e-5 if dtype is torch.float32 else 1e-2
    for a, b in zip((measured, *found), (expected, *wanted), strict=True):
        error = float((a.detach().float().cpu() - b.detach()).norm() / b.detach().norm())
        print(f"{dtype}, triton {triton}: {error:.1e}")
        assert error < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_are_added_without_rounding_in_between(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, width, generator=generator).to(dtype) for width in (384, 512))
    total = torch.randn(384, 512, generator=generator)
    here = total.cuda()
    for _ in range(2):
        add_product(here, a.cuda().t(), b.cuda())
    expected = total.double() + 2 * (a.double().t() @ b.double())
    error = float((here.cpu().double() - expected).norm() / expected.norm())
    print(f"{dtype}: {error:.1e}")
    assert error < 1e-5  # a product that was rounded to bf16 would be off by 1e-3
