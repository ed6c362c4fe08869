"""A plan as people read it: the table of layouts, where memory and time go, the assumptions, and what papers say."""

import math
from collections.abc import Sequence
from dataclasses import replace

from megatron_ext.canonical.counts import count_parameters
from megatron_ext.config import RunConfig
from megatron_ext.errors import ConfigError
from megatron_ext.planning.amounts import flops, short_number
from megatron_ext.planning.assumptions import Assumptions, as_yaml
from megatron_ext.planning.flops import training_flops_per_token
from megatron_ext.planning.run_length import RunLength
from megatron_ext.planning.scaling import (
    TOKENS_A_PARAMETER,
    Suggestion,
    compute_optimum,
    scratch_catches_up,
    suggestions,
    upcycling,
)
from megatron_ext.planning.search import Choice, Search

_GIB = 2**30
_DAY = 86400


def table(run: RunConfig, found: Search, gpus: int, assumed: Assumptions, days: float, length: RunLength) -> str:
    """Everything about the layouts that were found."""
    counts, usual = count_parameters(run.model), length.usual(run)
    each = training_flops_per_token(run.model, usual.length, run.adapters)
    lines = [
        f"model           {short_number(counts.total)} parameters, {short_number(counts.active)} active, "
        f"{flops(each)} a token at {usual.length:,} tokens a sample",
        *_kinds(run, length),
        f"GPUs            {gpus} x {assumed.name}, {assumed.memory_gib:g} GiB each; {days:g} days",
        f"layouts         {found.legal:,} are legal (with micro-batches and recompute)"
        + (f"; {found.too_large:,} of them would be faster than one below and do not fit" if found.chosen else ""),
        "",
    ]
    if not found.chosen:
        assert found.smallest is not None
        need = assumed.needed(found.smallest.total) / _GIB
        least = f"the least that any needs is {need:.1f} GiB of {assumed.memory_gib:g}"
        split = run.parallel.use_distributed_optimizer
        way = "more GPUs, or shorter samples" if split else "parallel.use_distributed_optimizer: true, or more GPUs"
        lines.append(f"none fits: {least}. What helps: {way}")
    else:
        lines += [*_rows(found.chosen, assumed, days, length.tokens), ""]
        lines += _explained(found.chosen[0], assumed)
    lines += ["", "assumptions (change any of them by --assumptions FILE.yaml):", *_indented(as_yaml(assumed))]
    return "\n".join(lines)


def _kinds(run: RunConfig, length: RunLength) -> list[str]:
    """What the steps of the run are like, where they differ."""
    if length.tokens is None:
        return [
            "tokens          how many the stages have, their sources say: prepare them, state `tokens` of each in "
            "data.sources, or give --tokens; until then all steps are taken to be like those of the last stage"
        ]
    if len(length.kinds) == 1:
        return []
    shapes = run.step_shapes
    said = [f"{share:.0%} in steps of {shapes[n].size:,} x {shapes[n].length:,}" for n, share in length.kinds]
    return [f"tokens          {', '.join(said)}; s/step and TFLOP/s are of the first of them"]


