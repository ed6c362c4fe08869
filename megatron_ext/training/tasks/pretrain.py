"""Pretraining: the mean cross-entropy of the next token over all tokens whose label counts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_ext.config import ModelConfig
from megatron_ext.data.stream.batches import MicroBatch

LOSS, OUTPUT_Z_LOSS = "loss", "output_z_loss"


@dataclass(frozen=True)
class Pretrain:
    """Next-token prediction, with the model's output z-loss where it has one."""

    has_output_z_loss: bool = False
    has_perplexity = True

    @classmethod
    def of(cls, model: ModelConfig) -> "Pretrain":
        """The task for `model`."""
        return cls(has_output_z_loss=model.output_z_loss_coeff > 0)

    @property
    def sums(self) -> tuple[str, ...]:
        """Cross-entropy and, apart from it, the weighted output z-loss."""
        return (LOSS, OUTPUT_Z_LOSS) if self.has_output_z_loss else (LOSS,)

    def prepare(
        self, wrapped: Sequence[Any], batch: Sequence[MicroBatch], *, rows: int, length: int
    ) -> list[MicroBatch]:
        """The batch says all."""
        return list(batch)

    def forward(self, model: Any, micro: MicroBatch) -> Tensor:
        """The losses of each token: [B, S], or in training with an output z-loss [2, B, S]."""
        output: Tensor = model(
            micro.tokens, micro.position_ids, micro.document_lengths, labels=micro.labels, sample_seeds_B=micro.seeds
        )
        return output

    def loss(self, output: Tensor, micro: MicroBatch) -> Mapping[str, Tensor]:
        """Sums over the tokens that count."""
        sums_B = (output.float() * micro.loss_mask).sum(dim=-1).view(-1, len(micro.tokens))
        return dict(zip((LOSS, OUTPUT_Z_LOSS), sums_B, strict=False))

    def units(self, micro: MicroBatch) -> Tensor:
        """Tokens whose label counts."""
        return micro.loss_mask.sum(dim=-1)
