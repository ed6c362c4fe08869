"""Every kernel against the torch formula that it stands for: bits where the formula has no exponential."""

#   shapes are drawn by Hypothesis; rows and columns beyond a kernel's block, and far below it, are among them

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd
from torch import Tensor

from megatron_ext.config import Fp8Precision
from megatron_ext.mcore.activation import Gate, gated_activation, quick_gelu
from megatron_ext.mcore.cross_entropy import vocab_parallel_cross_entropy
from megatron_ext.mcore.fp8.experts import _ExpertFunction
from megatron_ext.mcore.fp8.quantize import E4M3, E5M2, ROW, WHOLE, Tile, quantize, quantize_both, tile_maxima
from megatron_ext.mcore.fp8.scaling import Scaling
from megatron_ext.mcore.moe.dispatcher import RowMap

# Exponentials of the interpreter are numpy's, torch's its own: a unit in the last place of fp32 each. Where that moves
# a number over a rounding boundary, bf16 differs by a unit of its 8 bits.
UNIT = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-7}
# Softmax is exp(x - log(Z)) with log(Z) up to 16, where fp32 has steps of 1e-6.
UNIT_OF_SOFTMAX = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-7}
DTYPES = st.sampled_from(list(UNIT))
FORMATS = st.sampled_from([E4M3, E5M2])
FEW = settings(max_examples=12)


class OneRank:
    """Stands for the TP group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(measured: Tensor, expected: Tensor, unit: float, typical: float = 1.0) -> None:
    """Equal but for a unit in the last place, or near zero for that of a `typical` number."""
    assert measured.dtype == expected.dtype
    measured, expected = measured.detach().float().cpu(), expected.detach().float().cpu()
    torch.testing.assert_close(measured, expected, rtol=unit, atol=typical * unit / 8, equal_nan=True)


@FEW
@given(rows=st.integers(1, 3), width=st.integers(1, 1500), dtype=DTYPES, weighted=st.booleans(), limited=st.booleans())
@example(rows=2, width=1024, dtype=torch.bfloat16, weighted=True, limited=False)
@example(rows=2, width=1025, dtype=torch.float32, weighted=True, limited=True)
@example(rows=0, width=8, dtype=torch.bfloat16, weighted=True, limited=False)
def test_swiglu(where: torch.device, rows: int, width: int, dtype: torch.dtype, weighted: bool, limited: bool) -> None:
    """The formula in float64, rounded once; the torch steps round in between."""
    kind = Gate(quick_gelu, limit=0.7, offset=1.0) if limited else Gate(F.silu)
    projected, upstream = random(rows, 2 * width, dtype=dtype), random(rows, width, dtype=dtype, seed=1)
    weights = [random(rows, seed=2).abs()] if weighted else []
    here = [x.to(where).requires_grad_() for x in (projected, *weights)]
    exact = [x.double().requires_grad_() for x in (projected, *weights)]
    gate, up = exact[0].chunk(2, dim=-1)
    reference = kind.activation(kind.cut(gate)) * kind.linear(up) * (exact[1].unsqueeze(-1) if weighted else 1)
    output = gated_activation(here[0], kind, *here[1:], triton=True)
    grads = torch.autograd.grad(output, here, upstream.to(where))
    wanted = torch.autograd.grad(reference, exact, upstream.double())
    assert_near(output, reference.to(dtype), UNIT[dtype])
    # The gate's gradient is this times a sum of two terms that cancel where the activation has its minimum.
    terms = float((upstream.double() * kind.linear(up.detach())).abs().max()) if rows else 0.0
    assert_near(grads[0], wanted[0].to(dtype), UNIT[dtype], max(terms, 1.0))
    if weighted:  # sums of up to 1500 terms, in another order
        torch.testing.assert_close(grads[1].cpu().double(), wanted[1], rtol=1e-5, atol=1e-4)


def test_other_activations_have_no_kernel(where: torch.device) -> None:
    projected = random(3, 8).to(where)
    kind = Gate(F.gelu)
    assert torch.equal(gated_activation(projected, kind, triton=True), gated_activation(projected, kind))


@FEW
@given(
    tokens=st.integers(1, 5),
    places=st.integers(1, 4),
    width=st.integers(1, 1100),
    dtype=DTYPES,
    dropped=st.integers(0, 3),
)
def test_gather_sum(
    where: torch.device, tokens: int, places: int, width: int, dtype: torch.dtype, dropped: int
) -> None:
    """The same bits as adding up in fp32 by place, and nothing from rows that are not there."""
    count = max(tokens * places - dropped, 1)
    order = torch.randperm(tokens * places, generator=torch.Generator().manual_seed(3))
    places_TK, rows = order.clamp(max=count).view(tokens, places), random(count, width, dtype=dtype)
    filled = torch.cat((rows.float(), torch.zeros(1, width)))
    expected = torch.zeros(tokens, width)
    for nth in range(places):
        expected += filled[places_TK[:, nth]]
    row_map = RowMap(torch.empty(0), places_TK.to(where), tokens, drops=True, fills=False, triton=True)
    measured = row_map.sums(rows.to(where))
    assert torch.equal(measured.cpu(), expected.to(dtype))


@FEW
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 5)),
    half=st.integers(1, 33),
    rest=st.integers(0, 5),
    dtype=DTYPES,
    neighbours=st.booleans(),
)
@example(shape=(2, 2, 4), half=64, rest=0, dtype=torch.bfloat16, neighbours=False)
def test_rotation(
    where: torch.device,
    shape: tuple[int, int, int],
    half: int,
    rest: int,
    dtype: torch.dtype,
    neighbours: bool,
) -> None:
    """megatron-core's formula in fp32, rounded once; of queries as they lie in the projection; and its gradient."""
    from megatron_ext.mcore.kernels.rotary import HALVES, NEIGHBOURS, rotate

    projection = random(*shape, 2 * (2 * half + rest), dtype=dtype)
    angles = 100 * random(shape[0], half, seed=1)
    both = torch.stack((angles, angles), dim=-1).flatten(1) if neighbours else angles.repeat(1, 2)
    exact = projection.float().requires_grad_()
    queries = exact.chunk(2, dim=-1)[0]
    expected = _apply_rotary_pos_emb_bshd(queries, both[:, None, None], rotary_interleaved=neighbours, mscale=1.5)
    here = projection.to(where).requires_grad_()
    cosines, sines = (1.5 * turn.to(where) for turn in (angles.cos(), angles.sin()))
    measured = rotate(here.chunk(2, dim=-1)[0], cosines, sines, NEIGHBOURS if neighbours else HALVES)
    assert measured.is_contiguous()
    upstream = random(*measured.shape, dtype=dtype, seed=2)
    (gradient,) = torch.autograd.grad(measured, here, upstream.to(where))
    (wanted,) = torch.autograd.grad(expected, exact, upstream.float())
    assert_near(measured, expected.to(dtype), UNIT[dtype])
    assert_near(gradient, wanted.to(dtype), UNIT[dtype])


