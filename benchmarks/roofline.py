#!/usr/bin/env python
"""What a step of benchmarks/gpu.py should take on one GPU: its products by rates, everything else by bytes moved.

python benchmarks/roofline.py                by part, in bf16 and fp8, by torch steps and by our own kernels
python benchmarks/roofline.py --gpu h200     of another card, by its data sheet

Nothing is measured. Rates are what an H100 reached in single operations (RESULTS.md, "One GPU"), bytes are those of
the table in docs/precision.md. The host is taken for fast enough, and kernels run one after the other. `gpu.py` has
these predictions beside what it measures.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace

from gpu_shapes import LENGTH, MICRO_BATCH, MICRO_BATCHES, SHAPES, with_layers_that_fit
from report import markdown_table

from megatron_ext.canonical.counts import count_parameters
from megatron_ext.config import ModelConfig
from megatron_ext.planning.assumptions import GPUS, Assumptions
from megatron_ext.planning.flops import attention_products, training_flops_per_token

#   T tokens of a micro-batch, R rows of its experts, H hidden size, Q and KV width of all queries and of all keys


@dataclass(frozen=True)
class Rates:
    """What one card reaches, in operations and bytes a second."""

    memory: float = 2.7e12
    products: float = 745e12
    """8192^3 in bf16."""
    grouped: float = 595e12
    fp8: float = 1269e12
    fp8_grouped: float = 816e12
    attention: float = 252e12
    """Forward and backward, as torch chooses (FlashAttention 2): 3.81 ms for 2 x 4096 tokens of 32 heads of 128."""
    turned: float = 0.5e12
    """Bytes that are written turned around."""

    def of(self, card: Assumptions) -> "Rates":
        """Those of another card, in proportion to its data sheet."""
        reference = GPUS["h100"]
        faster, wider = card.peak_tflops / reference.peak_tflops, card.memory_tb_s / reference.memory_tb_s
        computing = ("products", "grouped", "fp8", "fp8_grouped", "attention")
        return replace(
            self,
            memory=wider * self.memory,
            turned=wider * self.turned,
            **{name: faster * getattr(self, name) for name in computing},
        )


@dataclass(frozen=True)
class Prediction:
    """Seconds of a micro-batch."""

    parts: dict[str, float]
    """Of all layers together, and of the rest."""
    operations: float
    """The model's, of a micro-batch."""

    @property
    def seconds(self) -> float:
        """All parts, one after the other."""
        return sum(self.parts.values())

    @property
    def tflops(self) -> float:
        """Model TFLOP/s."""
        return self.operations / self.seconds / 1e12


def predict(
    model: ModelConfig, rates: Rates, *, kernels: bool, fp8: bool = False, length: int = LENGTH, rows: int = MICRO_BATCH
) -> Prediction:
    """The time of a micro-batch of `model`, whose layers are alike, by bf16 or fp8 products.

    Args:
        kernels: elementwise parts, casts to fp8 and weights' gradients by our Triton kernels.
    """
    tokens = rows * length
    seconds = {name: model.num_layers * time for name, time in _layer(model, tokens, length, rates, kernels, fp8)}
    seconds |= dict(_ends(model, tokens, rates, kernels))
    return Prediction(seconds, training_flops_per_token(model, length) * tokens)


