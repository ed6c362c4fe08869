"""Products by either of torch's two libraries on CPU are the product, whatever their operands' order in memory."""

import pytest
import torch
from torch import Tensor

from megatron_ext.mcore import products

# Sums of up to 96 terms, rounded with 2^-24 each in fp32; in bf16 the result is rounded with 2^-9.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}


@pytest.fixture(params=[False, True], ids=["as torch", "oneDNN"])
def onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(products, "_mkl_is_slow", lambda: request.param)
    return bool(request.param)


def operands(dtype: torch.dtype, shape: tuple[int, ...], inner: int, width: int, order: str) -> tuple[Tensor, Tensor]:
    """Factors of so many numbers, of which those named in `order` lie as the transpose of what they are."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(*shape, inner, generator=generator).to(dtype)
    b = torch.randn(inner, width, generator=generator).to(dtype)
    a = a.transpose(-1, -2).contiguous().transpose(-1, -2) if "a" in order else a
    return a, b.t().contiguous().t() if "b" in order else b


def error(measured: Tensor, exact: Tensor) -> float:
    """The largest, relative to the largest number."""
    return float((measured.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("order", ["", "a", "b", "ab"])
@pytest.mark.parametrize("shape", [(33,), (4,), (3, 5)], ids=str)
def test_products(onednn: bool, dtype: torch.dtype, order: str, shape: tuple[int, ...]) -> None:
    a, b = operands(dtype, shape, 96, 17, order)
    exact = a.double() @ b.double()
    errors = [error(products.product(a, b), exact)]
    if len(shape) == 1:
        written, total = torch.empty(*shape, 17, dtype=dtype), torch.ones(*shape, 17)
        products.write_product(written, a, b)
        products.add_product(total, a, b)
        errors += [error(written, exact), error(total - 1, exact)]
    print(f"{dtype} {shape} {order}: {max(errors):.1e}")
    assert products.product(a, b).dtype == dtype
    assert max(errors) < TOLERANCE[dtype]


def test_no_terms_and_no_rows(onednn: bool) -> None:
    total = torch.ones(3, 2)
    products.add_product(total, torch.empty(3, 0), torch.empty(0, 2))
    assert total.tolist() == [[1.0, 1.0]] * 3
    assert products.product(torch.empty(0, 3), torch.ones(3, 2)).shape == (0, 2)


def test_full_fp32_by_onednn() -> None:
    """Not the bf16 or TF32 products that oneDNN has for fp32 numbers: 1 + 2^-20 would be 1."""
    a = torch.full((32, 1), 1 + 2**-20)
    assert products._onednn(a, torch.ones(1, 32)).unique().tolist() == [1 + 2**-20]


@pytest.mark.parametrize(
    ("vendor", "capability", "slow"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_where_onednn_is_taken(vendor: str, capability: str, slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in (torch.backends.mkl, torch.backends.mkldnn):
        monkeypatch.setattr(library, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "_cpu_vendor", lambda: vendor)
    assert products._mkl_is_slow.__wrapped__() is slow
