"""Our Triton kernels, and the loss by parts, beside the torch steps that they stand for: the same? twice? how fast?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import answers
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from torch import Tensor

from megatron_ext.mcore.activation import Gate, gated_activation
from megatron_ext.mcore.cross_entropy import vocab_parallel_cross_entropy
from megatron_ext.mcore.fp8.quantize import E4M3, ROW, WHOLE, Tile, quantize, quantize_both, tile_maxima
from megatron_ext.mcore.moe.dispatcher import RowMap
from megatron_ext.mcore.output_layer import _OutputLoss
from megatron_ext.mcore.products import add_product
from megatron_ext.runtime.accelerators import kernels_fault, this_machine
from megatron_ext.testing.triton_interpreter import mend_interpreter, why_not_interpreting

LIMIT = 1e-2
"""Accepted of ||a - b|| / ||b||: bf16 rounded once or three times. The casts must have the same bits."""


@dataclass(frozen=True)
class Operation:
    """One kernel, or another way of ours: `run(ours)` gives all its results."""

    name: str
    run: Callable[[bool], Sequence[Tensor]]
    moved: int
    """Bytes that the kernel moves."""
    exact: bool = False

    def measure(self) -> dict[str, Any]:
        """Errors against the torch steps, whether it repeats, and the milliseconds of both."""
        expected, first, second = self.run(False), self.run(True), self.run(True)
        repeats = all(torch.equal(_bits(a), _bits(b)) for a, b in zip(first, second, strict=True))
        if self.exact:
            errors = [float((_bits(a) != _bits(b)).float().mean()) for a, b in zip(first, expected, strict=True)]
        else:
            errors = [_error(a, b) for a, b in zip(first, expected, strict=True)]
        in_torch, ours = (answers.timed(lambda triton=triton: self.run(triton)) for triton in (False, True))
        return {
            "errors": [f"{error:.1e}" for error in errors],
            "repeats": repeats,
            "ok": repeats and all(error < (1e-9 if self.exact else LIMIT) for error in errors),
            "torch ms": round(in_torch, 4),
            "ms": round(ours, 4),
            "TB/s": round(self.moved / ours / 1e9, 3),
        }


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _error(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().float(), b.detach().float()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def part(_: str) -> dict:
    """Each kernel in the sizes of the part `kernels`."""
    if (fault := kernels_fault(this_machine())) is not None:
        return {"skipped": fault}
    if why_not_interpreting() is None:
        mend_interpreter()
    results: dict[str, dict] = {}
    for operation in operations(answers.device()):
        try:
            results[operation.name] = operation.measure()
        except Exception as error:  # the others are still worth knowing
            text = str(error).splitlines() or [""]
            results[operation.name] = {"error": f"{type(error).__name__}: {text[0][:300]}", "ok": False}
        answers.keep(results)
        answers.say(f"{operation.name}: {results[operation.name]}")
    return results


def operations(where: torch.device) -> list[Operation]:
    """Those of a micro-batch of 8192 tokens; a 512th of each size where kernels are interpreted."""
    small = 1 if where.type == "cuda" else 512
    tokens, hidden, ffn, rows, width = 8192 // small, 4096 // small, 14336 // small, 49152 // small, 1408 // small

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=where).to(torch.bfloat16)

    weights = torch.rand(rows, device=where)
    x, experts = random(tokens, ffn), random(8, 2 * width, hidden // 2)
    return [
        *(
            _swiglu(name, random(n, 2 * f), w)
            for name, n, f, w in (("dense", tokens, ffn, None), ("experts", rows, width, weights))
        ),
        *(
            _rotation(f"{name} heads of {head}", random(tokens // 2, 2, name * head), head)
            for name, head in ((32, 128), (8, 128), (16, 64))
        ),
        _latent_rotation(random(tokens // 2, 2, 16, 192)),
        *(_sum_and_norm(name, random(tokens, hidden), random(tokens, hidden)) for name in ("RMSNorm", "LayerNorm")),
        _gather_sum(random(rows, hidden // 2), torch.randperm(rows, device=where).view(tokens, -1)),
        *(_cross_entropy(random(tokens, entries // small)) for entries in (32768, 131072)),
        *(_both_layouts(name, x, tile) for name, tile in (("tensorwise", WHOLE), ("rowwise", ROW))),
        _transposed(experts),
        *(_experts_in_both_layouts(name, experts, tile) for name, tile in (("tensorwise", WHOLE), ("rowwise", ROW))),
        _weight_gradient(random(tokens, ffn), random(tokens, hidden)),
        _gradients_of_experts(64, random(rows, 2 * width), random(rows, hidden // 2)),
        _gradients_of_experts(8, random(2 * tokens, 2 * ffn), random(2 * tokens, hidden)),
        *(
            _loss_by_parts(random(tokens, 1, hidden), random(entries // small, hidden) / 64)
            for entries in (32768, 131072)
        ),
    ]


def _swiglu(name: str, projected: Tensor, weights: Tensor | None) -> Operation:
    inputs = [projected.requires_grad_(), *([] if weights is None else [weights.requires_grad_()])]
    grad = torch.randn_like(projected[:, : projected.shape[1] // 2])

    def run(triton: bool) -> list[Tensor]:
        output = gated_activation(projected, Gate(F.silu), weights, triton=triton)
        return [output, *torch.autograd.grad(output, inputs, grad)]

    return Operation(f"SwiGLU, {name}, forward and backward", run, 16 * grad.numel())


def _rotation(name: str, projected: Tensor, head: int) -> Operation:
    x = projected.unflatten(-1, (-1, head)).requires_grad_()
    grad, angles = torch.randn_like(x), 1e3 * torch.rand(len(x), head // 2, device=x.device)
    both, turns = angles.repeat(1, 2)[:, None, None], (angles.cos(), angles.sin())

    def run(triton: bool) -> list[Tensor]:
        if triton:
            from megatron_ext.mcore.kernels.rotary import HALVES, rotate

            turned = rotate(x, *turns, HALVES)
        else:
            turned = _apply_rotary_pos_emb_bshd(x, both)
        return [turned, *torch.autograd.grad(turned, x, grad)]

    return Operation(f"rotation of {name}, forward and backward", run, 8 * x.numel())


def _latent_rotation(x: Tensor) -> Operation:
    """Of queries of DeepSeek's width: 64 dimensions of 192 turn."""
    x.requires_grad_()
    grad, angles = torch.randn_like(x), 1e3 * torch.rand(len(x), 32, device=x.device)
    both, turns = angles.repeat(1, 2)[:, None, None], (angles.cos(), angles.sin())

    def run(triton: bool) -> list[Tensor]:
        if triton:
            from megatron_ext.mcore.kernels.rotary import LATENT, rotate

            turned = rotate(x, *turns, LATENT)
        else:
            still, turning = x.split((128, 64), dim=-1)
            turned = torch.cat((still, _apply_rotary_pos_emb_bshd(turning, both, multi_latent_attention=True)), dim=-1)
        return [turned, *torch.autograd.grad(turned, x, grad)]

    return Operation("rotation of latent attention's queries, forward and backward", run, 8 * x.numel())


