"""Tokens attend within their documents: a packed sample trains like its documents alone, and no [S, S] is allocated."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ext.config import (
    Bf16Precision,
    Fp32Precision,
    ModelConfig,
    ParallelConfig,
    Precision,
    RecomputeConfig,
)
from megatron_ext.data.stream.batches import DocumentResets, complete_columns
from megatron_ext.mcore.build import Trainable
from megatron_ext.proving.parity import Cell, build_cell, compare, run_cell, run_layout
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import EOD, VOCABULARY, tiny_model
from tests.distributed.architectures import MODELS as ARCHITECTURES
from tests.support.product import alternating

CPU = torch.device("cpu")
ROWS = ((7, 1, 16, 8), (20, 12))
# Without the balance loss, which is about a whole micro-batch: then what a document trains is its own affair.
MODELS = {"dense": tiny_model(), "MoE": tiny_model(moe=True, moe_aux_loss_coeff=0.0)}
PRECISIONS: dict[str, Precision] = {"fp32": Fp32Precision(kind="fp32"), "bf16": Bf16Precision(kind="bf16")}


def build(model: ModelConfig, precision: Precision) -> Trainable:
    return build_cell(Cell(model, ParallelConfig(), precision, seed=0))[0]


def losses_and_gradient(
    wrapped: Any, chunks: list[Any], pieces: list[tuple[Any, ...]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token losses of all `pieces` (tokens, positions, labels, document lengths), and the gradient of their sum."""
    wrapped.zero_grad_buffer()
    losses = []
    for tokens, positions, labels, documents in pieces:
        loss = wrapped(tokens, positions, documents, labels=labels)
        loss.float().sum().backward()
        losses.append(loss.detach().float().flatten())
    return torch.cat(losses), torch.cat([p.main_grad.flatten() for p in chunks[0].parameters()])


def packed_and_apart(model: ModelConfig, precision: Precision, leak: bool) -> tuple[float, float]:
    """Largest difference of a token's loss and relative difference of the gradient between the two."""
    trainable = build(model, precision)
    (wrapped,), chunks = trainable.wrapped, trainable.chunks
    tokens = torch.randint(1, VOCABULARY, (2, 33), generator=torch.Generator().manual_seed(5))
    for row, lengths in enumerate(ROWS):
        tokens[row, torch.tensor(lengths[:-1]).cumsum(0) - 1] = EOD
    resets = DocumentResets(EOD, attention=True, positions=True)
    micro = complete_columns(
        tokens[:, :-1], tokens[:, 1:], torch.ones(2, 32), torch.zeros(2, dtype=torch.int64), resets
    )
    assert micro.document_lengths is not None
    assert micro.document_lengths.tolist() == [[7, 1, 16, 8], [20, 12, 0, 0]]
    documents = None if leak else micro.document_lengths
    packed = losses_and_gradient(wrapped, chunks, [(micro.tokens, micro.position_ids, micro.labels, documents)])
    alone = []
    for row, lengths in enumerate(ROWS):
        for begin, end in itertools.pairwise(itertools.accumulate(lengths, initial=0)):
            columns = (micro.tokens, micro.position_ids, micro.labels)
            alone.append((*(x[row : row + 1, begin:end] for x in columns), None))
    apart = losses_and_gradient(wrapped, chunks, alone)
    trainable.release()
    return float((packed[0] - apart[0]).abs().max()), float((packed[1] - apart[1]).norm() / apart[1].norm())


# Rotary embedding turns a document's queries and keys by where they stand in the sample: their products are the same
# but for rounding: 6e-8 of angles up to 32 in fp32 and 4e-3 of each entry in bf16, over four layers. Losses are about
# 5.5. Measured are 5e-7 and 2e-7 in fp32; in bf16 2e-3 and 4e-3, with latent attention of
# megatron-core 0.19 3e-2 and 9e-3. A leak between documents gives 2e-1 and 6e-1.
TOLERANCES = {"fp32": (5e-6, 2e-6), "bf16": (6e-2, 2e-2)}


