"""Tiny models, random batches and a stream of them, the same in every layout."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from megatron_ext.config import GatingNormalization, ModelConfig
from megatron_ext.data.stream.batches import DocumentResets, MicroBatch, complete_columns, sample_indices, sample_seed
from megatron_ext.data.stream.pair_columns import stack_pairs
from megatron_ext.data.stream.plan import Consumed
from megatron_ext.data.stream.position import Consumption, Position, SamplePlace
from megatron_ext.data.stream.stream import BatchShape

VOCABULARY = 250
SEQUENCE_LENGTH = 32
EOD = 0
SOURCES = 3
"""The samples of a random batch are in turn from so many sources."""


def tiny_model(*, moe: bool = False, **changes: Any) -> ModelConfig:
    """A 4-layer model with grouped-query attention and a vocabulary that needs padding.

    As MoE: a dense first layer, 4 experts, top-2, a shared expert, gating-logit normalization and a balance loss.
    """
    fields: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": VOCABULARY,
        "make_vocab_size_divisible_by": 4,
        "max_position_embeddings": 64,
    }
    if moe:
        fields |= {
            "num_moe_experts": 4,
            "moe_ffn_hidden_size": 48,
            "moe_first_k_dense": 1,
            "moe_shared_expert_intermediate_size": 64,
            "moe_gating_normalization": GatingNormalization(),
            "moe_aux_loss_coeff": 1e-2,
        }
    return ModelConfig(**(fields | changes))


def random_batch(
    step: int,
    *,
    samples: int,
    micro_batch: int,
    dp_rank: int,
    dp_size: int,
    vocabulary: int = VOCABULARY,
    length: int = SEQUENCE_LENGTH,
    documents: bool = False,
    weighted: bool = False,
    paired: bool = False,
) -> list[MicroBatch]:
    """This rank's micro-batches of global batch `step`, with about a third of the labels masked.

    With `documents`, about every tenth token ends one, and attention and positions start anew after it. Labels that
    are `weighted` count between 0 and 1. With `paired`, each sample holds one pair of answers or two.
    """
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, vocabulary, (samples, length + 1), generator=generator)
    mask = (torch.rand(samples, length, generator=generator) > 0.3).float()
    resets = None
    if documents:
        tokens[torch.rand(tokens.shape, generator=generator) < 0.1] = EOD
        resets = DocumentResets(EOD, attention=True, positions=True)
    if weighted:
        mask = mask * torch.rand(mask.shape, generator=generator)
    rows: Sequence[list[int]] = sample_indices(0, dp_rank, dp_size, micro_batch, samples // (micro_batch * dp_size))
    seeds = torch.tensor([sample_seed(0, step * samples + row) for row in range(samples)])
    sources = torch.arange(samples) % SOURCES
    batch = [complete_columns(tokens[r, :-1], tokens[r, 1:], mask[r], seeds[r], resets, sources[r]) for r in rows]
    return [_paired(micro, r, step * samples) for micro, r in zip(batch, rows, strict=True)] if paired else batch


def _paired(micro: MicroBatch, rows: Sequence[int], first: int) -> MicroBatch:
    """`micro`, which holds the samples `rows`, with a pair or two in each, of answers of other lengths, and a rest."""
    length = micro.tokens.shape[1]
    packs = [_answers(length, row) for row in rows]
    segments = [torch.repeat_interleave(torch.arange(len(one)), torch.tensor(one)) for one in packs]
    own = [torch.where(one < 2 * (len(answers) // 2), one, -1) for one, answers in zip(segments, packs, strict=True)]
    samples = []
    for row, answers, of_answer, mask in zip(rows, packs, own, micro.loss_mask, strict=True):
        pairs = len(answers) // 2
        counted = [float(mask[of_answer == segment].sum()) for segment in range(2 * pairs)]
        numbers = 2 * (first + row) + torch.arange(pairs)
        samples.append({"segments": of_answer, "answer_tokens": torch.tensor(counted).view(pairs, 2), "pairs": numbers})
    lengths = pad_sequence([torch.tensor(one) for one in packs], batch_first=True)
    return replace(micro, document_lengths=lengths, pairs=stack_pairs(samples))


def _answers(length: int, row: int) -> list[int]:
    """Lengths of the answers of a sample, chosen and rejected in turn, and of what is left."""
    unit = length // 16
    pairs = [5 + row % 3, 4] if row % 2 else [3, 4 + row % 2, 2, 5]
    answers = [number * unit for number in pairs]
    return [*answers, length - sum(answers)]


class RandomStream:
    """`random_batch` as a `DataStream`: step n of a run has the batch n."""

    def __init__(self, shape: BatchShape, device: torch.device) -> None:
        self._shape, self._device, self._step = shape, device, 0

    def next(self) -> list[MicroBatch]:
        """The next batch."""
        shape = self._shape
        batch = random_batch(
            self._step,
            samples=shape.global_batch,
            micro_batch=shape.micro_batch,
            dp_rank=shape.dp_rank,
            dp_size=shape.dp_size,
        )
        self._step += 1
        return [micro.to(self._device) for micro in batch]

    def seek(self, position: Position) -> None:
        """Go to the batch that begins at `position`."""
        self._step = position.samples // self._shape.global_batch

    def position(self) -> Position:
        """What was given out."""
        samples = self._step * self._shape.global_batch
        return Position(samples, sources=(samples,))

    def consumption(self) -> Consumption:
        """What was given out of each source, of which a sample is an epoch."""
        batch = self._shape.global_batch
        each = {f"source {n}": self._step * len(range(n, batch, SOURCES)) for n in range(SOURCES)}
        return Consumption({name: Consumed(count, count * SEQUENCE_LENGTH, count) for name, count in each.items()})

    def place(self, sample: int) -> SamplePlace:
        """A random sample comes from nowhere."""
        batch = self._shape.global_batch
        step, row = divmod(sample, batch)
        source = row % SOURCES
        number = step * len(range(source, batch, SOURCES)) + row // SOURCES
        return SamplePlace(f"source {source}", number, number, "drawn at random")

    def close(self) -> None:
        """Nothing reads ahead."""
