"""What torch.compile makes of the operations that are several kernels today."""

import time

import answers


def part(_: str) -> dict:
    """torch.compile of the same mathematics, beside the operations of `kernels`."""
    import torch
    import torch.nn.functional as F

    where = answers.device()
    cuda = where.type == "cuda"
    small = 1 if cuda else 16
    results: dict[str, dict] = {}
    tokens, hidden, ffn, rows, width = 8192 // small, 4096 // small, 14336 // small, 49152 // small, 1408 // small

    def note(name, function, inputs, moved, predicted, backward=True):
        try:
            compiled = torch.compile(function, dynamic=False)
            begin = time.perf_counter()
            out = compiled(*inputs)
            wanted = [t for t in inputs if t.requires_grad] if backward else []
            grad = torch.randn_like(out) if backward else None

            def run():
                result = compiled(*inputs)
                if backward:
                    torch.autograd.grad(result, wanted, grad)

            run()
            spent = time.perf_counter() - begin
            ms = answers.timed(run)
            results[name] = {"ms": round(ms, 4), "TB/s": round(moved / ms / 1e9, 3), "compile s": round(spent, 1)}
            if cuda:
                results[name]["predicted ms"] = predicted
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
        answers.keep(results)
        answers.say(f"{name}: {results[name]}")

    def random(*shape, dtype=torch.bfloat16, grad=True):
        return torch.randn(*shape, device=where).to(dtype).requires_grad_(grad)

    def swiglu(projected, weights):
        gate, up = projected.float().chunk(2, dim=-1)
        return (F.silu(gate) * up * weights.unsqueeze(-1)).to(projected.dtype)

    note(
        "swiglu of experts",
        swiglu,
        [random(rows, 2 * width), torch.rand(rows, device=where).requires_grad_()],
        16 * rows * width,
        0.42,
    )

    def norm(x, residual, weight):
        total = (x + residual).float()
        return (total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5) * weight).to(x.dtype)

    note(
        "residual and norm",
        norm,
        [random(tokens, hidden), random(tokens, hidden), random(hidden)],
        18 * tokens * hidden,
        0.22,
    )

    def rope(t, cos, sin):
        a, b = t.chunk(2, dim=-1)
        return t * cos + torch.cat((-b, a), dim=-1) * sin

    angles = [random(4096 // small, 1, 1, 128, grad=False) for _ in range(2)]
    note("rotary", rope, [random(4096 // small, 2, 32, 128), *angles], 8 * tokens * 32 * 128, 0.1)

    def cast_both_ways(x, scale):
        values = (x * scale).to(torch.float8_e4m3fn)
        return torch.stack((values.view(torch.uint8).flatten(), values.t().contiguous().view(torch.uint8).flatten()))

    def amax(x):
        return x.abs().amax()

    x, scale = random(tokens, ffn, grad=False), torch.tensor(2.0**-3, device=where, dtype=torch.bfloat16)
    note("largest magnitude", amax, [x], 2 * x.numel(), 0.1, backward=False)
    note("quantise in both layouts", cast_both_ways, [x, scale], 4 * x.numel(), 0.25, backward=False)

    def loss(logits, labels):
        return F.cross_entropy(logits.float(), labels, reduction="none")

    labels = torch.randint(0, 32768 // small, (tokens,), device=where)
    note("cross-entropy 8192 x 32768", loss, [random(tokens, 32768 // small), labels], 8 * tokens * 32768 // small, 1.0)
    return results
