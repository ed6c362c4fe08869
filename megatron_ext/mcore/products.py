"""Matrix products by the faster of torch's two libraries on CPU, also added to an fp32 sum in place."""

#   M contracted dimension; K, N the others

import functools
import re
from pathlib import Path

import torch
from torch import Tensor


def product(a_KM: Tensor, b_MN: Tensor) -> Tensor:
    """Return `a @ b`; without a graph, for the functions of our own that have a backward pass.

    Args:
        a_KM: of two dimensions or more.
        b_MN: of two.
    """
    if not by_onednn(a_KM):
        return a_KM @ b_MN
    if a_KM.dim() == 2 and a_KM.shape[0] > b_MN.shape[1] and not a_KM.is_contiguous():
        # oneDNN's first operand is copied where it does not lie in order: let it be the smaller one.
        return _onednn(b_MN.t(), a_KM.t()).t()
    return _onednn(a_KM, b_MN)


def write_product(out_KN: Tensor, a_KM: Tensor, b_MN: Tensor) -> None:
    """Write `a @ b` of two matrices into `out`."""
    if by_onednn(a_KM):
        out_KN.copy_(product(a_KM, b_MN))
    else:
        torch.mm(a_KM, b_MN, out=out_KN)


def add_product(sum_KN: Tensor, a_KM: Tensor, b_MN: Tensor) -> None:
    """Add `a @ b` of two matrices to a sum in fp32, without rounding the product where the device can."""
    if a_KM.is_cuda and a_KM.dtype != sum_KN.dtype:
        torch.addmm(sum_KN, a_KM, b_MN, out_dtype=sum_KN.dtype, out=sum_KN)
    elif a_KM.dtype == sum_KN.dtype and not by_onednn(a_KM):
        sum_KN.addmm_(a_KM, b_MN)
    else:
        sum_KN += product(a_KM, b_MN)


def is_compiled(operand: Tensor) -> bool:
    """Whether a product with `operand` on CPU is by a kernel that was compiled for its shape."""
    return operand.dtype != torch.float32 or by_onednn(operand)


def by_onednn(operand: Tensor) -> bool:
    """Whether a product with `operand` is oneDNN's by our choice: in fp32, which torch gives to MKL."""
    is_fp32_on_cpu = operand.dtype is torch.float32 and operand.device.type == "cpu"
    return is_fp32_on_cpu and operand.numel() > 0 and _mkl_is_slow()


def _onednn(a_KM: Tensor, b_MN: Tensor) -> Tensor:
    # What torch.compile makes of a linear layer; the only way to oneDNN's fp32 products, in full fp32, that torch has.
    output: Tensor = torch.ops.mkldnn._linear_pointwise(a_KM, b_MN.t(), None, "none", [], "")
    return output


@functools.cache
def _mkl_is_slow() -> bool:
    """Whether MKL leaves half of this CPU unused: it takes AVX-512 on Intel's alone.

    107 GFLOP/s a core against oneDNN's 235 on an AMD EPYC (benchmarks/RESULTS.md). Told by what the CPU is and not by a
    clock: a run that goes on must compute as it did.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return has_avx512 and _cpu_vendor() not in (None, "GenuineIntel")


def _cpu_vendor() -> str | None:
    """Who made this CPU, as Linux says it; None elsewhere."""
    try:
        found = re.search(r"^vendor_id\s*:\s*(\S+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1] if found else None