@FEW
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 5)),
    half=st.integers(1, 33),
    rest=st.integers(0, 5),
    dtype=DTYPES,
)
@example(shape=(2, 2, 4), half=32, rest=128, dtype=torch.bfloat16)
def test_rotation_of_latent_attention(
    where: torch.device, shape: tuple[int, int, int], half: int, rest: int, dtype: torch.dtype
) -> None:
    """megatron-core's formula of the last dimensions, taken as neighbours and sorted into halves; and its gradient."""
    from megatron_ext.mcore.kernels.rotary import LATENT, rotate

    heads = random(*shape, rest + 2 * half, dtype=dtype)
    angles = 100 * random(shape[0], half, seed=1)
    exact = heads.float().requires_grad_()
    still, turns = exact.split((rest, 2 * half), dim=-1)
    both = angles.repeat(1, 2)[:, None, None]
    turned = _apply_rotary_pos_emb_bshd(turns, both, multi_latent_attention=True, mscale=1.5)
    expected = torch.cat((still, turned), dim=-1)
    here = heads.to(where).requires_grad_()
    cosines, sines = (1.5 * turn.to(where) for turn in (angles.cos(), angles.sin()))
    measured = rotate(here, cosines, sines, LATENT)
    upstream = random(*measured.shape, dtype=dtype, seed=2)
    (gradient,) = torch.autograd.grad(measured, here, upstream.to(where))
    (wanted,) = torch.autograd.grad(expected, exact, upstream.float())
    assert_near(measured, expected.to(dtype), UNIT[dtype])
    assert_near(gradient, wanted.to(dtype), UNIT[dtype])