def _sum_and_norm(name: str, x: Tensor, residual: Tensor) -> Operation:
    width = x.shape[-1]
    inputs = [x.requires_grad_(), residual.requires_grad_()]
    inputs += [torch.ones_like(x[0]).requires_grad_() for _ in range(2 if name == "LayerNorm" else 1)]
    grads = [torch.randn_like(x) for _ in range(2)]

    def run(triton: bool) -> list[Tensor]:
        if triton:
            from megatron_ext.mcore.kernels.sum_norm import sum_norm

            both = sum_norm(*inputs[:3], inputs[3] if len(inputs) > 3 else None, 1e-5)
        else:
            total = inputs[0] + inputs[1]
            norm = F.layer_norm if name == "LayerNorm" else F.rms_norm
            both = total, norm(total, (width,), *inputs[2:], eps=1e-5)
        return [*both, *torch.autograd.grad(both, inputs, grads)]

    return Operation(f"residual sum and {name}, forward and backward", run, 16 * x.numel())


def _gather_sum(rows: Tensor, places: Tensor) -> Operation:
    def run(triton: bool) -> list[Tensor]:
        return [RowMap(torch.empty(0), places, len(places), drops=False, fills=False, triton=triton).sums(rows)]

    moved = 2 * rows.numel() * (places.shape[1] + 1) // places.shape[1]
    return Operation("sum of each token's rows", run, moved)


def _cross_entropy(logits: Tensor) -> Operation:
    tokens, entries = logits.shape
    labels = torch.randint(0, entries, (tokens,), device=logits.device)

    def run(triton: bool) -> list[Tensor]:
        leaf = logits.detach().requires_grad_()
        losses, log_sums = vocab_parallel_cross_entropy(leaf * 1, labels, entries, answers.Group(), triton=triton)
        (gradient,) = torch.autograd.grad((losses + 1e-3 * log_sums.square()).sum(), leaf)
        return [losses, log_sums, gradient]

    # With the copy that keeps the logits for the next time: 4 bytes more.
    return Operation(f"cross-entropy of {tokens} x {entries} (with a copy)", run, 10 * logits.numel())


