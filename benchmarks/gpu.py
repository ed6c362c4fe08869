#!/usr/bin/env python
"""Training steps on one CUDA GPU, in bf16 and fp8: our backends against megatron-core's local layers in the same run.

python benchmarks/gpu.py               print the table (about 15 minutes on an H100)
python benchmarks/gpu.py --record      and append it to benchmarks/RESULTS.md
python benchmarks/gpu.py --tiny        does it run? Tiny sizes, on CPU where there is no GPU; the figures mean nothing

Beside each figure is what `roofline.py` predicts on the card of that name, and its share of the peak (MFU). Then one
step is profiled: launches, waits of the host, and the kernels that took longest, which are printed.

Shapes are those of a layer of Llama-3 8B, of a MoE upcycled from it to 8 experts top-2, and of DeepSeekMoE 16B (64
experts top-6, 2 shared); of each model as many layers as the memory holds. Each peer has a process, and the GPU, to
itself. A step is forward, backward and optimizer over 4 micro-batches of 2 x 4096 tokens. Yardsticks (published or
reported, model TFLOP/s a GPU on H100): a team 540 with Transformer Engine, 38B dense; NVIDIA 736, Llama-3 70B fp8,
and 118 to 331 for fine-grained MoE.
"""

import argparse
import importlib
import importlib.util
import multiprocessing
import resource
import statistics
import time
import traceback
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from gpu_profile import StepProfile, profile_step
from gpu_shapes import LENGTH, MICRO_BATCH, MICRO_BATCHES, SHAPES, tiny, with_layers_that_fit
from report import hardware, markdown_table, record, versions
from roofline import Rates, predict

from megatron_ext.canonical.counts import count_parameters
from megatron_ext.config import Bf16Precision, Fp8Precision, ModelConfig, Precision, RecomputeConfig
from megatron_ext.config.machine import Kernels
from megatron_ext.planning.assumptions import GPUS
from megatron_ext.planning.flops import training_flops_per_token
from megatron_ext.planning.peaks import peak_tflops

NAMED = 6
"""Kernels of a step that are printed."""


@dataclass(frozen=True)
class Peer:
    """Who trains, and how: `backend` is ours (torch, transformer_engine) or megatron-core's (core)."""

    name: str
    backend: str
    precision: Precision
    kernels: Kernels = "torch"
    loss_by_parts: bool = False


def _fp8(recipe: str, *, keeps: bool = True) -> Fp8Precision:
    return Fp8Precision(kind="fp8", recipe=recipe, keep_fp8_weights=keeps)  # type: ignore[arg-type]


BF16 = Bf16Precision(kind="bf16")
PEERS = [
    Peer("megatron-core local, bf16", "core", BF16),
    Peer("torch, bf16", "torch", BF16),
    *(Peer(f"torch, fp8 {recipe}", "torch", _fp8(recipe)) for recipe in ("tensorwise", "rowwise", "delayed")),
    Peer("our kernels, bf16", "torch", BF16, "triton"),
    *(Peer(f"our kernels, fp8 {recipe}", "torch", _fp8(recipe), "triton") for recipe in ("rowwise", "delayed")),
    Peer("our kernels, fp8 delayed, weights each time", "torch", _fp8("delayed", keeps=False), "triton"),
    Peer("our kernels, bf16, loss by parts", "torch", BF16, "triton", loss_by_parts=True),
    Peer("Transformer Engine, bf16", "transformer_engine", BF16),
    *(
        Peer(f"Transformer Engine, fp8 {recipe}", "transformer_engine", _fp8(recipe))
        for recipe in ("tensorwise", "delayed", "blockwise")
    ),
]


@dataclass(frozen=True)
class Measured:
    """What the process of a peer has found."""

    seconds: float
    """A step, the median."""
    peak: int
    """Bytes."""
    loss: float
    """The first."""
    profile: StepProfile


# --- in the process of a peer --------------------------------------------------------------------------------


