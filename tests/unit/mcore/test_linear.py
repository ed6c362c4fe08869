"""Weight gradients that products add to their fp32 sums are those that autograd hands on."""

from dataclasses import replace

import pytest
from torch import Tensor

from megatron_ext.config import (
    Bf16Precision,
    Fp8Precision,
    Fp32Precision,
    ParallelConfig,
    Precision,
    RecomputeConfig,
)
from megatron_ext.proving.parity import Cell, build_cell, train_cell
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model

# A dense and an MoE layer with shared experts; of the tied embedding both ends have gradients.
MODEL = tiny_model(moe=True, num_layers=2, untie_embeddings_and_output_weights=False)
LAYOUT = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)


def gradients(cell: Cell, adds: bool) -> tuple[dict[str, Tensor], set[str]]:
    """The fp32 sums of a step of two micro-batches by name, and the weights whose gradient autograd handed on."""
    trainable, groups = build_cell(cell)
    for module in trainable.chunks[0].modules():
        if hasattr(module, "config"):  # megatron-core's shared experts have a copy
            module.config.adds_weight_gradients = adds
    seen: set[str] = set()

    def note(name: str, gradient: Tensor | None) -> None:
        if gradient is not None:
            seen.add(name)

    parameters = dict(trainable.chunks[0].named_parameters())
    for name, parameter in parameters.items():
        parameter.register_hook(lambda gradient, name=name: note(name, gradient))
    train_cell(replace(cell, steps=1), trainable, groups)
    sums = {name: parameter.main_grad.clone() for name, parameter in parameters.items()}  # type: ignore[attr-defined]
    trainable.release()
    return sums, seen


@pytest.mark.parametrize(
    ("precision", "recompute", "ranks"),
    [
        (Fp32Precision(kind="fp32"), RecomputeConfig(granularity="full"), 2),
        (Bf16Precision(kind="bf16"), RecomputeConfig(logits=True), 1),
        (Fp8Precision(kind="fp8", fp8_wgrad=False), RecomputeConfig(), 1),
    ],
    ids=["fp32, TP2 SP", "bf16, loss by parts", "fp8 but for weight gradients"],
)
def test_sums_are_the_same(precision: Precision, recompute: RecomputeConfig, ranks: int, pool: GlooPool) -> None:
    parallel = LAYOUT if ranks > 1 else ParallelConfig()
    # bf16 untied: autograd adds up both ends' gradients in bf16, the sum takes each in fp32.
    model = replace(MODEL, untie_embeddings_and_output_weights=precision.kind != "fp32")
    cell = Cell(model, parallel, precision, recompute, samples=2, micro_batch=1)
    handed_on, added = (pool.run(ranks, gradients, cell, adds) for adds in (False, True))
    for (expected, all_weights), (measured, left) in zip(handed_on, added, strict=True):
        named = ("linear_", "output_layer") if precision.kind != "fp32" else ("linear_",)
        linear = {name for name in all_weights if any(part in name for part in named) and name.endswith(".weight")}
        experts = {name for name in all_weights if ".experts.weight" in name}
        assert experts
        if precision.kind == "fp8":
            experts = set()  # by our own kernel alone
        assert all_weights - left == linear | experts
        errors = [float((measured[name] - grad).norm() / grad.norm()) for name, grad in expected.items()]
        added_count = len(linear | experts)
        print(f"{precision.kind}: {added_count} of {len(all_weights)} gradients added, largest error {max(errors):.1e}")
        # fp32: the sum of two micro-batches in another order. bf16 on CPU: the same rounded products.
        assert max(errors) <= (1e-6 if precision.kind == "fp32" else 0.0)
