#!/usr/bin/env python
"""How much of the quickstart's training this machine does in its time: prints the share of the steps, in percent.

  python examples/quickstart/measure.py                 before it begins
  python examples/quickstart/measure.py SHARE SECONDS   once SHARE percent of the dense steps ended after SECONDS

Two processes at once compute the dense model's step on 2,048 tokens, as its training will. The whole quickstart takes 4
minutes where such a step takes 0.55 s, and what is not training grows alike; the share is what ends within 7 minutes.
The second call gives the share of the MoE model's steps, for a machine that others have begun to use since.
"""

import multiprocessing
import sys
import time

STEP_SECONDS = 0.55
"""Of one step of `step_seconds` where the quickstart takes the times below."""
TRAINING_SECONDS, OTHER_SECONDS = 150, 90
DENSE_SECONDS, BEFORE_MOE_SECONDS = 75, 30
"""What of both comes before the MoE model trains."""
MOST_SECONDS = 7 * 60
SHARES = (100, 75, 50, 25)


def share_of_steps(seconds: float) -> int:
    """The largest share, in percent, with which the quickstart keeps to its time, for a step that takes `seconds`."""
    slowness = seconds / STEP_SECONDS
    for share in SHARES:
        if slowness * (TRAINING_SECONDS * share / 100 + OTHER_SECONDS) <= MOST_SECONDS:
            return share
    return SHARES[-1]


def share_of_moe_steps(share: int, elapsed: float) -> int:
    """The largest share of the MoE model's steps, up to `share`, with which the rest ends in time.

    Args:
        share: of the dense model's steps, in percent.
        elapsed: seconds until these were trained.
    """
    slowness = elapsed / (DENSE_SECONDS * share / 100 + BEFORE_MOE_SECONDS)
    training, other = TRAINING_SECONDS - DENSE_SECONDS, OTHER_SECONDS - BEFORE_MOE_SECONDS
    fitting = [s for s in SHARES if elapsed + slowness * (training * s / 100 + other) <= MOST_SECONDS]
    return min(share, max(fitting, default=SHARES[-1]))


def step_seconds(tries: int = 4) -> float:
    """Seconds of one forward and backward pass of a model like the dense one on one thread, the median of `tries`."""
    import torch
    from torch.nn import functional

    torch.set_num_threads(1)
    layers, tokens, hidden, ffn, vocabulary = 4, (8, 256), 128, 384, 8192
    weights = [torch.randn(n, m, requires_grad=True) for n, m in ((hidden, hidden), (ffn, hidden), (hidden, ffn))]
    embedding = torch.randn(vocabulary, hidden, requires_grad=True)
    ids = torch.randint(0, vocabulary, tokens)
    times = []
    for _ in range(tries):
        begun = time.perf_counter()
        states = embedding[ids]
        for _ in range(layers):
            normed = functional.rms_norm(states, (hidden,))
            q, k, v, _ = (functional.linear(normed, weights[0]) for _ in range(4))
            heads = [x.view(*tokens, 4, hidden // 4).transpose(1, 2) for x in (q, k, v)]
            mixed = (
                functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).reshape(states.shape)
            )
            states = states + functional.linear(mixed, weights[0])
            normed = functional.rms_norm(states, (hidden,))
            gated = functional.silu(functional.linear(normed, weights[1])) * functional.linear(normed, weights[1])
            states = states + functional.linear(gated, weights[2])
        logits = functional.linear(states, embedding).flatten(0, 1)
        functional.cross_entropy(logits, ids.flatten()).backward()
        times.append(time.perf_counter() - begun)
    return sorted(times)[len(times) // 2]


def main() -> None:
    """Measure and print."""
    if len(sys.argv) == 3:
        share, elapsed = map(int, sys.argv[1:])
        print(moe_share := share_of_moe_steps(share, elapsed))
        if moe_share < share:
            print(f"slower than it was: {moe_share} % of the MoE model's steps, to end within 8", file=sys.stderr)
        return
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        seconds = max(pool.map(step_seconds, [4, 4]))
    share = share_of_steps(seconds)
    print(share)
    if share < 100:
        times = f"{seconds:.2f} s, {seconds / STEP_SECONDS:.1f} times as long as where the quickstart takes 4 minutes"
        print(f"a step of the dense model takes {times}: {share} % of the steps, to end within 8", file=sys.stderr)


if __name__ == "__main__":
    main()
