"""Builds this rank's model chunks, wrapped for data parallelism."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel as CoreGPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.config import ModelConfig, ParallelConfig
from megatron_ext.mcore.cross_entropy import vocab_parallel_cross_entropy
from megatron_ext.mcore.layer_specs import block_spec
from megatron_ext.mcore.moe.router import Router
from megatron_ext.mcore.rotary import RotaryEmbedding


class GPTModel(CoreGPTModel):
    """megatron-core's GPTModel with our rotary embedding, and a loss that knows which vocabulary entries are padding.

    The embedding is padded so that it splits evenly. megatron-core lets the padding take part in the softmax;
    here it has probability zero, so that the loss is the exported model's.
    """

    def __init__(self, *, model: ModelConfig, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self.true_vocab_size, self.output_z_loss_coeff = model.vocab_size, model.output_z_loss_coeff
        if hasattr(self, "rotary_pos_emb"):
            self.rotary_pos_emb = RotaryEmbedding(model, config, self.pg_collection.cp)
        if self.pre_process and model.position_embedding_type == "learned_absolute":
            self.embedding.position_embeddings.to(config.params_dtype)  # megatron-core leaves it in fp32
        if self.pre_process and model.embedding_scale != 1.0:
            self.embedding.word_embeddings.register_forward_hook(
                lambda module, tokens, embedded: embedded * model.embedding_scale
            )

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return the cross-entropy of each token, [B, S], from this TP rank's logits [S, B, V / TP].

        In training with an output z-loss (PaLM, arXiv 2204.02311, section 5): [2, B, S], the cross-entropy and the
        weighted square of log(Z), Z being the sum over the vocabulary of the exponentiated logits.
        """
        group = self.pg_collection.tp
        losses_SB, log_sums_SB = vocab_parallel_cross_entropy(logits, labels.t(), self.true_vocab_size, group)
        if not (self.training and self.output_z_loss_coeff):
            return losses_SB.t()
        return torch.stack((losses_SB, self.output_z_loss_coeff * log_sums_SB.square())).transpose(1, 2)


def build_chunks(
    model: ModelConfig, parallel: ParallelConfig, config: TransformerConfig, device: torch.device
) -> list[GPTModel]:
    """Return this rank's model chunks (one without virtual pipeline stages), with uninitialised weights."""
    stages = parallel.virtual_pipeline_model_parallel_size
    vp_stages = range(stages) if stages else [None]
    with torch.device(device):
        return [_build_chunk(model, config, vp_stage) for vp_stage in vp_stages]


def _build_chunk(model: ModelConfig, config: TransformerConfig, vp_stage: int | None) -> GPTModel:
    return GPTModel(
        model=model,
        config=config,
        transformer_layer_spec=block_spec(model, config, vp_stage),
        vocab_size=model.padded_vocab_size,
        max_sequence_length=model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        vp_stage=vp_stage,
    )


def splits_optimizer(parallel: ParallelConfig) -> bool:
    """Whether megatron-core's distributed optimizer is used.

    On one process it has nothing to split, and would copy gradients and weights onto themselves in every step. Its
    checkpoints and the plain optimizer's are the same.
    """
    overlaps = parallel.overlap_grad_reduce or parallel.overlap_param_gather
    return parallel.use_distributed_optimizer and (overlaps or dist.get_world_size() > 1)


def wrap_chunks(chunks: list[GPTModel], config: TransformerConfig, parallel: ParallelConfig) -> list[Any]:
    """Return `chunks` wrapped for mixed precision and data parallelism, gradients kept and reduced in fp32."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=splits_optimizer(parallel),
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
    )
    wrapped = []
    for index, chunk in enumerate(chunks):
        module = Float16Module(config, chunk) if config.bf16 else chunk
        # Later chunks are reduced in one bucket: with interleaved pipelines their gradients are complete all at once.
        wrapped.append(DistributedDataParallel(config, settings, module, disable_bucketing=index > 0))
    return wrapped


def gather_parameters(wrapped: list[Any], parallel: ParallelConfig) -> None:
    """Make sure every rank holds the updated weights before they are read outside a forward pass."""
    if parallel.overlap_param_gather:
        for chunk in wrapped:
            chunk.start_param_sync(force_sync=True)


def routers(chunks: Sequence[torch.nn.Module]) -> list[Router]:
    """Every router of this rank's layers."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Router)]