@FEW
@given(rows=st.integers(1, 5), width=st.integers(1, 300), dtype=DTYPES, centred=st.booleans())
@example(rows=513, width=8, dtype=torch.float32, centred=True)
@example(rows=0, width=8, dtype=torch.bfloat16, centred=False)
def test_sum_and_norm(where: torch.device, rows: int, width: int, dtype: torch.dtype, centred: bool) -> None:
    """Sum, norm and all gradients; more rows than there are partial sums of the weight's gradient are among them."""
    from megatron_ext.mcore.kernels.sum_norm import sum_norm

    # Numbers that bf16 adds exactly, so that the sum of the reference is rounded alike.
    x, residual = ((4 * random(rows, width, seed=n)).round().to(dtype) for n in (0, 1))
    weight, bias = (1 + random(width, dtype=dtype, seed=n) / 4 for n in (2, 3))
    upstream = [random(rows, width, dtype=dtype, seed=n) for n in (4, 5)]
    given = [x, residual, weight, *([bias] if centred else [])]
    here, exact = ([t.to(*to).requires_grad_() for t in given] for to in ((where,), (torch.float64,)))
    measured = sum_norm(*here[:3], here[3] if centred else None, 1e-5)
    total = exact[0] + exact[1]
    norm = (
        F.layer_norm(total, (width,), *exact[2:], eps=1e-5) if centred else F.rms_norm(total, (width,), exact[2], 1e-5)
    )
    grads = torch.autograd.grad(measured, here, [g.to(where) for g in upstream])
    wanted = torch.autograd.grad((total, norm), exact, [g.double() for g in upstream])
    for a, b in zip((*measured, *grads[:2]), (total, norm, *wanted[:2]), strict=True):
        # Rows of a few numbers that are nearly equal have a norm that magnifies the rounding of their mean.
        assert_near(a, b.to(dtype), 64 * UNIT[dtype] if dtype is torch.float32 else UNIT[dtype])
    for a, b in zip(grads[2:], wanted[2:], strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=UNIT[dtype], atol=UNIT[dtype] * max(rows, 1) ** 0.5)


@FEW
@given(
    counts=st.lists(st.integers(0, 70), min_size=1, max_size=3),
    widths=st.tuples(st.integers(1, 140), st.integers(1, 140)),
    dtype=DTYPES,
)
@example(counts=[0, 64, 0], widths=(128, 16), dtype=torch.bfloat16)
def test_gradients_of_experts_are_added(
    where: torch.device, counts: list[int], widths: tuple[int, int], dtype: torch.dtype
) -> None:
    """To sums of each expert, of its own rows alone, unrounded; experts without rows keep theirs to the last bit."""
    from megatron_ext.mcore.kernels.grouped_gradient import add_gradients

    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    grad, x = (random(sum(counts), width, dtype=dtype, seed=n) for n, width in enumerate(widths))
    before = random(len(counts), *widths, seed=2)
    total = before.clone().to(where)
    add_gradients(total, grad.to(where), x.to(where), ends.to(where))
    parts = zip(*(t.double().split(counts) for t in (grad, x)), before.double(), strict=True)
    expected = torch.stack([one.t() @ other + old for one, other, old in parts])
    # Sums of at most 70 products of numbers up to 4, in fp32.
    torch.testing.assert_close(total.cpu().double(), expected, rtol=1e-6, atol=2e-5)
    idle = torch.tensor(counts) == 0
    assert torch.equal(total.cpu()[idle], before[idle])


def test_gradients_of_experts_in_fp8_are_added_where_they_are_bf16(where: torch.device) -> None:
    """Unrounded, as in the other precisions; those in fp8 are autograd's to hand on."""
    ends = torch.tensor([5, 5, 40], dtype=torch.int32, device=where)
    x, grad = (random(40, width, dtype=torch.bfloat16, seed=n).to(where) for n, width in enumerate((32, 48)))
    weights = random(3, 48, 32, dtype=torch.bfloat16, seed=2).to(where).requires_grad_()
    handed_on = dict[bool, Tensor | None]()
    for in_fp8 in (False, True):
        total = torch.ones(3, 48, 32, device=where)
        scaling = Scaling(Fp8Precision(kind="fp8", fp8_wgrad=in_fp8), gradient_format=E4M3)
        output = _ExpertFunction.apply(x, weights, ends, scaling, total)
        (handed_on[in_fp8],) = torch.autograd.grad(output, weights, grad, allow_unused=True)
        if not in_fp8:
            parts = zip(*(t.double().tensor_split([5, 5]) for t in (grad, x)), strict=True)
            expected = torch.stack([one.t() @ other + 1 for one, other in parts])
            torch.testing.assert_close(total.double(), expected, rtol=1e-6, atol=2e-5)
    assert handed_on[False] is None
    assert handed_on[True] is not None
    assert torch.equal(total, torch.ones_like(total))