def measure(pipe: Connection, peer: Peer, model: ModelConfig, length: int, steps: int, warmup: int) -> None:
    """Send what was measured, or what went wrong."""
    try:
        pipe.send(_measure(peer, model, length, steps, warmup))
    except Exception as error:
        traceback.print_exc()
        pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")


def _measure(peer: Peer, model: ModelConfig, length: int, steps: int, warmup: int) -> Measured:
    import torch

    step = _build(peer, model, length)
    first = step()
    for _ in range(warmup):
        step()
    seconds = []
    for _ in range(steps):
        begin = time.perf_counter()
        step()  # reads loss and gradient norm, so it returns when the GPU is done
        seconds.append(time.perf_counter() - begin)
    on_cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else on_cpu
    return Measured(statistics.median(seconds), peak, first, profile_step(step))


def _build(peer: Peer, model: ModelConfig, length: int) -> Any:
    """The step of a model with fresh weights, as the training loop makes it."""
    import torch
    from core_local_spec import build_core_trainable

    from megatron_ext.config import ParallelConfig, RuntimeConfig
    from megatron_ext.config.machine import Backend
    from megatron_ext.data.stream.batches import complete_columns
    from megatron_ext.mcore.build import build_trainable
    from megatron_ext.mcore.optimizer import set_learning_rate
    from megatron_ext.proving.parity import Cell
    from megatron_ext.runtime.device import choose_device
    from megatron_ext.runtime.process_groups import split_process_group, start_process_group
    from megatron_ext.training.step import train_step
    from megatron_ext.training.tasks.pretrain import Pretrain

    runtime, parallel = RuntimeConfig(), ParallelConfig()
    device = choose_device(runtime)
    start_process_group(runtime, device, alone=True)
    groups = split_process_group(parallel, runtime)
    backend: Backend = "transformer_engine" if peer.backend == "transformer_engine" else "torch"
    recompute = RecomputeConfig(logits=peer.loss_by_parts)
    cell = Cell(model, parallel, peer.precision, recompute, seed=0, lr=1e-4, backend=backend, kernels=peer.kernels)
    build = partial(build_core_trainable, length=length) if peer.backend == "core" else build_trainable
    trainable = build(cell, groups, device)
    set_learning_rate(trainable.optimizer, cell.lr)
    generator = torch.Generator().manual_seed(0)
    samples = torch.randint(model.vocab_size, (MICRO_BATCHES, MICRO_BATCH, length + 1), generator=generator)
    counts, seeds = torch.ones(MICRO_BATCH, length), torch.arange(MICRO_BATCH)
    batch = [complete_columns(rows[:, :-1], rows[:, 1:], counts, seeds).to(device) for rows in samples]
    return lambda: float(train_step(trainable, Pretrain(), batch, groups, max_norm=1.0).loss)


# --- in this process -----------------------------------------------------------------------------------------


def ask(peer: Peer, model: ModelConfig, length: int, steps: int, warmup: int) -> Measured | str:
    """What `measure` sends from a process of its own, or why it sends nothing."""
    if peer.backend == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        return "not installed"
    context = multiprocessing.get_context("spawn")
    pipe, child = context.Pipe()
    process = context.Process(target=measure, args=(child, peer, model, length, steps, warmup))
    process.start()
    child.close()
    try:
        answer: Measured | str = pipe.recv()
        return answer
    except EOFError:
        return "the process died"
    finally:
        process.join()


COLUMNS = [
    "model, peer",
    "model TFLOP/s",
    "predicted",
    "MFU",
    "tokens/s",
    "to megatron-core",
    "peak GiB",
    "launches",
    "waits",
    "first loss",
]


