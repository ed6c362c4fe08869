"""Proof that two checkpoints are the same model: configuration, weights bit for bit, logits on text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.canonical.catalogue import EMBEDDING, OUTPUT
from megatron_ext.canonical.counts import count_parameters
from megatron_ext.checkpoint.examine import check_checksums
from megatron_ext.config import ModelConfig
from megatron_ext.errors import ConversionError
from megatron_ext.foreign import reading
from megatron_ext.model_io.finite import is_finite
from megatron_ext.model_io.huggingface.cached_generation import GenerationComparison, compare_generation
from megatron_ext.model_io.logits import (
    A_MODEL,
    SETTLE,
    carries_our_code,
    load_hugging_face,
    may_run_code,
    megatron_logits,
    network_logits,
)
from megatron_ext.model_io.open import (
    Checkpoint,
    differing_fields,
    is_hugging_face,
    open_checkpoint,
    read_any_model,
)
from megatron_ext.model_io.routing_ties import settle_ties
from megatron_ext.model_io.text import comparison_batches
from megatron_ext.model_io.untie import with_two_ends

_TIED = "untie_embeddings_and_output_weights"


@dataclass(frozen=True)
class WeightComparison:
    """Bitwise comparison after both sides were brought to canonical names."""

    tensors: int
    different: tuple[str, ...]
    """Names of tensors that are not equal bit for bit."""
    largest_difference: float
    rounded_to: tuple[str, ...] = ()
    """Dtypes of tensors that one side stores in a wider one; these were compared after rounding."""
    not_finite: tuple[str, ...] = ()
    """Names of tensors that hold NaN or infinite values: no model, whether they are equal or not."""


@dataclass(frozen=True)
class LogitComparison:
    """How far the logits of two models are apart over the same tokens."""

    tokens: int
    max_abs_difference: float
    scale: float
    """Largest absolute logit of the first model."""
    argmax_agreement: float
    """Share of positions where both models predict the same token, from logits that are finite."""
    mean_kl: float
    """Mean KL divergence from the first model's distribution, in nats."""
    ties: int = 0
    """Rows in which rounding decides which experts are taken; there the second has decided as the first."""

    @property
    def relative(self) -> float:
        """Largest difference over the logits' scale."""
        if self.max_abs_difference == 0:
            return 0.0
        if self.scale == 0 or math.isinf(self.max_abs_difference):
            return math.inf
        return self.max_abs_difference / self.scale


@dataclass(frozen=True)
class Verification:
    """Are two checkpoints the same model?"""

    weights: WeightComparison
    logits: LogitComparison | None
    """None where only weights were compared."""
    tolerance: float
    """Largest difference of logits that counts as equal, relative to the largest logit."""
    fields: tuple[str, ...] = ()
    """Fields of the configurations that make them compute something else, each with both values."""
    generation: GenerationComparison | None = None
    """Of the second one, if it is a Hugging Face model, else of the first."""
    why_not_generated: str = ""
    """Why that was asked for and not done."""

    @property
    def same(self) -> bool:
        """Whether they are."""
        same = not self.fields and not self.weights.different and not self.weights.not_finite
        return same and (self.logits is None or self.logits.relative <= self.tolerance)

    @property
    def generates(self) -> bool:
        """Whether generation with a cache gives what the model computes, as far as it was compared."""
        return self.generation is None or self.generation.relative <= self.tolerance

    @property
    def passed(self) -> bool:
        """Whether they are the same model, and it generates what it computes."""
        return self.same and self.generates


@dataclass(frozen=True)
class Comparison:
    """How two checkpoints are to be compared."""

    logits: bool = True
    """Compare logits too; both models are loaded for that in fp32, one after the other."""
    text: str | Path | None = None
    """Text or prepared dataset; None: built-in sentences."""
    tokenizer: str | Path | None = None
    """Tokenizer of the text; None: the first checkpoint's."""
    batches: int = 4
    length: int = 128
    tolerance: float = 1e-5
    """fp32 rounding of sums taken in another order: measured 0 to 1e-6 of the logits' scale."""
    trust_remote_code: bool = False
    generation: bool = True
    """With logits, also generate some tokens with a cache, with the second model or, if it is Megatron's, the first."""
    first_by_megatron: bool = False
    """Compute the first one with megatron-core's model, even if it is a Hugging Face directory."""