def _rows(choices: Sequence[Choice], assumed: Assumptions, days: float, tokens: float | None) -> list[str]:
    head = ["", "TP", "CP", "PP", "VPP", "EP", "ETP", "DP", "micro", "recompute", "GiB", "s/step", "TFLOP/s"]
    rows = [[*head, f"tokens in {days:g} d", *([f"days for {short_number(tokens)}"] if tokens else []), "proof"]]
    for number, choice in enumerate(choices, start=1):
        one, layout = choice.candidate, choice.candidate.layout
        recompute, time = one.run.recompute, one.time
        again = {"full": "full", "selective": "+".join(recompute.modules)}.get(recompute.granularity or "", "")
        moved = f"{recompute.offload_layers} moved" if recompute.offload_layers else ""
        again = "+".join(filter(None, (again, "logits" if recompute.logits else "", moved))) or "-"
        is_moe = one.run.model.is_moe
        rows.append(
            [
                *(str(number), str(layout.tp), str(layout.cp), str(layout.pp)),
                str(one.run.parallel.virtual_pipeline_model_parallel_size or "-"),
                *((str(layout.ep), str(layout.etp)) if is_moe else ("-", "-")),
                *(str(layout.dp), str(one.run.train.micro_batch_size), again),
                f"{assumed.needed(choice.memory.total) / _GIB:.1f}",
                *(f"{time.seconds:.2f}", f"{time.tflops:.0f}", short_number(choice.rate * days * _DAY)),
                *([f"{tokens / choice.rate / _DAY:.1f}"] if tokens else []),
                "parity grid" if one.is_proven else "tools/prove.py",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _explained(choice: Choice, assumed: Assumptions) -> list[str]:
    memory, time = choice.memory, choice.candidate.time
    total = assumed.needed(memory.total)
    margin = total - memory.total
    parts = (
        ("weights, gradients, optimizer", memory.state),
        ("activations", memory.kept),
        ("worked with at the peak", memory.working),
        ("buffers", memory.buffers),
        ("reserved and fragmentation", margin),
    )
    seconds = (
        ("compute", time.compute),
        ("messages of a micro-batch", time.messages),
        *([("waits for the host's memory", time.host)] if time.host else []),
        ("pipeline bubble", time.bubble),
        ("data-parallel messages", time.data_parallel),
        ("optimizer", time.optimizer),
    )
    host = (
        f"host memory     {memory.on_host / _GIB:.1f} GiB a GPU, page-locked, for what recompute.offload_layers and "
        f"optimizer.moments_on_host move there: predicted with {assumed.host_gb_s:g} GB/s each way"
    )
    return [
        f"memory of 1     {total / _GIB:.1f} GiB on stage {memory.stage}, the fullest: "
        + ", ".join(f"{name} {size / _GIB:.1f}" for name, size in parts),
        *([host] if memory.on_host else []),
        f"time of 1       {time.seconds:.2f} s a step, predicted: "
        + ", ".join(f"{name} {part / time.seconds:.0%}" for name, part in seconds),
        "proof           parity grid: a layout of this kind is proven for the models of tests/README.md;",
        "                tools/prove.py: not yet. Prove the one you take for your run, whichever it is: in seconds",
    ]


def _indented(text: str) -> list[str]:
    return [f"  {line}" for line in text.strip().splitlines()]


def advice(run: RunConfig, length: RunLength, dense_tokens: float | None) -> str:
    """What papers say of the tokens, of learning rate and batch, and of upcycling.

    Raises:
        ConfigError: `dense_tokens` are given, and the model was not upcycled: it has no experts.
    """
    active, usual = count_parameters(run.model).active, length.usual(run)
    each = training_flops_per_token(run.model, usual.length, run.adapters)
    lines = [
        "",
        f"compute-optimal {short_number(TOKENS_A_PARAMETER * active)} tokens, {TOKENS_A_PARAMETER} an active parameter "
        "(Hoffmann et al. 2022, arXiv 2203.15556)",
    ]
    if wanted := length.tokens:
        ratio = wanted / active
        best = compute_optimum(each * wanted)
        lines += [
            f"                {short_number(wanted)} are {_figure(ratio)} an active parameter, "
            f"{_figure(ratio / TOKENS_A_PARAMETER)} times that; the same compute is optimal for a dense model "
            f"of {short_number(best.parameters)}",
            *(_suggested(one, usual.length) for one in suggestions(active, wanted, each)),
            f"this run        learning rate {run.optimizer.lr:.2g}, batch "
            f"{short_number(usual.size * usual.length)} tokens",
        ]
    if dense_tokens is not None:
        if not run.model.is_moe:
            raise ConfigError("--dense-tokens: is for a model that is upcycled, but model.num_moe_experts is not set")
        lines += _upcycled(run, each, usual.length, dense_tokens)
    return "\n".join(lines)


def _figure(number: float) -> str:
    return f"{number:.3g}" if number < 100 else f"{number:,.0f}"


def _suggested(one: Suggestion, length: int) -> str:
    batch = f"{short_number(one.batch_tokens)} tokens = {max(one.batch_tokens / length, 1):,.0f} samples"
    return f"suggestion      learning rate {one.learning_rate:.2g}, batch {batch} ({one.source})"


def _upcycled(run: RunConfig, each: float, length: int, dense_tokens: float) -> list[str]:
    dense = replace(run.model, num_moe_experts=None, moe_ffn_hidden_size=None, moe_shared_expert_intermediate_size=None)
    found = upcycling(dense_tokens, training_flops_per_token(dense, length), each)
    meet = scratch_catches_up(count_parameters(dense).total, dense_tokens)
    reached = "at no number of them" if math.isinf(meet) else f"from {short_number(meet)} on"
    return [
        f"upcycled        better than the dense model that goes on from {short_number(found.better_than_dense)} tokens "
        f"on; than the same MoE from scratch up to {short_number(found.scratch_catches_up)} at least",
        "                (half and all of the dense model's compute: Komatsuzaki et al. 2023, arXiv 2212.05055)",
        f"                by a law of both trainings' tokens from scratch is as good {reached}",
        "                (Liew et al. 2025, arXiv 2502.03009, fitted to 8 experts, top-2, of small dense models)",
    ]