def _layer(
    model: ModelConfig, T: int, length: int, rates: Rates, kernels: bool, fp8: bool
) -> Iterator[tuple[str, float]]:  # noqa: N803 - as above
    """Name and seconds of each part of a layer, forward and backward."""
    H, Q = model.hidden_size, model.num_attention_heads * model.head_dim
    KV = (model.num_query_groups or model.num_attention_heads) * model.head_dim
    experts = model.num_moe_experts or 0
    R = T * model.moe_router_topk if experts else 0
    dense = (model.moe_shared_expert_intermediate_size or 0) if experts else model.ffn_hidden_size
    width = model.expert_ffn_hidden_size if experts else 0
    projections = attention_products(model, 0)
    in_dense, in_expert = projections + 3 * H * dense, 3 * H * width
    yield "products", 6 * T * in_dense / (rates.fp8 if fp8 else rates.products)
    if experts:
        yield "products of experts", 6 * R * in_expert / (rates.fp8_grouped if fp8 else rates.grouped)
    yield "attention", 6 * T * (attention_products(model, length) - projections) / rates.attention
    # Two norms, of which the second is of the sum after attention.
    yield "norms and sums", T * H * (42 if kernels else 52) / rates.memory
    # With the parts of the projection cut out, and turned for attention.
    yield "rotation", (T * (Q + KV) * (8 if kernels else 44) + T * (Q + 2 * KV) * 4) / rates.memory
    activations = T * dense * (16 if kernels else 36) + R * width * (16 if kernels else 62)
    yield "SwiGLU", activations / rates.memory
    if experts:
        # Logits in fp32 from a copy of the hidden states; and the sums of the gradients of three readers.
        yield "router", T * H * (30 + 18) / rates.memory + 0.25e-3
        k = model.moe_router_topk
        moved = R * H * 8 + 2 * T * H * (2 * k + 2 if kernels else 6 * k)
        yield "rows to experts and back", moved / rates.memory
    if fp8:
        # Inputs and gradients of outputs of each product.
        operands = T * (2 * H + 2 * Q + 2 * KV + (2 * H + 3 * dense if dense else 0))
        of_experts = R * (2 * H + 3 * width)
        weights, more_weights = in_dense, experts * in_expert
        if kernels:
            weights, more_weights = weights / MICRO_BATCHES, more_weights / MICRO_BATCHES
            yield "casts to fp8", (6 * (operands + weights + more_weights) + 7 * of_experts) / rates.memory
        else:
            once = 18 / rates.memory + 2 / rates.turned
            numbers = operands + weights + more_weights + of_experts
            yield "casts to fp8", numbers * once + of_experts * 4 / rates.memory


def _ends(
    model: ModelConfig,
    T: int,
    rates: Rates,
    kernels: bool,
) -> Iterator[tuple[str, float]]:
    """Name and seconds of what is no layer's."""
    parameters, entries = count_parameters(model).total, model.padded_vocab_size
    yield "output layer", 6 * T * entries * model.hidden_size / rates.products
    yield "loss", T * entries * (6 if kernels else 66) / rates.memory
    # A gradient in bf16 is written by the product.
    yield "sums of weights' gradients", parameters * (8 - 2 if kernels else 12 - 2) / rates.memory
    yield "optimizer", parameters * 42 / rates.memory / MICRO_BATCHES


def main() -> None:
    """Print a table of each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="the card (default h100)")
    card = GPUS[parser.parse_args().gpu]
    rates = Rates().of(card)
    for name, shape in SHAPES.items():
        model = with_layers_that_fit(shape, int(card.memory_gib * 2**30))
        kinds = {
            f"{'fp8' if fp8 else 'bf16'}, {'our kernels' if kernels else 'torch'}": predict(
                model, rates, kernels=kernels, fp8=fp8
            )
            for fp8 in (False, True)
            for kernels in (False, True)
        }
        names = dict.fromkeys(part for one in kinds.values() for part in one.parts)
        table = [[part, *(f"{1e3 * one.parts.get(part, 0):.2f}" for one in kinds.values())] for part in names]
        table.append(["all", *(f"{1e3 * one.seconds:.2f}" for one in kinds.values())])
        table.append(["model TFLOP/s", *(f"{one.tflops:.0f}" for one in kinds.values())])
        print(f"{name}, {model.num_layers} layers on {card.name}, predicted, ms a micro-batch\n")
        print(markdown_table(["part", *kinds], table), end="\n\n")


if __name__ == "__main__":
    main()