def rows(
    name: str, model: ModelConfig, peers: list[Peer], device: str, length: int, steps: int, warmup: int
) -> list[list[str]]:
    """One table row a peer, all on the same model, on the GPU of the name `device`."""
    tokens = MICRO_BATCHES * MICRO_BATCH * length
    operations = training_flops_per_token(model, length) * tokens
    parameters = count_parameters(model)
    shape = f"{name}, {model.num_layers} layers, {parameters.total / 1e9:.2g}B ({parameters.active / 1e9:.2g}B active)"
    table, reference = [], None
    for peer in peers:
        answer = ask(peer, model, length, steps, warmup)
        if isinstance(answer, str):
            print(f"{shape}: {peer.name}: {answer}", flush=True)
            table.append([f"{shape}: {peer.name}", answer, *[""] * (len(COLUMNS) - 2)])
            continue
        seconds, profile = answer.seconds, answer.profile
        print(f"{shape}: {peer.name}: {seconds:.3f} s a step; {profile}", flush=True)
        for kernel in profile.kernels[:NAMED]:
            print(f"    {kernel.milliseconds:9.2f} ms x{kernel.count:<6d} {kernel.name[:110]}", flush=True)
        reference = reference or (seconds if peer.backend == "core" else None)
        tflops, peak = operations / seconds / 1e12, peak_tflops(device, peer.precision)
        figures = {
            "model TFLOP/s": f"{tflops:.3g}",
            "predicted": _predicted(peer, model, device, length),
            "MFU": f"{tflops / peak:.1%}" if peak else "",
            "tokens/s": f"{tokens / seconds:.0f}",
            "to megatron-core": f"{reference / seconds:.2f}" if reference else "",
            "peak GiB": f"{answer.peak / 2**30:.1f}",
            "launches": str(profile.launches),
            "waits": str(profile.waits),
            "first loss": f"{answer.loss:.3f}",
        }
        table.append([f"{shape}: {peer.name}", *(figures[column] for column in COLUMNS[1:])])
    return table


def _predicted(peer: Peer, model: ModelConfig, device: str, length: int) -> str:
    """Model TFLOP/s by the roofline: of our layers in torch and in our kernels, on a card that it knows."""
    card = next((card for name, card in GPUS.items() if name in device.lower()), None)
    if card is None or peer.backend != "torch":
        return ""
    kernels, fp8 = peer.kernels == "triton", peer.precision.kind == "fp8"
    return f"{predict(model, Rates().of(card), kernels=kernels, fp8=fp8, length=length).tflops:.3g}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="timed steps of each peer (default 10)")
    parser.add_argument("--warmup", type=int, default=3, metavar="N", help="steps before, not timed (default 3)")
    parser.add_argument("--layers", type=int, metavar="N", help="of every model (default: what the memory holds)")
    parser.add_argument("--shapes", metavar="A,B", help="leave out shapes whose name has none of these texts in it")
    parser.add_argument("--peers", metavar="A,B", help="leave out peers whose name has none of these texts in it")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to see that it runs")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    return parser


def main() -> None:
    """Measure, print, record."""
    import torch

    arguments = _parser().parse_args()
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not arguments.tiny:
        raise SystemExit("error: torch finds no CUDA device; --tiny shows on CPU that this script runs")
    device = torch.cuda.get_device_name() if on_gpu else "cpu"
    table = []
    for name, model in SHAPES.items():
        if not any(text in name for text in (arguments.shapes or "").split(",")):
            continue
        if arguments.tiny:
            model, length = tiny(model), 64
        else:
            model, length = with_layers_that_fit(model, torch.cuda.get_device_properties(0).total_memory), LENGTH
        model = replace(model, num_layers=arguments.layers or model.num_layers)
        peers = [p for p in PEERS if any(text in p.name for text in (arguments.peers or "").split(","))]
        table += rows(name, model, peers, device, length, arguments.steps, arguments.warmup)
    text = f"{hardware()}; {versions('torch', 'megatron-core')}.\n\n{markdown_table(COLUMNS, table)}"
    if not on_gpu:
        text = f"Not measured on a GPU: tiny models on CPU, which show that the script runs.\n\n{text}"
    print(text)
    if arguments.record:
        record("Training step on a GPU" + (" (tiny)" if arguments.tiny else ""), text)


if __name__ == "__main__":
    main()
