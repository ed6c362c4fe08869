"""Single operations as this repository writes them, in the shapes of benchmarks/gpu.py, each beside a prediction."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from types import SimpleNamespace
from typing import Any

import answers
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_ext.config import Fp8Precision
from megatron_ext.mcore.activation import Gate, gated_activation
from megatron_ext.mcore.attention_segments import attend_segments, find_segments
from megatron_ext.mcore.cross_entropy import vocab_parallel_cross_entropy
from megatron_ext.mcore.fp8.experts import padded_columns
from megatron_ext.mcore.fp8.products import grouped_product, product
from megatron_ext.mcore.fp8.quantize import E4M3
from megatron_ext.mcore.fp8.scaling import Role, Scaling
from megatron_ext.mcore.moe.grouped_linear import grouped_linear

RECIPES = ("tensorwise", "rowwise")


@dataclass
class Bench:
    """Times operations and keeps what is known after each of them.

    Its sizes are those of a micro-batch of 8192 tokens in models of hidden size 4096, and a 16th of them on CPU.
    """

    where: torch.device
    results: dict[str, dict] = field(default_factory=lambda: {"machine": answers.machine()})

    def __post_init__(self) -> None:
        self.cuda = self.where.type == "cuda"
        self.small = 1 if self.cuda else 16  # divides every size
        self.tokens, self.hidden, self.ffn = 8192 // self.small, 4096 // self.small, 14336 // self.small
        self.experts = 64 // (1 if self.cuda else 16)
        self.length, self.heads = 4096 // self.small, 32 // (1 if self.cuda else 8)

    def random(self, *shape: int, grad: bool = False) -> Tensor:
        """Normal numbers in bf16."""
        return torch.randn(*shape, device=self.where).to(torch.bfloat16).requires_grad_(grad)

    def note(
        self,
        name: str,
        run: Callable[[], Any],
        *,
        flops: float = 0,
        moved: float = 0,
        predicted: float | None = None,
        repeats: int = 10,
    ) -> None:
        """Time `run`; `predicted` in milliseconds on an H100, from the bytes moved and operations done."""
        try:
            ms = answers.timed(run, repeats)
        except Exception as error:  # the other operations are still worth knowing
            self.results[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
            answers.say(f"{name:58} {self.results[name]['error']}")
            return
        figures = {"ms": round(ms, 4)}
        if flops:
            figures["TFLOP/s"] = round(flops / ms / 1e9, 1)
        if moved:
            figures["TB/s"] = round(moved / ms / 1e9, 3)
        if predicted is not None and self.cuda:
            figures["predicted ms"] = predicted
        self.results[name] = figures
        answers.keep(self.results)
        answers.say(f"{name:58} " + ", ".join(f"{value} {unit}" for unit, value in figures.items()))

    def both(self, name: str, function: Callable[..., Tensor], *inputs: Tensor, **figures: Any) -> None:
        """Time forward and backward of `function`, with a gradient like its output."""

        def run() -> None:
            out = function(*inputs)
            torch.autograd.grad(out, wanted, grad)

        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        try:
            grad = torch.randn_like(function(*inputs))
        except Exception as error:
            self.results[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
            answers.say(f"{name:58} {self.results[name]['error']}")
            return
        self.note(name, run, **figures)


def part(_: str) -> dict:
    """Each operation alone."""
    bench = Bench(answers.device())
    for operations in (dense_products, fp8_products, experts, sorting, activations, norm_and_rotary, losses, attention):
        operations(bench)
    documents(bench)
    optimizer(bench)
    return bench.results


def dense_products(bench: Bench) -> None:
    """Memory, and products in bf16."""
    tokens, hidden, ffn = bench.tokens, bench.hidden, bench.ffn
    big = torch.empty(2**30 // bench.small**2, dtype=torch.uint8, device=bench.where)
    other = torch.empty_like(big)
    bench.note("copy 1 GiB", lambda: other.copy_(big), moved=2 * big.numel(), predicted=0.72)
    n = 8192 // bench.small
    a, b = bench.random(n, n), bench.random(n, n)
    bench.note("bf16 mm 8192^3", lambda: a @ b.t(), flops=2 * n**3, predicted=1.4)
    x, w = bench.random(tokens, hidden), bench.random(2 * ffn, hidden)
    flops = 4 * tokens * hidden * ffn
    bench.note("bf16 fc1 8192x4096x28672", lambda: x @ w.t(), flops=flops, predicted=2.75)
    main, g = torch.zeros(2 * ffn, hidden, device=bench.where), bench.random(tokens, 2 * ffn)
    if bench.cuda:
        bench.note(
            "bf16 wgrad of fc1 added to fp32 by addmm(out_dtype)",
            lambda: torch.addmm(main, g.t(), x, out_dtype=torch.float32, out=main),
            flops=flops,
            predicted=3.0,
        )
    bench.note("bf16 wgrad of fc1, then main_grad.add_", lambda: main.add_(g.t() @ x), flops=flops, predicted=3.2)


def fp8_products(bench: Bench) -> None:
    """Products in FP8, and quantisation as mcore/fp8 writes it."""
    tokens, hidden, ffn = bench.tokens, bench.hidden, bench.ffn
    x, w, wide = bench.random(tokens, hidden), bench.random(2 * ffn, hidden), bench.random(tokens, ffn)
    for recipe in RECIPES:
        scaling = Scaling(Fp8Precision(kind="fp8", recipe=recipe)).to(bench.where)  # type: ignore[arg-type]
        qx, qw = scaling.quantize(Role.INPUT, x), scaling.quantize(Role.WEIGHT, w)
        for fast in (True, False):
            bench.note(
                f"fp8 {recipe} fc1, fast={fast}",
                lambda qx=qx, qw=qw, fast=fast: product(qx, qw, torch.bfloat16, fast=fast),
                flops=4 * tokens * hidden * ffn,
                predicted=1.5 if fast else 1.75,
            )
        for name, tensor, passes, predicted in (("", wide, 9, 0.42), (" transposed", wide.t(), 11, 1.0)):
            bench.note(
                f"quantise {recipe} 8192x14336{name}",
                lambda s=scaling, tensor=tensor: s.quantize(Role.INPUT, tensor),
                moved=passes * wide.numel(),
                predicted=predicted,
            )
    bytes_ = torch.randint(0, 255, (tokens, ffn), dtype=torch.uint8, device=bench.where)
    bench.note("transpose bytes 8192x14336", lambda: bytes_.t().contiguous(), moved=2 * bytes_.numel(), predicted=0.5)


def experts(bench: Bench) -> None:
    """The first product of 64 experts of 2048 x 1408, 6 to a token, in bf16 and FP8."""
    rows, h, width = 6 * bench.tokens, 2048 // bench.small, 1408 // bench.small
    share = torch.rand(bench.experts, generator=torch.Generator().manual_seed(0)).mul(0.5).add(0.75)
    counts = (share / share.sum() * rows).long()
    counts[-1] += rows - counts.sum()
    ends = counts.cumsum(0).to(device=bench.where, dtype=torch.int32)
    rows_RH, weight = bench.random(rows, h, grad=True), bench.random(bench.experts, 2 * width, h, grad=True)
    flops = 2 * rows * h * 2 * width
    name = "bf16 grouped_mm 64 experts fc1 forward"
    bench.note(name, lambda: grouped_linear(rows_RH, weight, ends), flops=flops, predicted=1.1)
    grouped = lambda r, w: grouped_linear(r, w, ends)  # noqa: E731
    bench.both(f"{name}, backward", grouped, rows_RH, weight, flops=3 * flops, predicted=3.4)
    data, matrices = rows_RH.detach(), weight.detach()
    for recipe in RECIPES:
        precision = Fp8Precision(kind="fp8", recipe=recipe)  # type: ignore[arg-type]
        scaling = Scaling(precision, gradient_format=E4M3).to(bench.where)
        qr, qe = scaling.quantize(Role.INPUT, data), scaling.quantize(Role.WEIGHT, matrices)
        for fast in (True, False):
            bench.note(
                f"fp8 {recipe} scaled_grouped_mm 64 experts fc1, fast={fast}",
                lambda qr=qr, qe=qe, fast=fast: grouped_product(qr, qe, ends, torch.bfloat16, fast=fast),
                flops=flops,
                predicted=0.65 if fast else 0.85,
            )
        bench.note(
            f"quantise {recipe} weights of 64 experts, transposed",
            lambda s=scaling: s.quantize(Role.WEIGHT, matrices.transpose(1, 2)),
            moved=11 * weight.numel(),
            predicted=3.4,
        )
        bench.note(
            f"padded_columns {recipe} of {rows} rows",
            lambda s=scaling: padded_columns(s, Role.INPUT, data, ends),
            moved=15 * rows_RH.numel(),
            predicted=1.3 if recipe == "tensorwise" else 20.0,
            repeats=3,
        )


def sorting(bench: Bench) -> None:
    """Tokens to experts and back."""
    tokens, rows, h = bench.tokens, 6 * bench.tokens, 2048 // bench.small
    tokens_TH, data = bench.random(tokens, h), bench.random(rows, h)
    rows_token = torch.randint(0, tokens, (rows,), device=bench.where)
    places = torch.randperm(rows, device=bench.where)
    bench.note(
        "index_select rows (dispatch)",
        lambda: tokens_TH.index_select(0, rows_token),
        moved=4 * rows * h,
        predicted=0.16,
    )
    bench.note(
        "index_add_ rows (combine; backward of dispatch)",
        lambda: torch.zeros_like(tokens_TH).index_add_(0, rows_token, data),
        moved=4 * rows * h,
        predicted=0.6,
    )
    bench.note(
        "gather and sum in place of index_add_ (unfused)",
        lambda: data.index_select(0, places).view(tokens, 6, h).sum(1),
        moved=6 * rows * h,
        predicted=0.3,
    )
    if bench.cuda:
        chosen = torch.rand(bench.experts * tokens, device=bench.where) < 6 / bench.experts
        bench.note("nonzero_static", lambda: torch.nonzero_static(chosen, size=rows), predicted=0.03)
    logits_TE = torch.randn(tokens, bench.experts, device=bench.where)
    bench.note("topk 6 of 64", lambda: logits_TE.topk(min(6, bench.experts), dim=-1), predicted=0.05)


def activations(bench: Bench) -> None:
    """SwiGLU of experts and of a dense layer."""
    rows, width = 6 * bench.tokens, 1408 // bench.small
    projected, weights_R = bench.random(rows, 2 * width, grad=True), torch.rand(rows, device=bench.where)
    bench.both(
        "gated_activation of experts forward, backward",
        lambda p, w: gated_activation(p, Gate(F.silu), w),
        projected,
        weights_R.requires_grad_(),
        moved=62 * rows * width,
        predicted=1.6,
    )
    bench.both(
        "gated_activation of fc1 forward, backward",
        lambda p: gated_activation(p, Gate(F.silu)),
        bench.random(bench.tokens, 2 * bench.ffn, grad=True),
        moved=36 * bench.tokens * bench.ffn,
        predicted=1.55,
    )


def norm_and_rotary(bench: Bench) -> None:
    """RMSNorm, and the rotary embedding of the queries."""
    y, gamma = bench.random(bench.tokens, bench.hidden, grad=True), bench.random(bench.hidden, grad=True)
    bench.both(
        "rms_norm forward, backward",
        lambda t, g: F.rms_norm(t, (bench.hidden,), g, 1e-5),
        y,
        gamma,
        moved=14 * y.numel(),
        predicted=0.2,
    )
    rope = SimpleNamespace(apply_rope_fusion=False, rotary_interleaved=False, multi_latent_attention=False)
    q = bench.random(bench.length, 2, bench.heads, 128, grad=True)
    angles = torch.randn(bench.length, 1, 1, 128, device=bench.where)
    bench.both(
        "rotary of queries forward, backward",
        lambda t: apply_rotary_pos_emb(t, angles, rope, cp_group=answers.Group()),
        q,
        moved=44 * q.numel(),
        predicted=0.55,
    )


def losses(bench: Bench) -> None:
    """Cross-entropy over two vocabularies."""
    for vocabulary, predicted in ((32768, 7.5), (131072, 29.0)):
        entries = vocabulary // bench.small
        logits = bench.random(bench.tokens, entries)
        labels = torch.randint(0, entries, (bench.tokens,), device=bench.where)

        def loss(logits: Tensor = logits, labels: Tensor = labels, entries: int = entries) -> None:
            leaf = logits.detach().requires_grad_()
            losses, _ = vocab_parallel_cross_entropy(leaf * 1, labels, entries, answers.Group())
            losses.sum().backward()

        name = f"cross-entropy of 8192 x {vocabulary} (with a copy)"
        bench.note(name, loss, moved=70 * logits.numel(), predicted=predicted, repeats=3)


def _qkv(bench: Bench) -> list[Tensor]:
    """Of 2 x 4096 tokens, 32 heads of queries and 8 of keys."""
    return [bench.random(bench.length, 2, n, 128, grad=True) for n in (bench.heads, bench.heads // 4, bench.heads // 4)]


def attention(bench: Bench) -> None:
    """Causal attention over whole rows."""

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    qkv, flops = _qkv(bench), 3.5 * 4 * bench.length**2 / 2 * 2 * bench.heads * 128
    bench.both("attention forward, backward: as chosen by torch", sdpa, *qkv, flops=flops, predicted=2.3)
    predictions = {SDPBackend.CUDNN_ATTENTION: 2.3, SDPBackend.FLASH_ATTENTION: 3.6} if bench.cuda else {}
    for backend, predicted in predictions.items():

        def chosen_kernel(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return sdpa(q, k, v)

        name = f"attention forward, backward: {backend.name}"
        bench.both(name, chosen_kernel, *qkv, flops=flops, predicted=predicted)


def documents(bench: Bench) -> None:
    """Attention within 16 documents a row, no two of one length."""
    length, qkv = bench.length, _qkv(bench)
    cuts = [sorted(Random(seed).sample(range(1, length), 15)) for seed in (0, 1)]
    lengths = tuple(tuple(b - a for a, b in zip([0, *row], [*row, length], strict=True)) for row in cuts)

    def within(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_segments(q, k, v, find_segments(lengths, 0, 1, bench.where), 128**-0.5)

    begin = time.perf_counter()
    out = within(*qkv)
    torch.autograd.grad(out, qkv, torch.randn_like(out))
    if bench.cuda:
        torch.cuda.synchronize()
    first = round((time.perf_counter() - begin) * 1e3, 1)
    bench.results["attention within 16 documents a row: first time with these lengths"] = {"ms": first}
    answers.say(f"attention within documents, first time with these lengths: {first} ms")
    flops = 3.5 * 4 * sum(n * n for row in lengths for n in row) / 2 * bench.heads * 128
    bench.both("attention within 16 documents a row", within, *qkv, flops=flops, predicted=1.5)


def optimizer(bench: Bench) -> None:
    """The fused update of Adam."""
    count = 10**8 // bench.small**2
    p, grad, m, v = ([torch.rand(count, device=bench.where)] for _ in range(4))
    step = [torch.tensor(1.0, device=bench.where)]
    rates = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8}

    def adam() -> None:
        torch._fused_adamw_(p, grad, m, v, [], step, **rates, amsgrad=False, maximize=False)

    bench.note("fused AdamW of 100 M parameters", adam, moved=28 * count, predicted=1.05)