@pytest.mark.parametrize("kind", [*MODELS, *ARCHITECTURES])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_packed_sample_trains_like_its_documents(kind: str, precision: str, pool: GlooPool) -> None:
    model = MODELS.get(kind) or replace(ARCHITECTURES[kind], moe_aux_loss_coeff=0.0, output_z_loss_coeff=0.0)
    if precision == "bf16":
        # Rounding decides on which side of a gate's limit an entry is, and so whether it has a gradient: 3e-2 to 9e-2.
        model = replace(model, activation_func_clamp_value=None)
    loss, gradient = pool.run(1, packed_and_apart, model, PRECISIONS[precision], False)[0]
    print(f"{kind} {precision}: largest difference of a token's loss {loss:.1e}, of the gradient {gradient:.1e}")
    assert loss < TOLERANCES[precision][0]
    assert gradient < TOLERANCES[precision][1]


def test_a_leak_would_be_seen(pool: GlooPool) -> None:
    loss, gradient = pool.run(1, packed_and_apart, MODELS["dense"], PRECISIONS["fp32"], True)[0]
    print(f"attention over the whole sample: loss {loss:.1e}, gradient {gradient:.1e}")
    assert loss > 100 * TOLERANCES["fp32"][0]
    assert gradient > 100 * TOLERANCES["fp32"][1]


@pytest.mark.parametrize(("kind", "documents"), alternating(list(ARCHITECTURES), [False, True]))
def test_every_architecture_under_context_parallelism(kind: str, documents: bool, pool: GlooPool) -> None:
    cell = Cell(ARCHITECTURES[kind], ParallelConfig(), steps=3, samples=4, documents=documents)
    alone = run_layout(pool, cell, 1)
    context = ParallelConfig(context_parallel_size=2)
    both = replace(context, tensor_model_parallel_size=2, sequence_parallel=True)
    for processes, parallel, recompute in (
        (2, context, RecomputeConfig()),
        (4, both, RecomputeConfig(granularity="full")),
    ):
        difference = compare(run_layout(pool, replace(cell, parallel=parallel, recompute=recompute), processes), alone)
        print(f"{kind}: loss {difference.loss:.1e}, gradient norm {difference.norm:.1e}")
        # As in the parity grid.
        assert difference.worst < 1e-5


def test_documents_matter_in_training(pool: GlooPool) -> None:
    cell = Cell(MODELS["dense"], ParallelConfig(), steps=2, documents=True)
    whole = run_layout(pool, replace(cell, documents=False), 1)
    assert compare(run_layout(pool, cell, 1), whole).worst > 1e-3


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any result of an operation had, forward and backward."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def largest_tensor(cell: Cell) -> int:
    with LargestTensor() as seen:
        run_cell(cell)
    return seen.elements


LONG = 1024


@pytest.mark.parametrize("size", [1, 2], ids=["alone", "CP2"])
@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
def test_nothing_is_as_large_as_a_score_matrix(size: int, documents: bool, pool: GlooPool) -> None:
    """One head's scores would be LONG x LONG; the largest tensor is the flat buffer of all gradients."""
    model = tiny_model(max_position_embeddings=LONG, vocab_size=60)
    parallel = ParallelConfig(context_parallel_size=size)
    cell = Cell(model, parallel, steps=1, samples=1, length=LONG, documents=documents)
    elements = max(pool.run(size, largest_tensor, cell))
    print(f"largest tensor {elements:,} elements, scores of one head {LONG * LONG:,}")
    assert elements < LONG * LONG / 4


def masked_attention() -> int:
    with LargestTensor() as seen:
        query = torch.ones(1, 1, LONG, 8)
        mask = torch.ones(LONG, LONG, dtype=torch.bool).tril()
        torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    return seen.elements


def test_a_mask_would_be_seen(pool: GlooPool) -> None:
    assert pool.run(1, masked_attention)[0] >= LONG * LONG
