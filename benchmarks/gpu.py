#!/usr/bin/env python
"""Training steps on one CUDA GPU, in bf16 and fp8: our backends against megatron-core's local layers in the same run.

python benchmarks/gpu.py               print the table (about 15 minutes on an H100)
python benchmarks/gpu.py --record      and append it to benchmarks/RESULTS.md
python benchmarks/gpu.py --tiny        does it run? Tiny sizes, on CPU where there is no GPU; the figures mean nothing

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

from report import hardware, markdown_table, record, versions

from megatron_ext.canonical.counts import count_parameters
from megatron_ext.config import Bf16Precision, Fp8Precision, ModelConfig, Precision, RecomputeConfig
from megatron_ext.config.machine import Kernels
from megatron_ext.planning.flops import training_flops_per_token

LENGTH, MICRO_BATCH, MICRO_BATCHES = 4096, 2, 4
BYTES_OF_STATE = 18
"""A parameter in bf16, its fp32 gradient, fp32 master and two moments."""
SHARE_OF_STATE = 0.6
"""Of the memory; the rest is for activations."""
MOST_LAYERS = 8
"""More change neither TFLOP/s nor tokens/s a layer."""


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
LLAMA = ModelConfig(
    num_layers=1,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=32768,
    max_position_embeddings=LENGTH,
    rotary_base=5e5,
)
SHAPES = {
    "dense, Llama-8B layers": LLAMA,
    "MoE 8x8B": replace(LLAMA, num_moe_experts=8, moe_router_topk=2, moe_aux_loss_coeff=1e-2),
    "MoE 64 experts top-6, 2 shared": replace(
        LLAMA,
        hidden_size=2048,
        ffn_hidden_size=10944,
        num_attention_heads=16,
        num_query_groups=16,
        num_moe_experts=64,
        moe_router_topk=6,
        moe_ffn_hidden_size=1408,
        moe_shared_expert_intermediate_size=2816,
        moe_aux_loss_coeff=1e-3,
    ),
}


def tiny(model: ModelConfig) -> ModelConfig:
    """The same kind of model in a size that a CPU trains at once."""
    moe = {"moe_ffn_hidden_size": 32} if model.num_moe_experts else {}
    shared = {"moe_shared_expert_intermediate_size": 64} if model.moe_shared_expert_intermediate_size else {}
    heads = {"num_attention_heads": 4, "num_query_groups": 2, "vocab_size": 512}
    return replace(model, num_layers=2, hidden_size=64, ffn_hidden_size=96, **heads, **moe, **shared)


def with_layers_that_fit(model: ModelConfig, memory: int) -> ModelConfig:
    """`model` with as many layers as their training state leaves room for activations in `memory` bytes."""
    one, two = (count_parameters(replace(model, num_layers=n)).total for n in (1, 2))
    room = SHARE_OF_STATE * memory / BYTES_OF_STATE - (2 * one - two)
    return replace(model, num_layers=max(1, min(MOST_LAYERS, int(room // (two - one)))))


# --- in the process of a peer --------------------------------------------------------------------------------


def measure(pipe: Connection, peer: Peer, model: ModelConfig, length: int, steps: int, warmup: int) -> None:
    """Send (median seconds a step, bytes at the peak, first loss), or what went wrong."""
    try:
        pipe.send(_measure(peer, model, length, steps, warmup))
    except Exception as error:
        traceback.print_exc()
        pipe.send(f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")


def _measure(peer: Peer, model: ModelConfig, length: int, steps: int, warmup: int) -> tuple[float, int, float]:
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
    return statistics.median(seconds), peak, first


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


def ask(peer: Peer, model: ModelConfig, length: int, steps: int, warmup: int) -> Any:
    """What `measure` sends from a process of its own, or why it sends nothing."""
    if peer.backend == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        return "not installed"
    context = multiprocessing.get_context("spawn")
    pipe, child = context.Pipe()
    process = context.Process(target=measure, args=(child, peer, model, length, steps, warmup))
    process.start()
    child.close()
    try:
        return pipe.recv()
    except EOFError:
        return "the process died"
    finally:
        process.join()


def rows(name: str, model: ModelConfig, peers: list[Peer], length: int, steps: int, warmup: int) -> list[list[str]]:
    """One table row a peer, all on the same model."""
    tokens = MICRO_BATCHES * MICRO_BATCH * length
    operations = training_flops_per_token(model, length) * tokens
    parameters = count_parameters(model)
    shape = f"{name}, {model.num_layers} layers, {parameters.total / 1e9:.2g}B ({parameters.active / 1e9:.2g}B active)"
    table, reference = [], None
    for peer in peers:
        answer = ask(peer, model, length, steps, warmup)
        print(f"{shape}: {peer.name}: {answer}", flush=True)
        if isinstance(answer, str):
            table.append([f"{shape}: {peer.name}", answer, "", "", "", ""])
            continue
        seconds, peak, loss = answer
        reference = reference or (seconds if peer.backend == "core" else None)
        ratio = f"{reference / seconds:.2f}" if reference else ""
        figures = [f"{operations / seconds / 1e12:.3g}", f"{tokens / seconds:.0f}", ratio]
        table.append([f"{shape}: {peer.name}", *figures, f"{peak / 2**30:.1f}", f"{loss:.3f}"])
    return table


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
        table += rows(name, model, peers, length, arguments.steps, arguments.warmup)
    columns = ["model, peer", "model TFLOP/s", "tokens/s", "to megatron-core", "peak GiB", "first loss"]
    text = f"{hardware()}; {versions('torch', 'megatron-core')}.\n\n{markdown_table(columns, table)}"
    if not on_gpu:
        text = f"Not measured on a GPU: tiny models on CPU, which show that the script runs.\n\n{text}"
    print(text)
    if arguments.record:
        record("Training step on a GPU" + (" (tiny)" if arguments.tiny else ""), text)


if __name__ == "__main__":
    main()
