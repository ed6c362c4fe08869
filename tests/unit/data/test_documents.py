"""Documents within samples: found as megatron-core's GPTDataset finds them, in any batch, and shared among ranks."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

from megatron_ext.data.stream.batches import DocumentResets, collate, complete_columns

EOD = 3


@given(st.lists(st.lists(st.integers(0, 5), min_size=12, max_size=12), min_size=1, max_size=3))
def test_documents_are_those_of_gpt_dataset(rows: list[list[int]]) -> None:
    """Its mask [S, S] and positions say the same as our lengths and positions."""
    tokens = torch.tensor(rows)
    seeds = torch.arange(len(rows))
    micro = complete_columns(tokens, tokens, torch.ones(tokens.shape), seeds, DocumentResets(EOD, True, True))
    assert micro.document_lengths is not None
    for row, positions, lengths in zip(tokens, micro.position_ids, micro.document_lengths, strict=True):
        hidden, _, expected = _get_ltor_masks_and_position_ids(row, EOD, True, True, False, True)
        assert torch.equal(positions, expected)
        document_S = torch.arange(len(lengths)).repeat_interleave(lengths)
        seen = (document_S[:, None] == document_S[None, :]) & torch.ones(12, 12, dtype=torch.bool).tril()
        assert torch.equal(seen, ~hidden[0])


def sample(*tokens: int) -> dict[str, Any]:
    row = torch.tensor(tokens)
    columns = {"tokens": row, "labels": row + 1, "loss_mask": torch.ones(len(tokens))}
    return {**columns, "seed": torch.tensor(7), "source": 0}


def test_each_reset_is_made_alone() -> None:
    samples = [sample(1, EOD, 1, 1), sample(EOD, 1, 1, EOD)]
    whole = collate(samples)
    assert whole.document_lengths is None
    assert whole.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    attention = collate(samples, DocumentResets(EOD, attention=True, positions=False))
    assert attention.document_lengths is not None
    assert attention.document_lengths.tolist() == [[2, 2], [1, 3]]
    assert attention.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    positions = collate(samples, DocumentResets(EOD, attention=False, positions=True))
    assert positions.document_lengths is None
    assert positions.position_ids.tolist() == [[0, 1, 0, 1], [0, 0, 1, 2]]


def test_context_parallel_ranks_share_a_micro_batch() -> None:
    micro = collate([sample(1, EOD, 1, 1, 1, EOD, 1, 1)], DocumentResets(EOD, True, True))
    outer, inner = (micro.context_share(rank, 2) for rank in range(2))
    assert outer.tokens.tolist() == [[1, EOD, 1, 1]]
    assert inner.tokens.tolist() == [[1, 1, 1, EOD]]
    assert outer.position_ids.tolist() == [[0, 1, 0, 1]]
    assert inner.position_ids.tolist() == [[0, 1, 2, 3]]
    assert outer.labels.tolist() == [[2, EOD + 1, 2, 2]]
    assert outer.seeds.tolist() == inner.seeds.tolist() == [7]
    assert outer.document_lengths is inner.document_lengths
    assert micro.document_lengths is not None
    assert micro.document_lengths.tolist() == [[2, 4, 2]]
