"""Single operations as this repository writes them, in the shapes of benchmarks/gpu.py, each beside a prediction."""

import time
from random import Random

import answers


def part(_: str) -> dict:
    """Each operation alone, in the shapes of the benchmark's models (8192 tokens a micro-batch)."""
    import torch
    import torch.nn.functional as F

    from megatron_ext.config import Fp8Precision
    from megatron_ext.mcore.activation import gated_activation
    from megatron_ext.mcore.attention_segments import attend_segments, find_segments
    from megatron_ext.mcore.cross_entropy import vocab_parallel_cross_entropy
    from megatron_ext.mcore.fp8.experts import padded_columns
    from megatron_ext.mcore.fp8.quantize import E4M3
    from megatron_ext.mcore.fp8.scaling import Role, Scaling
    from megatron_ext.mcore.moe.grouped_linear import grouped_linear

    where = answers.device()
    cuda = where.type == "cuda"
    small = 1 if cuda else 16  # divides every size on CPU
    results: dict[str, dict] = {"machine": answers.machine()}

    def random(*shape: int, dtype=torch.bfloat16, grad: bool = False) -> torch.Tensor:
        return torch.randn(*shape, device=where, dtype=torch.float32).to(dtype).requires_grad_(grad)

    def note(name: str, run, *, flops: float = 0, moved: float = 0, predicted: float | None = None, repeats: int = 10):
        """`predicted` in milliseconds on an H100, from the bytes moved and operations done."""
        try:
            ms = answers.timed(run, repeats)
        except Exception as error:  # the other operations are still worth knowing
            results[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
            answers.say(f"{name:58} {results[name]['error']}")
            return
        figures = {"ms": round(ms, 4)}
        if flops:
            figures["TFLOP/s"] = round(flops / ms / 1e9, 1)
        if moved:
            figures["TB/s"] = round(moved / ms / 1e9, 3)
        if predicted is not None and cuda:
            figures["predicted ms"] = predicted
        results[name] = figures
        answers.keep(results)
        answers.say(f"{name:58} " + ", ".join(f"{value} {unit}" for unit, value in figures.items()))

    def both(function, *inputs):
        """Forward and backward of `function`, with a gradient like its output."""
        out = function(*inputs)
        grad = torch.randn_like(out)
        wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]

        def run():
            torch.autograd.grad(function(*inputs), wanted, grad)

        return run

    tokens, hidden, ffn = 8192 // small, 4096 // small, 14336 // small
    big = torch.empty(2**30 // small**2, dtype=torch.uint8, device=where)
    other = torch.empty_like(big)
    note("copy 1 GiB", lambda: other.copy_(big), moved=2 * big.numel(), predicted=0.72)
    big = other = None
    n = 8192 // small
    a, b = random(n, n), random(n, n)
    note("bf16 mm 8192^3", lambda: a @ b.t(), flops=2 * n**3, predicted=1.4)
    x, w = random(tokens, hidden), random(2 * ffn, hidden)
    note("bf16 fc1 8192x4096x28672", lambda: x @ w.t(), flops=4 * tokens * hidden * ffn, predicted=2.75)
    main = torch.zeros(2 * ffn, hidden, device=where)
    g = random(tokens, 2 * ffn)
    if cuda:
        note(
            "bf16 wgrad of fc1 added to fp32 by addmm(out_dtype)",
            lambda: torch.addmm(main, g.t(), x, out_dtype=torch.float32, out=main),
            flops=4 * tokens * hidden * ffn,
            predicted=3.0,
        )
    note(
        "bf16 wgrad of fc1, then main_grad.add_",
        lambda: main.add_(g.t() @ x),
        flops=4 * tokens * hidden * ffn,
        predicted=3.2,
    )
    main = g = None

    # fp8: products, and quantisation as mcore/fp8 writes it
    for recipe in ("tensorwise", "rowwise"):
        scaling = Scaling(Fp8Precision(kind="fp8", recipe=recipe)).to(where)  # type: ignore[arg-type]
        from megatron_ext.mcore.fp8.products import product

        qx, qw = scaling.quantize(Role.INPUT, x), scaling.quantize(Role.WEIGHT, w)
        for fast in (True, False):
            note(
                f"fp8 {recipe} fc1, fast={fast}",
                lambda qx=qx, qw=qw, fast=fast: product(qx, qw, torch.bfloat16, fast=fast),
                flops=4 * tokens * hidden * ffn,
                predicted=1.5 if fast else 1.75,
            )
        wide = random(tokens, ffn)
        elements = wide.numel()
        note(
            f"quantise {recipe} 8192x14336",
            lambda s=scaling, wide=wide: s.quantize(Role.INPUT, wide),
            moved=9 * elements,
            predicted=0.42,
        )
        note(
            f"quantise {recipe} 8192x14336 transposed",
            lambda s=scaling, wide=wide: s.quantize(Role.INPUT, wide.t()),
            moved=11 * elements,
            predicted=1.0,
        )
    bytes_ = torch.randint(0, 255, (tokens, ffn), dtype=torch.uint8, device=where)
    note("transpose bytes 8192x14336", lambda: bytes_.t().contiguous(), moved=2 * bytes_.numel(), predicted=0.5)
    wide = bytes_ = qx = qw = None

    # experts: 64, top-6, of 2048 x 1408
    experts, width, rows = 64 // (1 if cuda else 16), 1408 // small, 6 * tokens
    h = 2048 // small
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(experts, generator=generator).mul(0.5).add(0.75)
    counts = (share / share.sum() * rows).long()
    counts[-1] += rows - counts.sum()
    ends = counts.cumsum(0).to(device=where, dtype=torch.int32)
    rows_RH, weight = random(rows, h, grad=True), random(experts, 2 * width, h, grad=True)
    flops = 2 * rows * h * 2 * width
    note(
        "bf16 grouped_mm 64 experts fc1 forward",
        lambda: grouped_linear(rows_RH, weight, ends),
        flops=flops,
        predicted=1.1,
    )
    note(
        "bf16 grouped_mm 64 experts fc1 forward, backward",
        both(lambda r, w: grouped_linear(r, w, ends), rows_RH, weight),
        flops=3 * flops,
        predicted=3.4,
    )
    for recipe in ("tensorwise", "rowwise"):
        from megatron_ext.mcore.fp8.products import grouped_product

        scaling = Scaling(Fp8Precision(kind="fp8", recipe=recipe), gradient_format=E4M3).to(where)  # type: ignore[arg-type]
        qr = scaling.quantize(Role.INPUT, rows_RH.detach())
        qe = scaling.quantize(Role.WEIGHT, weight.detach())
        for fast in (True, False):
            note(
                f"fp8 {recipe} scaled_grouped_mm 64 experts fc1, fast={fast}",
                lambda qr=qr, qe=qe, fast=fast: grouped_product(qr, qe, ends, torch.bfloat16, fast=fast),
                flops=flops,
                predicted=0.65 if fast else 0.85,
            )
        note(
            f"quantise {recipe} weights of 64 experts, transposed",
            lambda s=scaling: s.quantize(Role.WEIGHT, weight.detach().transpose(1, 2)),
            moved=11 * weight.numel(),
            predicted=3.4,
        )
        note(
            f"padded_columns {recipe} of {rows} rows",
            lambda s=scaling: padded_columns(s, Role.INPUT, rows_RH.detach(), ends),
            moved=15 * rows_RH.numel(),
            predicted=1.3 if recipe == "tensorwise" else 20.0,
            repeats=3,
        )
    weight = None

    # sorting tokens
    tokens_TH, rows_token = random(tokens, h), torch.randint(0, tokens, (rows,), device=where)
    data = rows_RH.detach()
    note(
        "index_select rows (dispatch)",
        lambda: tokens_TH.index_select(0, rows_token),
        moved=4 * rows * h,
        predicted=0.16,
    )
    note(
        "index_add_ rows (combine; backward of dispatch)",
        lambda: torch.zeros_like(tokens_TH).index_add_(0, rows_token, data),
        moved=4 * rows * h,
        predicted=0.6,
    )
    places = torch.randperm(rows, device=where)
    note(
        "gather and sum in place of index_add_ (unfused)",
        lambda: data.index_select(0, places).view(tokens, 6, h).sum(1),
        moved=6 * rows * h,
        predicted=0.3,
    )
    chosen = torch.rand(experts * tokens, device=where) < 6 / experts
    if cuda:
        note("nonzero_static", lambda: torch.nonzero_static(chosen, size=rows), predicted=0.03)
    logits_TE = torch.randn(tokens, experts, device=where)
    note("topk 6 of 64", lambda: logits_TE.topk(min(6, experts), dim=-1), predicted=0.05)

    # elementwise
    projected, weights_R = random(rows, 2 * width, grad=True), torch.rand(rows, device=where).requires_grad_()
    moved = 62 * rows * width
    note(
        "gated_activation of experts forward, backward",
        both(lambda p, w: gated_activation(p, F.silu, w), projected, weights_R),
        moved=moved,
        predicted=1.6,
    )
    projected = random(tokens, 2 * ffn, grad=True)
    note(
        "gated_activation of fc1 forward, backward",
        both(lambda p: gated_activation(p, F.silu), projected),
        moved=36 * tokens * ffn,
        predicted=1.55,
    )
    projected = None
    y, gamma = random(tokens, hidden, grad=True), random(hidden, grad=True)
    note(
        "rms_norm forward, backward",
        both(lambda t, g: F.rms_norm(t, (hidden,), g, 1e-5), y, gamma),
        moved=14 * y.numel(),
        predicted=0.2,
    )
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    class Rope:
        apply_rope_fusion, rotary_interleaved, multi_latent_attention = False, False, False

    length, heads = 4096 // small, 32 // (1 if cuda else 8)
    q = random(length, 2, heads, 128, grad=True)
    angles = torch.randn(length, 1, 1, 128, device=where)
    try:
        note(
            "rotary of queries forward, backward",
            both(lambda t: apply_rotary_pos_emb(t, angles, Rope, cp_group=answers.Group()), q),
            moved=44 * q.numel(),
            predicted=0.55,
        )
    except Exception as error:
        answers.say(f"rotary: {error}")
    for vocabulary in (32768, 131072):
        entries = vocabulary // small
        logits = random(tokens, entries)
        labels = torch.randint(0, entries, (tokens,), device=where)

        def loss(logits=logits, labels=labels, entries=entries):
            leaf = logits.detach().requires_grad_()
            losses, _ = vocab_parallel_cross_entropy(leaf * 1, labels, entries, answers.Group())
            losses.sum().backward()

        note(
            f"cross-entropy of 8192 x {vocabulary} (with a copy)",
            loss,
            moved=70 * logits.numel(),
            predicted=7.5 if vocabulary == 32768 else 29.0,
            repeats=3,
        )
        logits = None

    # attention, 2 x 4096 tokens, 32 heads, 8 of keys
    from torch.nn.attention import SDPBackend, sdpa_kernel

    groups = heads // 4
    shape = [(length, 2, n, 128) for n in (heads, groups, groups)]
    qkv = [random(*s, grad=True) for s in shape]
    flops = 3.5 * 4 * length**2 / 2 * 2 * heads * 128

    def sdpa(q, k, v):
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    note("attention forward, backward: as chosen by torch", both(sdpa, *qkv), flops=flops, predicted=2.3)
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION) if cuda else ():

        def chosen_kernel(q, k, v, backend=backend):
            with sdpa_kernel(backend):
                return sdpa(q, k, v)

        predicted = 2.3 if backend == SDPBackend.CUDNN_ATTENTION else 3.6
        try:
            note(
                f"attention forward, backward: {backend.name}",
                both(chosen_kernel, *qkv),
                flops=flops,
                predicted=predicted,
            )
        except Exception as error:
            results[f"attention {backend.name}"] = {"error": str(error)[:160]}

    def documents(seed: int) -> tuple[tuple[int, ...], ...]:
        """Two rows of 16 documents, no two of one length."""
        cuts = [sorted(random_.sample(range(1, length), 15)) for random_ in (Random(seed), Random(seed + 1))]
        return tuple(tuple(b - a for a, b in zip([0, *row], [*row, length], strict=True)) for row in cuts)

    lengths = documents(0)
    flops = 3.5 * 4 * sum(n * n for row in lengths for n in row) / 2 * heads * 128

    def within(q, k, v, lengths=lengths):
        return attend_segments(q, k, v, find_segments(lengths, 0, 1, where), 128**-0.5)

    begin = time.perf_counter()
    run = both(within, *qkv)
    run()
    if cuda:
        torch.cuda.synchronize()
    first = (time.perf_counter() - begin) * 1e3
    results["attention within 16 documents a row: first time with these lengths"] = {"ms": round(first, 1)}
    answers.say(f"attention within documents, first time with these lengths: {first:.1f} ms")
    note("attention within 16 documents a row", run, flops=flops, predicted=1.5)
    qkv = None

    # optimizer
    count = 10**8 // small**2
    p, grad, m, v = (torch.rand(count, device=where) for _ in range(4))
    step = torch.tensor(1.0, device=where)

    def adam():
        torch._fused_adamw_(
            [p],
            [grad],
            [m],
            [v],
            [],
            [step],
            lr=1e-4,
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.1,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )

    note("fused AdamW of 100 M parameters", adam, moved=28 * count, predicted=1.05)
    return results