def verify(a: str | Path, b: str | Path, how: Comparison) -> Verification:
    """Compare two checkpoints of either kind.

    Where weights are stored in different dtypes, logits are those of the narrower weights on both sides.

    Raises:
        ConversionError: they hold different tensors, or there is too little memory for their logits.
    """
    for path in (a, b):
        check_checksums(path, ConversionError)
    batches = comparison_input(a, how)
    weights = compare_weights(a, b)
    if not batches:
        return Verification(weights, None, how.tolerance, compare_fields(a, b))
    narrow = getattr(torch, weights.rounded_to[0]) if len(weights.rounded_to) == 1 else None
    examined = 1 if is_hugging_face(b) else 0
    computed, network, generation, why_not = [], None, None, ""
    for number, path in enumerate((a, b)):
        if not is_hugging_face(path) or (how.first_by_megatron and number == 0):
            computed.append(megatron_logits(path, batches, weights_as=narrow))
            continue
        network = None  # one model at a time is in memory
        network = load_hugging_face(path, trust_remote_code=how.trust_remote_code, weights_as=narrow)
        computed.append(network_logits(network, batches))
        if how.generation and number == examined:
            generation, why_not = _generated(path, network, batches[0])
    logits = compare_logits(*computed)
    if network is not None and examined and logits.relative > how.tolerance and read_any_model(b).is_moe:
        settled, ties = settle_ties(network, batches, computed[0], computed[1], how.tolerance)
        logits = replace(compare_logits(computed[0], settled), ties=ties)
    return Verification(weights, logits, how.tolerance, compare_fields(a, b), generation, why_not)


def _generated(path: str | Path, network: Any, rows: Tensor) -> tuple[GenerationComparison | None, str]:
    """How `network`, of `path`, generates; None and why not, where that would tell nothing."""
    # Code that others keep in a repository follows transformers when they please: its faults are not the weights'.
    if type(network).__module__.startswith("transformers_modules") and not carries_our_code(path):
        return None, f"the modelling code of {type(network).__name__} is not this framework's"
    positions = read_any_model(path).max_position_embeddings
    with reading(path, ConversionError, kind=A_MODEL, advice=SETTLE):
        made = compare_generation(network, rows, positions)
    return made, "" if made else f"the model has {positions} positions only"


def compare_fields(a: str | Path, b: str | Path) -> tuple[str, ...]:
    """The fields in which two checkpoints' configurations say another function, each with both values.

    Whether embedding and output layer are one matrix is seen in their weights.
    """
    different = differing_fields(read_any_model(a), read_any_model(b))
    return tuple(f"{name} is {x!r} in {a}, {y!r} in {b}" for name, x, y in different if name != _TIED)


def comparison_input(path: str | Path, how: Comparison) -> list[Tensor]:
    """The token batches to compare a checkpoint's logits on; none where weights alone are compared.

    Raises:
        ConversionError, DataError: its logits cannot be computed here, or there is no such text.
    """
    if not how.logits:
        return []
    require_memory(read_any_model(path), path)
    if is_hugging_face(path) and not how.first_by_megatron:
        may_run_code(path, trust_remote_code=how.trust_remote_code)
    return comparison_batches(path, how.text, how.tokenizer, batches=how.batches, length=how.length)


def require_memory(model: ModelConfig, path: str | Path) -> None:
    """Raise ConversionError where `model`, of `path`, does not fit in fp32 into the memory that is free."""
    needed = 4 * count_parameters(model).total
    free = psutil.virtual_memory().available
    if needed > free:
        raise ConversionError(
            f"{path}: its logits need the model in fp32, {needed / 1e9:.0f} GB, but {free / 1e9:.0f} GB are free; "
            "do without them by --no-logits"
        )


