"""Ways to merge models of one shape, as functions of the versions of one tensor.

With a base model, its difference to each of the others is called their task vector (Ilharco et al. 2023, arXiv
2212.04089).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from megatron_ext.canonical.seeds import seed_from_name
from megatron_ext.config.base import config
from megatron_ext.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


Versions = Sequence[Callable[[], "Tensor"]]
"""Reads the same tensor of each model."""


class Merge(ABC):
    """One way to merge. Its fields are its options."""

    kind: str
    needs_base = False
    """Whether it works on differences to a base model."""

    def check(self, models: int) -> None:
        """Raise ConfigError where this cannot merge so many models."""
        if models < 2 and not self.needs_base:
            raise ConfigError("sources: give two models or more, or --last N with a directory of checkpoints")

    @abstractmethod
    def merge(self, name: str, versions: Versions, base: Tensor | None, seed: int) -> Tensor:
        """Merge the versions of the tensor `name`; `base` is its version in the base model. Their dtype is kept."""


class Weighted(Merge):
    """A way to merge in which each model may have a weight."""

    weights: list[float] | None

    def check(self, models: int) -> None:
        """Each model must have a weight where weights are given."""
        super().check(models)
        if self.weights is not None and len(self.weights) != models:
            raise ConfigError(f"weights = {self.weights}: {len(self.weights)} weights for {models} models")

    def each(self, versions: Versions) -> list[float]:
        """The weight of each version."""
        return self.weights if self.weights is not None else [1.0] * len(versions)


@config
class Linear(Weighted):
    """Weighted mean: checkpoint averaging, model soups (Wortsman et al. 2022, arXiv 2203.05482)."""

    kind: Literal["linear"] = "linear"
    weights: list[float] | None = None
    """Weight of each model; divided by their sum. Default: equal."""

    def check(self, models: int) -> None:
        """Weights must not sum to nothing."""
        super().check(models)
        if self.weights is not None and sum(self.weights) == 0:
            raise ConfigError(f"weights = {self.weights}: sum to 0")

    def merge(self, name: str, versions: Versions, base: Tensor | None, seed: int) -> Tensor:
        """The weighted mean."""
        weights = self.each(versions)
        return _sum([weight / sum(weights) for weight in weights], versions)


@config
class Ema(Merge):
    """Exponential moving average of checkpoints in their order, oldest first."""

    kind: Literal["ema"] = "ema"
    decay: float = Field(default=0.8, gt=0, lt=1)
    """Share of the average so far that is kept at each further checkpoint."""

    def merge(self, name: str, versions: Versions, base: Tensor | None, seed: int) -> Tensor:
        """Average = decay * average + (1 - decay) * next, beginning with the first."""
        last = len(versions) - 1
        weights = [self.decay ** (last - number) * (1 - self.decay if number else 1.0) for number in range(last + 1)]
        return _sum(weights, versions)


@config
class TaskArithmetic(Weighted):
    """The base plus the weighted sum of task vectors (arXiv 2212.04089, section 2)."""

    kind: Literal["task_arithmetic"] = "task_arithmetic"
    weights: list[float] | None = None
    """Weight of each task vector. Default: 1 each. Negative ones take something away."""
    needs_base = True

    def merge(self, name: str, versions: Versions, base: Tensor | None, seed: int) -> Tensor:
        """Base + sum of weight * (version - base)."""
        from megatron_ext.merging.weighted_sum import WeightedSum

        assert base is not None
        weights, total = self.each(versions), WeightedSum()
        total.add(1 - sum(weights), base)
        for weight, read in zip(weights, versions, strict=True):
            total.add(weight, read())
        return total.result()


@config
class Ties(Weighted):
    """Trim, elect sign, and merge (Yadav et al. 2023, arXiv 2306.01708, section 4): fewer task vectors cancel out.

    What is kept of a task vector is decided in each Megatron tensor (one holds queries, keys and values, one gate and
    up), so that models of any size are merged in little memory: the versions of a tensor, and three of its own at most.
    Where votes of both signs sum to exactly 0, the sign that most entries of the tensor have is elected, as the
    authors' code does over the whole model; plus if there are as many of each.
    """

    kind: Literal["ties"] = "ties"
    density: float = Field(default=0.2, gt=0, le=1)
    """Share of each task vector's entries that is kept, the largest ones."""
    weights: list[float] | None = None
    """Weight of each task vector in the election and in the mean. Default: 1 each."""
    scale: float = Field(default=1.0, gt=0)
    """The paper's lambda, a factor on the merged task vector."""
    needs_base = True

    def merge(self, name: str, versions: Versions, base: Tensor | None, seed: int) -> Tensor:
        """Base + scale * the mean of those trimmed entries that have the elected sign."""
        import torch

        from megatron_ext.merging.pieces import pieces

        assert base is not None
        weights, base = self.each(versions), base.contiguous()
        others = [read().contiguous() for read in versions]
        trims = [_Trim(other, base, self.density) for other in others]
        merged = torch.empty(base.shape, dtype=base.dtype)
        undecided, majority = [], 0.0
        for target, before, *parts in zip(*map(pieces, (merged, base, *others)), strict=True):
            vectors = [trim(_difference(part, before)) for trim, part in zip(trims, parts, strict=True)]
            votes = torch.stack([weight * vector for weight, vector in zip(weights, vectors, strict=True)])
            signs = votes.sum(dim=0).sign()
            target.copy_(before + self.scale * _elected_mean(votes, weights, signs))
            majority += float(signs.nansum())
            tied = ((signs == 0) & (votes != 0).any(dim=0)).nonzero().flatten()
            undecided.append((target, tied, before[tied], votes[:, tied]))
        for target, tied, before, votes in undecided:
            signs = votes.new_full((len(tied),), 1.0 if majority >= 0 else -1.0)
            target[tied] = (before + self.scale * _elected_mean(votes, weights, signs)).to(target.dtype)
        return merged


