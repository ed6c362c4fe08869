#!/usr/bin/env python
"""What fp8 costs in loss: a small MoE trained on CPU under each recipe, on the same text in the same order as in bf16.

python benchmarks/fp8_numerics.py               print the table, plot into build/ (about 10 minutes on one core)
python benchmarks/fp8_numerics.py --record      and keep both beside benchmarks/RESULTS.md
python benchmarks/fp8_numerics.py --steps 5     does it run?

The text is the documentation and the sources of the running Python, read as bytes. Every run sees the same batches
from the same initial weights, so that losses can be subtracted step by step. Two runs show what a gap must exceed to
mean anything: fp32, and bf16 from weights changed by one part in a thousand, which trains as well by another path.
Rope theta is 1e4 and 5e5, because a team reported loss spikes with 8-bit training and 5e5.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from report import RESULTS, hardware, markdown_table, record, versions

from megatron_ext.config import (
    Bf16Precision,
    Fp8Precision,
    Fp32Precision,
    GatingNormalization,
    ModelConfig,
    ParallelConfig,
    Precision,
    RuntimeConfig,
)
from megatron_ext.data.python_corpus import write_python_corpus
from megatron_ext.data.stream.batches import MicroBatch, complete_columns
from megatron_ext.mcore.build import build_trainable
from megatron_ext.mcore.optimizer import set_learning_rate
from megatron_ext.proving.parity import Cell
from megatron_ext.runtime.device import choose_device
from megatron_ext.runtime.process_groups import end_process_groups, split_process_group, start_process_group
from megatron_ext.training.step import train_step
from megatron_ext.training.tasks.pretrain import Pretrain

SEED, SAMPLES, LENGTH, PEAK = 1234, 8, 128, 1e-3
THETAS = (1e4, 5e5)
PRECISIONS: dict[str, Precision] = {
    "bf16": Bf16Precision(kind="bf16"),
    "bf16, nudged": Bf16Precision(kind="bf16"),
    "fp32": Fp32Precision(kind="fp32"),
    "tensorwise": Fp8Precision(kind="fp8", recipe="tensorwise"),
    "tensorwise, e4m3": Fp8Precision(kind="fp8", recipe="tensorwise", format="e4m3"),
    "rowwise": Fp8Precision(kind="fp8", recipe="rowwise"),
    "delayed": Fp8Precision(kind="fp8", recipe="delayed"),
    "delayed, history 1": Fp8Precision(
        kind="fp8", recipe="delayed", amax_history_len=1, amax_compute_algo="most_recent"
    ),
    "blockwise": Fp8Precision(kind="fp8", recipe="blockwise"),
    "mxfp8": Fp8Precision(kind="fp8", recipe="mxfp8"),
}
"""bf16 first: the others are compared with it."""
NUDGE = 1e-3


def model(theta: float) -> ModelConfig:
    """A MoE of 1.6 million parameters over bytes: a dense layer, two of 8 experts top-2 and a shared one."""
    return ModelConfig(
        num_layers=3,
        hidden_size=128,
        ffn_hidden_size=256,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=256,
        max_position_embeddings=LENGTH,
        rotary_base=theta,
        num_moe_experts=8,
        moe_ffn_hidden_size=192,
        moe_first_k_dense=1,
        moe_shared_expert_intermediate_size=128,
        moe_gating_normalization=GatingNormalization(),
        moe_aux_loss_coeff=1e-2,
    )


def read_text() -> torch.Tensor:
    """The corpus as bytes."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "corpus.jsonl"
        write_python_corpus(path)
        text = "\n".join(json.loads(line)["text"] for line in path.open(encoding="utf-8"))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def batch(text: torch.Tensor, step: int) -> list[MicroBatch]:
    """One micro-batch of windows of the text, drawn by the number of the step."""
    generator = torch.Generator().manual_seed(SEED + step)
    starts = torch.randint(len(text) - LENGTH - 1, (SAMPLES,), generator=generator)
    windows = torch.stack([text[start : start + LENGTH + 1] for start in starts.tolist()]).long()
    return [complete_columns(windows[:, :-1], windows[:, 1:], torch.ones(SAMPLES, LENGTH), torch.arange(SAMPLES))]