def compare_weights(a: str | Path, b: str | Path) -> WeightComparison:
    """Compare two checkpoints, Megatron or Hugging Face, without their vocabulary padding.

    Where one side has its embedding as the output layer too, and the other has both, it is compared with both. Where
    one side stores a tensor in a narrower dtype, the other is rounded to that dtype first.
    """
    left, right = open_checkpoint(a), open_checkpoint(b)
    if left.model.untie_embeddings_and_output_weights != right.model.untie_embeddings_and_output_weights:
        left, right = with_two_ends(left), with_two_ends(right)
    if left.tensors.specs.keys() != right.tensors.specs.keys():
        only = sorted(left.tensors.specs.keys() ^ right.tensors.specs.keys())
        raise ConversionError(f"{a} and {b} hold different tensors: {', '.join(only[:10])}")
    different, not_finite, rounded, largest = [], [], set(), 0.0
    for name in sorted(left.tensors.specs):
        x, y = _unpadded(left, name), _unpadded(right, name)
        if x.shape != y.shape:
            raise ConversionError(f"{name}: {list(x.shape)} in {a}, {list(y.shape)} in {b}")
        if x.dtype != y.dtype and x.is_floating_point() and y.is_floating_point():
            narrow = min((x.dtype, y.dtype), key=lambda dtype: (dtype.itemsize, torch.finfo(dtype).eps))
            x, y = x.to(narrow), y.to(narrow)
            rounded.add(str(narrow).removeprefix("torch."))
        are_numbers = is_finite(x) and is_finite(y)
        if not are_numbers:
            not_finite.append(name)
        if x.dtype != y.dtype or not torch.equal(x, y):
            # NaN differs from itself: what is said of such tensors is that they hold it.
            if are_numbers or not torch.equal(x.isnan(), y.isnan()) or not torch.equal(x.nan_to_num(), y.nan_to_num()):
                different.append(name)
            if are_numbers:
                largest = max(largest, _largest_difference(x.double(), y.double()))
    total = len(left.tensors.specs)
    return WeightComparison(total, tuple(different), largest, tuple(sorted(rounded)), tuple(not_finite))


def _unpadded(checkpoint: Checkpoint, name: str) -> Tensor:
    tensor = checkpoint.tensors.read(name)
    return tensor[: checkpoint.model.vocab_size] if name in (EMBEDDING, OUTPUT) else tensor


def _largest_difference(x: Tensor, y: Tensor) -> float:
    """Largest absolute difference; infinite where one is not a number, since NaN compares as neither more nor less."""
    largest = float((x - y).abs().max())
    return math.inf if math.isnan(largest) else largest


def checkpoint_logits(
    path: str | Path,
    batches: Sequence[Tensor],
    *,
    trust_remote_code: bool = False,
    weights_as: torch.dtype | None = None,
) -> list[Tensor]:
    """fp32 logits of a checkpoint of either kind, its weights rounded to `weights_as` before."""
    if is_hugging_face(path):
        network = load_hugging_face(path, trust_remote_code=trust_remote_code, weights_as=weights_as)
        return network_logits(network, batches)
    return megatron_logits(path, batches, weights_as=weights_as)


def compare_logits(a: Sequence[Tensor], b: Sequence[Tensor]) -> LogitComparison:
    """Compare logits [B, S, vocab] of two models on the same batches."""
    largest = scale = agree = divergence = 0.0
    tokens = 0
    for x, y in zip(a, b, strict=True):
        if x.shape != y.shape:
            raise ConversionError(f"logits are {list(x.shape)} and {list(y.shape)}: not the same vocabulary")
        tokens += x.shape[:-1].numel()
        largest = max(largest, _largest_difference(x, y))
        scale = max(scale, float(x.abs().max()))
        numbers = x.isfinite().all(-1) & y.isfinite().all(-1)  # the largest of what is none would be the same one
        agree += float(((x.argmax(-1) == y.argmax(-1)) & numbers).sum())
        log_p, log_q = F.log_softmax(x.double(), -1), F.log_softmax(y.double(), -1)
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
    return LogitComparison(tokens, largest, scale, agree / tokens, divergence / tokens)


def perplexity(logits: Sequence[Tensor], batches: Sequence[Tensor]) -> float:
    """Exponential of the mean cross-entropy in nats of each next token; logits [B, S, vocab], batches [B, S]."""
    losses = [
        F.cross_entropy(scores[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten())
        for scores, tokens in zip(logits, batches, strict=True)
    ]
    return float(torch.stack(losses).mean().exp())  # infinite where it is too large, and no error as of math.exp