class _Trim:
    """Keeps the largest entries of a task vector, whose pieces come in order, and puts zeros in the others' places."""

    def __init__(self, version: Tensor, base: Tensor, density: float) -> None:
        import torch

        from megatron_ext.merging.pieces import pieces
        from megatron_ext.merging.weighted_sum import wider

        sizes = torch.empty(base.numel(), dtype=wider(base.dtype))
        for target, after, before in zip(*map(pieces, (sizes, version, base)), strict=True):
            target.copy_(_difference(after, before).abs_())
        dropped = len(sizes) - max(round(density * len(sizes)), 1)
        array = sizes.numpy()
        array.partition(dropped)
        self._least = float(array[dropped])
        # Differences of bf16 weights are often equal: the share is kept exactly, of equal ones the first.
        self._equal = int((array[dropped:] == self._least).sum())

    def __call__(self, vector: Tensor) -> Tensor:
        """The next piece."""
        size = vector.abs()
        equal = (size == self._least).nonzero().flatten()[: self._equal]
        self._equal -= len(equal)
        dropped = size <= self._least  # not a number is kept
        dropped[equal] = False
        return vector.masked_fill_(dropped, 0.0)


def _difference(version: Tensor, base: Tensor) -> Tensor:
    """The task vector, in the wider dtype."""
    from megatron_ext.merging.weighted_sum import wider

    wide = wider(base.dtype)
    return version.to(wide) - base.to(wide)


def _elected_mean(votes: Tensor, weights: list[float], signs: Tensor) -> Tensor:
    """The weighted mean of those entries of the votes [model, entry] that have the elected sign of the entry."""
    agrees = ~(votes * signs <= 0)  # not a number has its say, to be seen
    voices = agrees.to(votes.dtype) * votes.new_tensor(weights).abs()[:, None]
    return votes.where(agrees, 0.0).sum(dim=0) / voices.sum(dim=0).where(agrees.any(dim=0), 1.0)


@config
class Dare(Weighted):
    """Drop and rescale (Yu et al. 2024, arXiv 2311.03099, section 3.2), then task arithmetic."""

    kind: Literal["dare"] = "dare"
    drop_rate: float = Field(default=0.9, ge=0, lt=1)
    """Share of each task vector's entries that is dropped at random; the others are divided by one minus that."""
    weights: list[float] | None = None
    """Weight of each task vector. Default: 1 each."""
    needs_base = True

    def merge(self, name: str, versions: Versions, base: Tensor | None, seed: int) -> Tensor:
        """Base + sum of weight * the dropped and rescaled task vector."""
        import torch

        from megatron_ext.merging.pieces import pieces
        from megatron_ext.merging.weighted_sum import wider

        assert base is not None
        base = base.contiguous()
        merged = base.to(wider(base.dtype), copy=True)
        for number, (weight, read) in enumerate(zip(self.each(versions), versions, strict=True)):
            generator = torch.Generator().manual_seed(seed_from_name(seed, f"{name}.{number}"))
            for target, after, before in zip(*map(pieces, (merged, read().contiguous(), base)), strict=True):
                kept = torch.rand(len(target), generator=generator) >= self.drop_rate
                target.add_(_difference(after, before).where(kept, 0.0), alpha=weight / (1 - self.drop_rate))
        return merged.to(base.dtype)


AnyMerge = Annotated[Linear | Ema | TaskArithmetic | Ties | Dare, Field(discriminator="kind")]


def _sum(weights: Sequence[float], versions: Versions) -> Tensor:
    from megatron_ext.merging.weighted_sum import WeightedSum

    total = WeightedSum()
    for weight, read in zip(weights, versions, strict=True):
        total.add(weight, read())
    return total.result()