def _both_layouts(name: str, x: Tensor, tile: Tile) -> Operation:
    def run(triton: bool) -> list[Tensor]:
        straight = tile_maxima(x, tile)
        maxima = straight, straight if tile == WHOLE else tile_maxima(x.t(), tile)
        both = quantize_both(x, E4M3, tile, maxima, triton=triton)
        return [tensor for one in both for tensor in (one.values.view(torch.uint8), one.scale)]

    moved = (6 if tile == WHOLE else 8) * x.numel()
    return Operation(f"FP8 {name} in both layouts, maxima included", run, moved, exact=True)


def _transposed(experts: Tensor) -> Operation:
    def run(triton: bool) -> list[Tensor]:
        turned = experts.transpose(1, 2)
        one = quantize(turned, E4M3, WHOLE, tile_maxima(turned, WHOLE), triton=triton)
        return [one.values.view(torch.uint8), one.scale]

    return Operation("FP8 tensorwise of experts, transposed, maxima included", run, 5 * experts.numel(), exact=True)


def _experts_in_both_layouts(name: str, experts: Tensor, tile: Tile) -> Operation:
    def run(triton: bool) -> list[Tensor]:
        straight = tile_maxima(experts, tile)
        maxima = straight, straight if tile == WHOLE else tile_maxima(experts.mT, tile)
        both = quantize_both(experts, E4M3, tile, maxima, triton=triton)
        return [tensor for one in both for tensor in (one.values.view(torch.uint8), one.scale)]

    moved = (6 if tile == WHOLE else 8) * experts.numel()
    return Operation(f"FP8 {name} of experts in both layouts, maxima included", run, moved, exact=True)


def _loss_by_parts(hidden: Tensor, weight: Tensor) -> Operation:
    """Beside all logits: not a kernel, but other products. Bytes are those that are saved of the logits."""
    tokens, entries = len(hidden), len(weight)
    labels = torch.randint(0, entries, (tokens, 1), device=hidden.device)
    inputs = hidden.requires_grad_(), weight.requires_grad_()

    def run(by_parts: bool) -> list[Tensor]:
        if by_parts:
            losses, log_sums = _OutputLoss.apply(*inputs, None, labels, entries, answers.Group(), False, True)
        else:
            logits = hidden @ weight.t()
            losses, log_sums = vocab_parallel_cross_entropy(logits, labels, entries, answers.Group(), triton=True)
        return [losses, log_sums, *torch.autograd.grad(losses.sum() + 1e-3 * log_sums.square().sum(), inputs)]

    return Operation(f"output layer and loss of {tokens} x {entries}: all logits, by parts", run, 2 * tokens * entries)


def _weight_gradient(grad: Tensor, x: Tensor) -> Operation:
    total = torch.empty(grad.shape[1], x.shape[1], device=x.device)

    def run(within: bool) -> list[Tensor]:
        total.zero_()
        if within:
            add_product(total, grad.t(), x)
        else:
            total.add_(grad.t() @ x)
        return [total.clone()]

    # With the zeros, and the copy that is compared.
    return Operation(f"weight gradient {tuple(total.shape)} added to its fp32 sum", run, 20 * total.numel())


def _gradients_of_experts(experts: int, grad: Tensor, x: Tensor) -> Operation:
    total = torch.empty(experts, grad.shape[1], x.shape[1], device=x.device)
    # Unevenly, and one without tokens.
    shares = torch.arange(experts, device=x.device).double()
    ends = (shares.cumsum(0) / shares.sum() * len(x)).round().to(torch.int32)

    def run(triton: bool) -> list[Tensor]:
        total.zero_()
        if triton:
            from megatron_ext.mcore.kernels.grouped_gradient import add_gradients

            add_gradients(total, grad, x, ends)
        elif x.is_cuda:
            total.add_(F.grouped_mm(grad.t(), x, offs=ends))
        else:
            parts = zip(*(t.tensor_split(ends[:-1].tolist()) for t in (grad, x)), strict=True)
            total.add_(torch.stack([one.t() @ other for one, other in parts]))
        return [total.clone()]

    return Operation(f"weight gradients of {experts} experts added to fp32 sums", run, 20 * total.numel())
