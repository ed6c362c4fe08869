"""What torch.compile makes of the operations that are several kernels today."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import answers
import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(projected: Tensor, weights: Tensor) -> Tensor:
    """SwiGLU of experts, with their routing weights."""
    gate, up = projected.float().chunk(2, dim=-1)
    return (F.silu(gate) * up * weights.unsqueeze(-1)).to(projected.dtype)


def residual_and_norm(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm of a sum."""
    total = (x + residual).float()
    return (total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5) * weight).to(x.dtype)


def rotary(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in halves."""
    a, b = t.chunk(2, dim=-1)
    return t * cos + torch.cat((-b, a), dim=-1) * sin


def largest(x: Tensor) -> Tensor:
    """The largest magnitude."""
    return x.abs().amax()


def cast_both_ways(x: Tensor, scale: Tensor) -> Tensor:
    """FP8 in both layouts."""
    values = (x * scale).to(torch.float8_e4m3fn)
    return torch.stack((values.view(torch.uint8).flatten(), values.t().contiguous().view(torch.uint8).flatten()))


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of every token."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


@dataclass(frozen=True)
class Operation:
    """One line of the answer."""

    name: str
    function: Callable[..., Tensor]
    inputs: Sequence[Tensor]
    moved: int
    """Bytes."""
    predicted: float
    """Milliseconds on an H100."""

    def measure(self) -> dict[str, float]:
        """Milliseconds, with the backward pass where an input has a gradient."""
        compiled = torch.compile(self.function, dynamic=False)
        begin = time.perf_counter()
        out = compiled(*self.inputs)
        wanted = [tensor for tensor in self.inputs if tensor.requires_grad]
        grad = torch.randn_like(out) if wanted else None

        def run() -> None:
            result = compiled(*self.inputs)
            if wanted:
                torch.autograd.grad(result, wanted, grad)

        run()
        spent = time.perf_counter() - begin
        ms = answers.timed(run)
        return {"ms": round(ms, 4), "TB/s": round(self.moved / ms / 1e9, 3), "compile s": round(spent, 1)}


def operations(where: torch.device) -> list[Operation]:
    """Those of the part `kernels`, in its sizes."""
    small = 1 if where.type == "cuda" else 16
    tokens, hidden, ffn, rows, width = 8192 // small, 4096 // small, 14336 // small, 49152 // small, 1408 // small
    length, vocabulary = 4096 // small, 32768 // small

    def random(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(*shape, device=where).to(torch.bfloat16).requires_grad_(grad)

    gated = [random(rows, 2 * width), torch.rand(rows, device=where).requires_grad_()]
    normed = [random(tokens, hidden), random(tokens, hidden), random(hidden)]
    angles = [random(length, 1, 1, 128, grad=False) for _ in range(2)]
    x, scale = random(tokens, ffn, grad=False), torch.tensor(2.0**-3, device=where, dtype=torch.bfloat16)
    labels = torch.randint(0, vocabulary, (tokens,), device=where)
    logits = random(tokens, vocabulary)
    return [
        Operation("swiglu of experts", swiglu, gated, 16 * rows * width, 0.42),
        Operation("residual and norm", residual_and_norm, normed, 18 * tokens * hidden, 0.22),
        Operation("rotary", rotary, [random(length, 2, 32, 128), *angles], 8 * tokens * 32 * 128, 0.1),
        Operation("largest magnitude", largest, [x], 2 * x.numel(), 0.1),
        Operation("quantise in both layouts", cast_both_ways, [x, scale], 4 * x.numel(), 0.25),
        Operation("cross-entropy 8192 x 32768", cross_entropy, [logits, labels], 8 * logits.numel(), 1.0),
    ]


def part(_: str) -> dict:
    """torch.compile of the same mathematics, beside the operations of `kernels`."""
    results: dict[str, dict] = {}
    where = answers.device()
    for operation in operations(where):
        try:
            figures = operation.measure()
            results[operation.name] = figures
            if where.type == "cuda":
                figures["predicted ms"] = operation.predicted
        except Exception as error:
            results[operation.name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
        answers.keep(results)
        answers.say(f"{operation.name}: {results[operation.name]}")
    return results