def learning_rate(step: int, steps: int) -> float:
    """A linear warmup over a twentieth of the steps, then half a cosine to zero."""
    warmup = max(steps // 20, 1)
    return PEAK * min((step + 1) / warmup, (1 + math.cos(math.pi * step / steps)) / 2)


@torch.no_grad()
def nudge(chunks: Sequence[torch.nn.Module]) -> None:
    """Change every weight by one part in a thousand, at random."""
    generator = torch.Generator().manual_seed(SEED)
    for weight in (weight for chunk in chunks for weight in chunk.parameters()):
        weight.mul_(1 + NUDGE * torch.randn(weight.shape, generator=generator).to(weight.dtype))


def train(text: torch.Tensor, theta: float, precision: Precision, steps: int, *, nudged: bool) -> list[float]:
    """The loss of each step."""
    parallel, runtime = ParallelConfig(use_distributed_optimizer=False), RuntimeConfig(device="cpu")
    device = choose_device(runtime)
    start_process_group(runtime, device, alone=True)
    groups = split_process_group(parallel, runtime)
    trainable = build_trainable(Cell(model(theta), parallel, precision, seed=SEED, lr=PEAK), groups, device)
    if nudged:
        nudge(trainable.chunks)
        trainable.optimizer.reload_model_params()
    losses = []
    for step in range(steps):
        set_learning_rate(trainable.optimizer, learning_rate(step, steps))
        result = train_step(trainable, Pretrain(), batch(text, step), groups, max_norm=1.0)
        losses.append(float(result.loss))
    trainable.release()
    end_process_groups()
    return losses


@dataclass(frozen=True)
class Row:
    """What the table says of one run."""

    final: float
    gap: float
    spike: float

    def cells(self) -> list[str]:
        """Figures as printed."""
        return [f"{self.final:.4f}", f"{self.gap:+.4f}", f"{self.spike:+.3f}"]


def summary(losses: Sequence[float], bf16: Sequence[float]) -> Row:
    """Mean loss and gap over the last quarter of the steps, and the largest spike of the gap after the first tenth.

    A spike is the gap of one step above the median of the ten steps before: what all runs share, as a hard batch, is
    no spike.
    """
    gaps = [loss - reference for loss, reference in zip(losses, bf16, strict=True)]
    last = gaps[-max(len(gaps) // 4, 1) :]
    spikes = [gaps[n] - statistics.median(gaps[max(n - 10, 0) : n]) for n in range(max(len(gaps) // 10, 1), len(gaps))]
    return Row(statistics.fmean(losses[-len(last) :]), statistics.fmean(last), max(spikes, default=0.0))


def reading(rows: dict[str, Row]) -> str:
    """What the table shows in one sentence: gaps of fp8 beside those that chance makes."""
    fp8 = [row.gap for name, row in rows.items() if not name.startswith(("bf16", "fp32"))]
    chance = [row.gap for name, row in rows.items() if name.startswith(("bf16, nudged", "fp32"))]
    error = statistics.stdev(fp8) / len(fp8) ** 0.5
    return (
        f"The {len(fp8)} runs in fp8 end {statistics.fmean(fp8):+.4f} ± {error:.4f} from bf16 "
        f"(mean and standard error), the farthest {max(fp8, key=abs):+.4f}; "
        f"of the runs that differ by chance, the farthest {max(chance, key=abs):+.4f}."
    )


def plot(curves: dict[float, dict[str, list[float]]], path: Path) -> None:
    """Draw the gap to bf16 over the steps, one panel for each theta, as running means of 20 steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(curves), 1, figsize=(9, 4 * len(curves)), sharex=True, squeeze=False)
    for panel, (theta, runs) in zip(panels[:, 0], curves.items(), strict=True):
        for name, losses in runs.items():
            if name != "bf16":
                gaps = [loss - reference for loss, reference in zip(losses, runs["bf16"], strict=True)]
                means = [statistics.fmean(gaps[max(n - 19, 0) : n + 1]) for n in range(len(gaps))]
                panel.plot(means, label=name, linewidth=1, color={"fp32": "black", "bf16, nudged": "grey"}.get(name))
        panel.axhline(0, color="grey", linewidth=0.5)
        panel.set_title(f"rope theta {theta:g}")
        panel.set_ylabel("loss - loss in bf16")
        panel.legend(fontsize=7, ncol=4)
    panels[-1, 0].set_xlabel("step")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, print, plot, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="of each run (default 100)")
    parser.add_argument("--record", action="store_true", help="keep table and plot beside benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    text = read_text()
    curves: dict[float, dict[str, list[float]]] = {theta: {} for theta in THETAS}
    rows: dict[str, Row] = {}
    for theta in THETAS:
        for name, precision in PRECISIONS.items():
            begin = time.perf_counter()
            curves[theta][name] = losses = train(text, theta, precision, arguments.steps, nudged="nudged" in name)
            run = f"{name}, theta {theta:g}"
            rows[run] = summary(losses, curves[theta]["bf16"])
            print(f"{run}: {rows[run]}, {time.perf_counter() - begin:.0f} s", flush=True)
    path = RESULTS.with_name("fp8_numerics.png") if arguments.record else Path("build/fp8_numerics.png")
    plot(curves, path)
    columns = ["run", "final loss", "gap to bf16", "largest spike of the gap"]
    table = markdown_table(columns, [[run, *row.cells()] for run, row in rows.items()])
    machine = (
        f"{hardware()}; {versions('torch', 'megatron-core')}. {arguments.steps} steps of {SAMPLES * LENGTH} bytes."
    )
    result = f"{machine}\n\n{table}\n\n{reading(rows)} The gap over the steps: ![gap to bf16]({path.name})"
    print(result)
    if arguments.record:
        record("Numerics of fp8 on CPU", result)


if __name__ == "__main__":
    main()