@FEW
@given(tokens=st.integers(1, 3), real=st.integers(1, 5000), padding=st.integers(0, 70), dtype=DTYPES)
@example(tokens=2, real=4096, padding=0, dtype=torch.float32)
def test_cross_entropy(where: torch.device, tokens: int, real: int, padding: int, dtype: torch.dtype) -> None:
    """Loss, log(Z) and the gradient of both, which lies in the logits' memory and is 0 in the padding."""
    whole = 4 * random(tokens, real + padding, dtype=dtype)
    labels = torch.randint(0, real, (tokens,), generator=torch.Generator().manual_seed(1))
    upstream = torch.rand(2, tokens, generator=torch.Generator().manual_seed(2))
    results = []
    for triton, device in ((False, torch.device("cpu")), (True, where)):
        logits = whole.clone().to(device).requires_grad_()
        found = vocab_parallel_cross_entropy(logits, labels.to(device), real, OneRank(), triton=triton)
        stacked = torch.stack(found)
        (gradient,) = torch.autograd.grad(stacked, logits, upstream.to(device))
        assert gradient.data_ptr() == logits.data_ptr()
        assert not gradient[:, real:].any()
        results.append((stacked.detach().cpu(), gradient.cpu()))
    (expected, wanted), (measured, gradient) = results
    torch.testing.assert_close(measured, expected, rtol=1e-6, atol=4e-6)
    assert_near(gradient, wanted, UNIT_OF_SOFTMAX[dtype])


def operand(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Magnitudes over 30 powers of two, so that every binade of fp8, its subnormals and zero are met."""
    powers = torch.randint(-20, 10, (rows, columns), generator=torch.Generator().manual_seed(1))
    return (random(rows, columns) * 2.0**powers).to(dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


@FEW
@given(
    shape=st.tuples(st.integers(1, 130), st.integers(1, 130)),
    dtype=DTYPES,
    form=FORMATS,
    tile=st.sampled_from([WHOLE, ROW]),
    saturate=st.booleans(),
)
def test_fp8_cast_in_both_layouts(
    where: torch.device, shape: tuple[int, int], dtype: torch.dtype, form: torch.dtype, tile: Tile, saturate: bool
) -> None:
    """Bit for bit what quantising a matrix and then its transpose gives."""
    x = operand(*shape, dtype)
    maxima = tile_maxima(x, tile), tile_maxima(x.t(), tile)
    if saturate:  # an estimate that some numbers exceed
        maxima = (maxima[0] / 16, maxima[1] / 16)
    expected = [
        quantize(m, form, tile, largest, saturate=saturate) for m, largest in zip((x, x.t()), maxima, strict=True)
    ]
    there = tuple(largest.to(where) for largest in maxima)
    both = quantize_both(x.to(where), form, tile, there, saturate=saturate, triton=True)
    in_torch = quantize_both(x, form, tile, maxima, saturate=saturate)
    one = quantize(x.t().to(where), form, tile, there[1], saturate=saturate, triton=True)  # of a view
    for measured, wanted in zip((*both, *in_torch, one), (*expected, *expected, expected[1]), strict=True):
        assert measured.values.shape == wanted.values.shape
        assert measured.values.is_contiguous()
        assert torch.equal(bits(measured.values), bits(wanted.values))
        assert torch.equal(measured.scale.cpu(), wanted.scale)


@pytest.mark.parametrize("tile", [WHOLE, ROW], ids=["tensorwise", "rowwise"])
def test_fp8_cast_of_stacked_experts(where: torch.device, tile: Tile) -> None:
    x = torch.stack([operand(70, 40, torch.bfloat16) * 2.0**n for n in range(3)])
    for weights in (x, x.transpose(1, 2)):
        maxima = tile_maxima(weights, tile)
        expected = quantize(weights, E4M3, tile, maxima)
        measured = quantize(weights.to(where), E4M3, tile, maxima.to(where), triton=True)
        assert torch.equal(bits(measured.values), bits(expected.values))
    maxima = tile_maxima(x, tile), tile_maxima(x.mT, tile)
    both = quantize_both(x.to(where), E4M3, tile, (maxima[0].to(where), maxima[1].to(where)), triton=True)
    for measured, weights, largest in zip(both, (x, x.mT), maxima, strict=True):
        assert torch.equal(bits(measured.values), bits(quantize(weights, E4M3, tile, largest).values))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("saturate", [False, True])
def test_fp8_cast_leaves_what_is_not_finite_visible(where: torch.device, value: float, saturate: bool) -> None:
    x = random(3, 5).to(where)
    x[1, 2] = value
    straight, turned = quantize_both(
        x, E4M3, ROW, (tile_maxima(x, ROW), tile_maxima(x.t(), ROW)), saturate=saturate, triton=True
    )
    assert straight.values.float().isnan().any(dim=1).tolist() == [False, True, False]
    assert turned.values.float().isnan().all(dim=1).tolist() == [False, False, True, False, False]
