"""What a run says of itself on the console before its first step."""

import torch

from megatron_ext.canonical.counts import count_parameters
from megatron_ext.config import Layout, RunConfig
from megatron_ext.monitoring.monitor import metrics_path
from megatron_ext.planning.amounts import short_number
from megatron_ext.training.findings import Findings


def banner(run: RunConfig, layout: Layout, device: torch.device, found: Findings) -> list[str]:
    """Lines about the model, the length, the layout, the data, the start, and where everything goes."""
    model, counts = run.model, count_parameters(run.model)
    experts = f", {model.num_moe_experts} experts of which {model.moe_router_topk} work" if model.is_moe else ""
    active = f", {short_number(counts.active)} active for each token" if model.is_moe else ""
    degrees = {
        "TP": layout.tp,
        "CP": layout.cp,
        "DP": layout.dp,
        "PP": layout.pp,
        "EP": layout.ep if model.is_moe else 1,
        "ETP": layout.etp if model.is_moe else 1,
    }
    split = " x ".join(f"{name} {degree}" for name, degree in degrees.items() if degree > 1) or "nothing is split"
    processes = "1 process" if layout.world_size == 1 else f"{layout.world_size} processes"
    interval = run.checkpoint.save_interval
    saved = f"every {interval} steps" if interval else "after the last step"
    saved += f", copied to {run.checkpoint.copy_to}" if run.checkpoint.copy_to is not None else ""
    wandb = run.logging.wandb
    said = [f"changed since that checkpoint: {change}" for change in found.changes]
    said += [f"warning: {warning}" for warning in found.warnings]
    return [
        f"model        {short_number(counts.total)} parameters{active}: {model.num_layers} layers of "
        f"{model.hidden_size}{experts}",
        f"length       {_length(run, found)}",
        f"layout       {processes} on {device.type}, {run.precision.kind}: {split}",
        *(f"data         {line}" for line in [*found.stages, *(use.line() for use in found.sources), *found.packed]),
        f"start        {found.start}",
        f"checkpoints  {run.checkpoint.directory}, {saved}" + (f"; {found.room}" if found.room else ""),
        f"metrics      {metrics_path(run)}" + (f", and W&B {wandb.mode}" if wandb.mode != "off" else ""),
        *said,
    ]


def _length(run: RunConfig, found: Findings) -> str:
    """Steps, batches and tokens."""
    train, tokens = run.train, run.planned_samples * run.data.sequence_length
    of_what = f"{train.global_batch_size:,} x {run.data.sequence_length:,} tokens"
    if found.plan is not None:
        tokens = found.plan.total_tokens
        shapes = {(stage.global_batch_size, stage.sequence_length) for stage in found.plan.stages}
        if len(shapes) > 1:
            of_what = "as many tokens as their stage says"
    return f"{train.train_iters:,} steps of {of_what}, {short_number(tokens)} tokens in all"
