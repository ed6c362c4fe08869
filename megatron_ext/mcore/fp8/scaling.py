"""How the operands of one fp8 linear layer are scaled, and the history that delayed scaling goes by."""

import enum
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_ext.config import Fp8Precision
from megatron_ext.mcore.fp8.quantize import (
    E4M3,
    E5M2,
    ROW,
    WHOLE,
    Quantized,
    Tile,
    quantize,
    quantize_both,
    tile_maxima,
)


class Role(enum.IntEnum):
    """What an operand is in its layer; also its row in the history."""

    INPUT = 0
    WEIGHT = 1
    GRADIENT = 2


_TILES: dict[str, Tile] = {
    "tensorwise": WHOLE,
    "delayed": WHOLE,
    "rowwise": ROW,
    "blockwise": (1, 128),
    "mxfp8": (1, 32),
}
_WEIGHT_TILES: dict[str, Tile] = {**_TILES, "blockwise": (128, 128)}


@dataclass(frozen=True)
class _KeptWeight:
    """A weight in fp8 as the products of a step need it."""

    identity: tuple[int, int]
    """Address and version of the weight that it was made of."""
    straight: Quantized
    transposed: Quantized


class Scaling(torch.nn.Module):
    """Quantises the operands of one linear layer by a recipe.

    With delayed scaling (arXiv 2209.05433, section 3.2; Transformer Engine's DelayedScaling) a tensor's scale comes
    from its largest magnitudes in past optimizer steps. While a history is empty the tensor's own maximum is taken:
    a scale of 1 would flush small gradients to zero. Maxima of the present step are gathered beside the history, and
    `advance` takes them over when the step has been made, reduced over all ranks that share the layer: every layout
    has the same history, and passing a micro-batch twice, as activation recompute does, changes nothing.

    A weight changes between steps only. From `open_step` to `close_step` it is therefore quantised once, in both
    layouts from one reading, and every micro-batch, forward, recomputed and backward, takes the same fp8 numbers.
    megatron-core's optimizers write weights past autograd's version counter, so it is the step that ends what is kept,
    whatever its end (kept_weights.py); outside of a step, and in evaluation, each pass quantises for itself.

    Attributes:
        amax_history: [3, amax_history_len], latest first; training state (histories.py).
        latest: [3], largest magnitudes of the present step.
    """

    amax_history: Tensor
    latest: Tensor
    _kept: _KeptWeight | None

    def __init__(
        self, precision: Fp8Precision, *, gradient_format: torch.dtype | None = None, triton: bool = False
    ) -> None:
        super().__init__()
        self.precision, self.triton = precision, triton
        self.gradient_format = gradient_format or (E5M2 if precision.format == "hybrid" else E4M3)
        self._in_step, self._kept = False, None
        if self.is_delayed:
            self.register_buffer("amax_history", torch.zeros(len(Role), precision.amax_history_len), persistent=False)
            self.register_buffer("latest", torch.zeros(len(Role)), persistent=False)

    @property
    def is_delayed(self) -> bool:
        """Whether scales come from past steps."""
        return self.precision.recipe == "delayed"

    def tile(self, role: Role) -> Tile:
        """Which elements of the operand share a scale."""
        return (_WEIGHT_TILES if role is Role.WEIGHT else _TILES)[self.precision.recipe]

    def dtype(self, role: Role) -> torch.dtype:
        """The operand's fp8 format."""
        return self.gradient_format if role is Role.GRADIENT else E4M3

    def open_step(self) -> None:
        """From now on the weight does not change: what is made of it is kept."""
        self._in_step, self._kept = self.precision.keep_fp8_weights, None

    def close_step(self) -> None:
        """The weight may change: let go of what was made of it."""
        self._in_step, self._kept = False, None

    def weight(self, weight_NK: Tensor) -> tuple[Quantized, Tensor | None]:
        """The layer's weight [..., N, K] for a product that contracts K, and what `weight_t` wants to be given."""
        if self._in_step and self.training:
            return self._keep(weight_NK).straight, None
        maxima, lasting = self.lasting_maxima(Role.WEIGHT, weight_NK)
        return self.quantize(Role.WEIGHT, weight_NK, maxima), lasting

    def weight_t(self, weight_NK: Tensor, maxima: Tensor | None) -> Quantized:
        """Its transpose [..., K, N], for the product of the backward pass, which contracts N."""
        if self._in_step and self.training:
            return self._keep(weight_NK).transposed
        return self.quantize(Role.WEIGHT, weight_NK.mT, maxima)

    def _keep(self, weight_NK: Tensor) -> _KeptWeight:
        identity = weight_NK.data_ptr(), weight_NK._version
        if self._kept is None or self._kept.identity != identity:
            self._kept = None  # its memory is free before the new one is made
            self._kept = _KeptWeight(identity, *self.quantize_both(Role.WEIGHT, weight_NK))
        return self._kept

    def quantize(self, role: Role, x_RK: Tensor, maxima: Tensor | None = None) -> Quantized:
        """Quantise an operand [..., R, K] of a product that contracts K.

        Args:
            maxima: `self.maxima(role, whole)` of a larger tensor whose part `x_RK` is.
        """
        if maxima is None:
            maxima = self.maxima(role, x_RK)
        return quantize(x_RK, self.dtype(role), self.tile(role), maxima, saturate=self.is_delayed, triton=self.triton)

    def quantize_both(self, role: Role, x_RK: Tensor) -> tuple[Quantized, Quantized]:
        """Quantise matrices and their transposes, for a product that contracts K and one that contracts R."""
        largest = self.maxima(role, x_RK)
        maxima = (largest, largest if self.tile(role) == WHOLE else self.maxima(role, x_RK.mT))
        options = {"saturate": self.is_delayed, "triton": self.triton}
        return quantize_both(x_RK, self.dtype(role), self.tile(role), maxima, **options)

    def lasting_maxima(self, role: Role, x_RK: Tensor) -> tuple[Tensor, Tensor | None]:
        """`maxima`, and once more if they are those of the transpose too: it need not be read for them again."""
        maxima = self.maxima(role, x_RK)
        return maxima, maxima if self.tile(role) == WHOLE else None

    def maxima(self, role: Role, x_RK: Tensor) -> Tensor:
        """The magnitudes that scales are made from, one a tile; with delayed scaling the estimate, and recorded."""
        present = tile_maxima(x_RK, self.tile(role))
        if not self.is_delayed:
            return present
        # Stacked matrices (the experts of a layer) share one history.
        largest = present.amax()
        if self.training:
            self.latest[role] = torch.maximum(self.latest[role], largest)
        history = self.amax_history[role]
        past = history.amax() if self.precision.amax_compute_algo == "max" else history[0]
        estimate = torch.where(past > 0, past, largest) * 2.0**self.precision.margin
        return torch.where(largest.isfinite(), estimate, torch.nan).expand_as(present)

    def advance(self, maxima: Tensor) -> None:
        """Take the maxima [3] of a step into the history; one that is not finite counts as unknown."""
        newest = torch.where(maxima.isfinite(), maxima, 0.0).unsqueeze(1)
        self.amax_history.copy_(torch.cat([newest, self.amax_history[:, :-1]], dim=1))
        self.latest.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Scaling":
        """Follow the model to its device, but stay in fp32 when it is converted to bf16."""
        super()._apply(fn, recurse)
        if self.is_delayed:
            self.amax_history, self.latest = self.amax_history.float(), self.latest.float()
        return self
