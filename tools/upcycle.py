#!/usr/bin/env python
"""Make a Mixture-of-Experts checkpoint out of a dense one, and measure whether it computes the same.

python tools/upcycle.py DENSE_CHECKPOINT TARGET --num-experts 8
"""

from dataclasses import replace
from typing import Literal

from pydantic import Field

from megatron_ext.command import parse_command, run_command
from megatron_ext.config import GatingNormalization, ModelConfig
from megatron_ext.config.base import config


@config
class UpcycleOptions:
    """Options of this command."""

    source: str
    """Dense Megatron checkpoint, or a directory of checkpoints (the newest is taken)."""
    target: str
    """Directory to write; the MoE checkpoint becomes its iter_0000000."""
    method: Literal["copy"] = "copy"
    """copy: every expert starts as the dense feed-forward layer, a shared expert starts silent."""
    num_experts: int = Field(ge=2)
    """Routed experts."""
    topk: int = Field(default=2, ge=1)
    """Experts a token is sent to."""
    pre_softmax: bool = False
    """Softmax over all experts before the selection, as topk 1 needs. The function is then not kept."""
    shared_expert_size: int | None = Field(default=None, ge=1)
    """Intermediate width of a shared expert."""
    gating_normalization: bool = True
    """Normalize each token's router logits (Skywork-MoE)."""
    first_k_dense: int = Field(default=0, ge=0)
    """Leave the first k layers dense."""
    seed: int = Field(default=1234, ge=0)
    """Seed of the routers."""
    text: str | None = None
    """Text or prepared dataset for the function check. Default: built-in sentences."""
    tokenizer: str | None = None
    """Tokenizer for the text. Default: the checkpoint's own."""
    figures: str | None = None
    """JSON file for the figures of the function check."""
    force: bool = False
    """Replace an existing target."""


def main() -> None:
    """Parse the command line, upcycle and check."""
    o = parse_command(UpcycleOptions, __doc__, positional=["source", "target"])
    from megatron_ext.conversion.checkpoint_model import read_model
    from megatron_ext.conversion.figures import logit_lines, write_figures
    from megatron_ext.conversion.text import comparison_batches
    from megatron_ext.progress import byte_progress
    from megatron_ext.upcycling.check import function_check
    from megatron_ext.upcycling.upcycle import METHODS, upcycle

    moe, method = moe_model(read_model(o.source), o), METHODS[o.method]
    batches = comparison_batches(o.source, o.text, o.tokenizer)
    with byte_progress("upcycling") as progress:
        upcycle(o.source, o.target, moe, method, seed=o.seed, force=o.force, progress=progress)
    comparison = function_check(o.source, o.target, moe, method, batches)
    expected = method.inexact(moe) or "the function is kept"
    print(
        f"{o.target}: {o.method}, {moe.num_moe_experts} experts; expected: {expected}",
        *logit_lines(comparison),
        sep="\n",
    )
    if o.figures:
        write_figures(o.figures, upcycling=comparison)


def moe_model(dense: ModelConfig, o: UpcycleOptions) -> ModelConfig:
    """The target's configuration."""
    normalization = GatingNormalization() if o.gating_normalization else None
    return replace(
        dense,
        num_moe_experts=o.num_experts,
        moe_router_topk=o.topk,
        moe_router_pre_softmax=o.pre_softmax,
        moe_shared_expert_intermediate_size=o.shared_expert_size,
        moe_gating_normalization=normalization,
        moe_first_k_dense=o.first_k_dense,
    )


if __name__ == "__main__":
    run_command(main)
