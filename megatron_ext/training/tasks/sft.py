"""Supervised fine-tuning: the weighted mean cross-entropy of the answers of conversations."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_ext.config import ModelConfig, SftTask
from megatron_ext.data.stream.batches import MicroBatch
from megatron_ext.training.tasks.pretrain import Pretrain


@dataclass(frozen=True)
class Sft(Pretrain):
    """Pretraining's arithmetic on labels that have weights: sum of w x loss over sum of w, of the whole global batch.

    The weights stand in the micro-batch's `loss_mask` (data/stream/chat.py): 1 for each token of an answer, 1 over the
    number of these in its sample, or the weight of its row. Units are the sum of the weights.
    """

    neftune_alpha: float = 0.0

    @classmethod
    def of_task(cls, task: SftTask, model: ModelConfig) -> "Sft":
        """The task for `model`."""
        return cls(has_output_z_loss=model.output_z_loss_coeff > 0, neftune_alpha=task.neftune_alpha)

    def forward(self, model: Any, micro: MicroBatch) -> Tensor:
        """See `Pretrain.forward`; in training with noise on the embeddings, if that is asked for."""
        output: Tensor = model(
            micro.tokens,
            micro.position_ids,
            micro.document_lengths,
            labels=micro.labels,
            sample_seeds_B=micro.seeds,
            embedding_noise=self.neftune_alpha,
        )
        return output
