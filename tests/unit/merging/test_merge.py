"""Merging models: each method against its formula, and what equal models give."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from megatron_ext.errors import ConfigError
from megatron_ext.merging.merge import Dare, Ema, Linear, Merge, TaskArithmetic, Ties

SHAPE = (40, 50)


def tensors(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(count)]


def merged(merge: Merge, versions: Sequence[Tensor], base: Tensor | None = None, seed: int = 0) -> Tensor:
    return merge.merge("name", [lambda t=t: t for t in versions], base, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "merge",
    [Linear(), Linear(weights=[1.0, 2.0, 4.0]), Ema(), TaskArithmetic(weights=[0.5, 0.25, 0.25]), Ties(density=1.0)],
    ids=lambda merge: merge.kind,
)
def test_equal_models_give_themselves_bit_for_bit(merge: Merge, dtype: torch.dtype) -> None:
    base, same = tensors(2, dtype)
    result = merged(merge, [same] * 3, base if merge.needs_base else None)
    assert result.dtype == dtype
    assert torch.equal(result, same)


def test_a_weighted_mean() -> None:
    a, b = tensors(2)
    assert torch.allclose(merged(Linear(weights=[1.0, 3.0]), [a, b]), 0.25 * a + 0.75 * b, atol=1e-7)


def test_an_exponential_average_forgets_the_oldest() -> None:
    versions = tensors(4)
    expected = versions[0].double()
    for version in versions[1:]:
        expected = 0.7 * expected + 0.3 * version.double()
    assert torch.allclose(merged(Ema(decay=0.7), versions).double(), expected, atol=1e-6)


def test_task_vectors_are_added_and_taken_away() -> None:
    base, a, b = tensors(3)
    expected = base + 0.5 * (a - base) - 0.25 * (b - base)
    assert torch.allclose(merged(TaskArithmetic(weights=[0.5, -0.25]), [a, b], base), expected, atol=1e-6)


def test_ties_by_hand() -> None:
    """The example of each step: small entries trimmed, the sign of the larger sum elected, its voices averaged."""
    base = torch.zeros(6)
    a = torch.tensor([4.0, -3.0, 2.0, 0.1, 0.0, 5.0])
    b = torch.tensor([2.0, 4.0, -0.1, 0.2, 6.0, -4.0])
    # Half of each is kept: a keeps 4, -3, 5; b keeps 4, 6, -4.
    expected = torch.tensor([4.0, 4.0, 0.0, 0.0, 6.0, 5.0])
    assert torch.equal(merged(Ties(density=0.5), [a, b], base), expected)
    assert torch.equal(merged(Ties(density=0.5, scale=0.5), [a, b], base), expected / 2)
    # All kept: the first two agree in entry 0 only.
    everything = merged(Ties(density=1.0), [a, b], base)
    assert torch.allclose(everything, torch.tensor([3.0, 4.0, 2.0, 0.15, 6.0, 5.0]))


@pytest.mark.parametrize(
    ("others", "elected"), [((1.0, 2.0, -1.0), 3.0), ((-1.0, -2.0, 1.0), -3.0), ((1.0, -2.0), 3.0)]
)
def test_votes_that_cancel_out_go_to_the_sign_of_most_entries(others: tuple[float, ...], elected: float) -> None:
    """As `resolve_zero_signs` of the authors' code; where there are as many of each, plus, as mergekit."""
    a, b = torch.tensor([3.0, *others]), torch.tensor([-3.0, *others])
    assert torch.equal(merged(Ties(density=1.0), [a, b], torch.zeros(len(a))), torch.tensor([elected, *others]))


def test_ties_keeps_its_share_of_equal_differences() -> None:
    """Weights in bf16 often move by the same step: a share of the moves is kept, not none of them."""
    base = torch.ones(10, 10, dtype=torch.bfloat16)
    version = base.clone()
    version[:5] += 2**-7
    changed = merged(Ties(density=0.2), [version], base) != base
    assert int(changed.sum()) == 20
    assert not changed[5:].any()


def test_ties_in_pieces_is_ties_of_the_whole() -> None:
    """Three pieces and a part of one, with equal sizes across their borders; against the paper's steps in float64."""
    generator = torch.Generator().manual_seed(0)
    base = torch.zeros(300, 700)
    models = [torch.randint(-8, 9, base.shape, generator=generator) / 8 for _ in range(3)]
    weights = [1.0, 0.5, -2.0]
    trimmed = []
    for model in models:
        flat = model.double().flatten()
        largest = flat.abs().argsort(descending=True, stable=True)[: round(0.3 * flat.numel())]
        trimmed.append(torch.zeros_like(flat).index_copy(0, largest, flat[largest]))
    votes = torch.stack([weight * vector for weight, vector in zip(weights, trimmed, strict=True)])
    signs = votes.sum(dim=0).sign()
    assert int(((signs == 0) & (votes != 0).any(dim=0)).sum()) > 10  # exact ties
    agrees = votes * torch.where(signs == 0, signs.sum().sign(), signs) > 0
    voices = (agrees * torch.tensor(weights, dtype=torch.float64).abs()[:, None]).sum(dim=0)
    expected = (votes * agrees).sum(dim=0) / voices.clamp_min(1e-9)
    result = merged(Ties(density=0.3, weights=weights), models, base).flatten().double()
    assert float((result - expected).abs().max()) <= 2**-24  # rounded to fp32 once
    assert int((result != 0).sum()) > 50_000


def test_ties_lets_not_a_number_be_seen() -> None:
    base, version = tensors(2)
    version[0, 0] = float("nan")
    assert bool(merged(Ties(density=0.2), [version], base)[0, 0].isnan())


def test_dare_drops_its_share_and_keeps_the_mean() -> None:
    base = torch.zeros(400, 500)
    version = torch.ones(400, 500)
    result = merged(Dare(drop_rate=0.9), [version], base)
    kept = result != 0
    n = result.numel()
    assert abs(float(kept.float().mean()) - 0.1) < 4 * (0.09 / n) ** 0.5
    assert torch.allclose(result[kept], torch.tensor(10.0))
    assert torch.equal(result, merged(Dare(drop_rate=0.9), [version], base))
    assert not torch.equal(result, merged(Dare(drop_rate=0.9), [version], base, seed=1))
    assert torch.equal(merged(Dare(drop_rate=0.0), [version], base), version)


def test_weights_for_another_number_of_models_are_refused() -> None:
    for merge in (Linear(weights=[1.0]), TaskArithmetic(weights=[1.0]), Ties(weights=[1.0]), Dare(weights=[1.0])):
        with pytest.raises(ConfigError, match="1 weights for 2 models"):
            merge.check(2)


def test_weights_that_sum_to_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="sum to 0"):
        Linear(weights=[1.0, -1.0]).check(2)


@pytest.mark.parametrize("merge", [Dare(drop_rate=0.0), Ties(density=1.0)])
def test_tensors_that_are_not_contiguous_are_merged(merge: Merge) -> None:
    assert torch.equal(merged(merge, [torch.ones(3, 4).t()], torch.zeros(3, 4).t()), torch.ones(4, 3))
