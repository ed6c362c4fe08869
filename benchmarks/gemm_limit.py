"""What the machine can do: matrix products with nothing around them; each step returns its count of operations."""

from typing import Any

from interleaving import Step


def _dtype(precision: str) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def square_limit(precision: str, width: int = 2048, repeats: int = 10) -> Step:
    """Products of two square matrices."""
    import torch

    a, b = torch.randn(2, width, width).to(_dtype(precision))
    out = torch.empty_like(a)

    def step() -> float:
        for _ in range(repeats):
            torch.mm(a, b, out=out)
        return 2.0 * width**3 * repeats

    return step


def grouped_limit(
    precision: str, groups: int = 16, rows: int = 512, inner: int = 256, columns: int = 512, repeats: int = 20
) -> Step:
    """One `grouped_mm` over `groups` products [rows, inner] x [inner, columns]."""
    import torch

    tokens = torch.randn(groups * rows, inner).to(_dtype(precision))
    weights = torch.randn(groups, columns, inner).to(_dtype(precision)).transpose(1, 2)
    ends = torch.arange(1, groups + 1, dtype=torch.int32) * rows

    def step() -> float:
        for _ in range(repeats):
            torch.nn.functional.grouped_mm(tokens, weights, offs=ends)
        return 2.0 * groups * rows * inner * columns * repeats

    return step


def model_limit(size: Any, precision: str) -> Step:
    """Every matrix product of a training step (forward and both gradients) and its attention, at the model's shapes.

    By the faster of torch's libraries, as our step takes it.
    """
    import torch

    from megatron_ext.mcore.products import product

    dtype = _dtype(precision)
    products = [
        (torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(m, n).to(dtype), count)
        for m, n, k, count in size.products()
    ]
    width = size.hidden // size.heads
    query, key, value = (
        torch.randn(size.batch, heads, size.length, width).to(dtype).requires_grad_()
        for heads in (size.heads, size.query_groups, size.query_groups)
    )

    def attention() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=size.heads != size.query_groups
        )

    upstream = torch.randn_like(attention())

    def step() -> float:
        operations = 0.0
        for x, weight, grad, count in products:
            for _ in range(count):
                product(x, weight.t())
                product(grad, weight)
                product(grad.t(), x)
            operations += 6.0 * x.numel() * weight.shape[0] * count
        for _ in range(size.layers):
            torch.autograd.grad(attention(), (query, key, value), upstream)
        return operations

    return step
