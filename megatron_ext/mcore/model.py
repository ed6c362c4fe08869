"""The language model that is trained, as this rank's model chunks, and their wrapping for data parallelism."""

#   S sequence of this rank, B micro-batch, H hidden, V vocabulary

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_ext.config import ModelConfig, ParallelConfig
from megatron_ext.config.adapters import EMBEDDING_MODULE, OUTPUT_MODULE
from megatron_ext.mcore.adapters import NO_ADAPTERS, AdapterPlan, with_adapters
from megatron_ext.mcore.cross_entropy import vocab_parallel_cross_entropy
from megatron_ext.mcore.embedding_noise import add_noise
from megatron_ext.mcore.layer import offload_layers
from megatron_ext.mcore.layer_specs import block_spec
from megatron_ext.mcore.linear import ColumnParallelLinear
from megatron_ext.mcore.moe import sample_seeds
from megatron_ext.mcore.moe.router import Router
from megatron_ext.mcore.output_layer import LossByParts
from megatron_ext.mcore.rotary import RotaryEmbedding
from megatron_ext.mcore.transformer_config import LayerConfig
from megatron_ext.runtime.accelerators import fuses_weight_gradients

_OUTSIDE_LAYERS = frozenset((EMBEDDING_MODULE, OUTPUT_MODULE))


def _of_layers(adapters: AdapterPlan) -> AdapterPlan:
    return {name: change for name, change in adapters.items() if name not in _OUTSIDE_LAYERS}


def _as_it_is(part: type) -> type:
    return part


class LanguageModel(LanguageModule):
    """One model chunk: of embedding, transformer layers, final norm and output layer what this pipeline stage has.

    Modules have the names that megatron-core's GPTModel gives them (deprecated since 0.19), so the two load each
    other's checkpoints. Its base, which is not deprecated, ties the input embedding to the output layer across stages.
    megatron-core's schedules, wrappers and reduction of gradients read the attributes that are not documented here.

    Attributes:
        embedding: on the first stage.
        decoder: the layers of this chunk; on the last stage with the final norm.
        output_layer: on the last stage; without a weight of its own where the embedding is tied and here too.
    """

    def __init__(
        self, model: ModelConfig, config: LayerConfig, vp_stage: int | None, adapters: AdapterPlan = NO_ADAPTERS
    ) -> None:
        super().__init__(config=config)
        self.model, self.vp_stage = model, vp_stage
        self._outside_layers = {name: adapters[name] for name in _OUTSIDE_LAYERS & adapters.keys()}
        first_layer = get_transformer_layer_offset(config, vp_stage=vp_stage)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        self.post_process = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        self.share_embeddings_and_output_weights = not model.untie_embeddings_and_output_weights
        if self.pre_process:
            self.embedding = self._embedding()
        self.rotary_pos_emb = None
        if model.position_embedding_type == "rope" and model.multi_latent_attention is None:
            self.rotary_pos_emb = RotaryEmbedding(model, config, self.pg_collection.cp)
        self.decoder = TransformerBlock(
            config=config,
            spec=with_adapters(block_spec(model, config, vp_stage), _of_layers(adapters), first_layer),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=self.pg_collection,
            vp_stage=vp_stage,
        )
        if self.post_process:
            self.output_layer = self._output_layer()
        if self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()
        for module in self.modules():
            if hasattr(module, "finish_init"):  # of Transformer Engine's layers: no precision of their own
                module.finish_init(None)

    def _embedding(self) -> LanguageModelEmbedding:
        model = self.model
        embedding = LanguageModelEmbedding(
            config=self.config,
            vocab_size=model.padded_vocab_size,
            max_sequence_length=model.max_position_embeddings,
            position_embedding_type=model.position_embedding_type,
            tp_group=self.pg_collection.tp,
        )
        if model.position_embedding_type == "learned_absolute":
            embedding.position_embeddings.to(self.config.params_dtype)  # megatron-core leaves it in fp32
        if EMBEDDING_MODULE in self._outside_layers:
            # megatron-core builds this class and no other; what the spec says of layers, nothing says of it.
            embedding.word_embeddings = self._outside_layers[EMBEDDING_MODULE](VocabParallelEmbedding)(
                num_embeddings=model.padded_vocab_size,
                embedding_dim=model.hidden_size,
                init_method=self.config.embedding_init_method,
                reduce_scatter_embeddings=embedding.reduce_scatter_embeddings,
                config=self.config,
                tp_group=self.pg_collection.tp,
            )
        if model.embedding_scale != 1.0:
            embedding.word_embeddings.register_forward_hook(
                lambda module, tokens, embedded: embedded * model.embedding_scale
            )
        return embedding

    def _output_layer(self) -> ColumnParallelLinear:
        # Where its weight gradient is computed late (an override), the schedules find what is kept for it here.
        late = self.config.defer_embedding_wgrad_compute
        self.embedding_activation_buffer: list[Tensor] | None = [] if late else None
        self.grad_output_buffer: list[Tensor] | None = [] if late else None
        config = self.config
        if config.gradient_accumulation_fusion and not fuses_weight_gradients():
            config = copy(config)  # Transformer Engine's layers add up by themselves, this one is megatron-core's
            config.gradient_accumulation_fusion = False
        adapted = self._outside_layers.get(OUTPUT_MODULE, _as_it_is)
        return adapted(LossByParts if self.config.recompute_logits else ColumnParallelLinear)(
            self.config.hidden_size,
            self.model.padded_vocab_size,
            config=config,
            init_method=self.config.init_method,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
            embedding_activation_buffer=self.embedding_activation_buffer,
            grad_output_buffer=self.grad_output_buffer,
            tp_group=self.pg_collection.tp,
        )

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None]) -> None:
        """Take what the stage before has sent; the next forward pass begins with it. The schedules call this."""
        (tensor,) = input_tensor if isinstance(input_tensor, list) else (input_tensor,)
        self.decoder.set_input_tensor(tensor)

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        document_lengths: Tensor | None,
        labels: Tensor | None = None,
        sample_seeds_B: Tensor | None = None,
        embedding_noise: float = 0.0,
    ) -> Tensor:
        """Return the hidden state [S, B, H] for the next stage; on the last the logits, or given labels the losses.

        Args:
            tokens: [B, S]; under context parallelism this rank's share.
            position_ids: [B, S]; learned position embeddings read them.
            document_lengths: None, or of each row the documents that tokens attend within (mcore/attention.py).
            labels: [B, S]
            sample_seeds_B: [B] int64, of which a noisy router draws in training.
            embedding_noise: NEFTune's alpha, in training with `sample_seeds_B` (mcore/embedding_noise.py).

        Returns:
            Logits are [B, S, V / TP], losses as `compute_language_model_loss` returns them.
        """
        if sample_seeds_B is not None:
            sample_seeds.hand_down(sample_seeds_B)
        embedded = self.embedding(tokens, position_ids) if self.pre_process else None
        if embedded is not None and embedding_noise and self.training and sample_seeds_B is not None:
            embedded = self._with_noise(embedded, embedding_noise, sample_seeds_B, document_lengths)
        hidden_SBH = self.decoder(
            hidden_states=embedded,
            attention_mask=document_lengths,
            rotary_pos_emb=self._angles(tokens.shape[1]),
        )
        if not self.post_process:
            return hidden_SBH
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        if labels is not None and self.config.recompute_logits:
            labels_SB, vocabulary = labels.t(), self.model.vocab_size
            return self._weighted(*self.output_layer(hidden_SBH, tied, labels=labels_SB, true_vocab_size=vocabulary))
        logits, _ = self.output_layer(hidden_SBH, weight=tied)
        if labels is None:
            return logits.transpose(0, 1).contiguous()
        return self.compute_language_model_loss(labels, logits)

    def _with_noise(self, embedded: Tensor, alpha: float, seeds_B: Tensor, document_lengths: Tensor | None) -> Tensor:
        context, tensor = self.pg_collection.cp, self.pg_collection.tp if self.config.sequence_parallel else None
        if document_lengths is None:
            length = embedded.shape[0] * context.size() * (tensor.size() if tensor is not None else 1)
            documents = [[length]] * embedded.shape[1]
        else:
            documents = [list(filter(None, row)) for row in document_lengths.tolist()]
        return add_noise(embedded, alpha, seeds_B, documents, context=context, tensor=tensor)

    def _angles(self, length: int) -> Tensor | None:
        """Angles of rotary embedding for `length` tokens of this rank; latent attention makes its own."""
        return None if self.rotary_pos_emb is None else self.rotary_pos_emb(length * self.pg_collection.cp.size())

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return the cross-entropy of each token, [B, S], from this TP rank's logits [S, B, V / TP].

        The embedding is padded so that it splits evenly; padding has probability zero, as in the exported model. In
        training with an output z-loss (PaLM, arXiv 2204.02311, section 5): [2, B, S], the cross-entropy and the
        weighted square of log(Z), Z being the sum over the vocabulary of the exponentiated logits.
        """
        triton = self.config.triton_kernels
        return self._weighted(
            *vocab_parallel_cross_entropy(
                logits, labels.t(), self.model.vocab_size, self.pg_collection.tp, triton=triton
            )
        )

    def _weighted(self, losses_SB: Tensor, log_sums_SB: Tensor) -> Tensor:
        """What `compute_language_model_loss` returns, of each token's cross-entropy and log(Z)."""
        z_loss = self.model.output_z_loss_coeff
        if not (self.training and z_loss):
            return losses_SB.t()
        return torch.stack((losses_SB, z_loss * log_sums_SB.square())).transpose(1, 2)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe every parameter and saved buffer as a part of a global tensor of the checkpoint."""
        described: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        # The linear class has one for Transformer Engine's sake; it is empty, and checkpoints never had it.
        described.pop(f"{prefix}output_layer._extra_state", None)
        return described


def build_chunks(
    model: ModelConfig,
    parallel: ParallelConfig,
    config: LayerConfig,
    device: torch.device,
    adapters: AdapterPlan = NO_ADAPTERS,
) -> list[LanguageModel]:
    """Return this rank's model chunks (one without virtual pipeline stages), with uninitialised weights.

    Args:
        adapters: which of its parts are built from other classes (mcore/adapters/).
    """
    stages = parallel.virtual_pipeline_model_parallel_size
    vp_stages = range(stages) if stages else [None]
    with torch.device(device):
        chunks = [LanguageModel(model, config, vp_stage, adapters) for vp_stage in vp_stages]
    if config.offload_layers:
        offload_layers((chunk.decoder.layers for chunk in chunks), config)
    return chunks


def splits_optimizer(parallel: ParallelConfig) -> bool:
    """Whether megatron-core's distributed optimizer is used.

    On one process it has nothing to split, and would copy gradients and weights onto themselves in every step. Its
    checkpoints and the plain optimizer's are the same.
    """
    overlaps = bool(parallel.overlap_grad_reduce or parallel.overlap_param_gather)
    return parallel.use_distributed_optimizer and (overlaps or dist.get_world_size() > 1)


def wrap_chunks(chunks: list[LanguageModel], config: LayerConfig, parallel: ParallelConfig) -> list[Any]:
    """Return `chunks` wrapped for mixed precision and data parallelism, gradients kept and reduced in fp32.

    Args:
        parallel: with its defaults of overlap applied; unset is off.
    """
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=splits_optimizer(parallel),
        overlap_grad_reduce=bool(parallel.overlap_grad_reduce),
        overlap_param_gather=bool(parallel.overlap_param_gather),
    )
    wrapped = []
    for index, chunk in enumerate(chunks):
        module = Float16Module(config, chunk) if config.bf16 else chunk
        # Later chunks are reduced in one bucket: with interleaved pipelines their gradients are complete all at once.
        wrapped.append(DistributedDataParallel(config, settings, module, disable_bucketing=index > 0))
    return wrapped


def gather_parameters(wrapped: list[Any]) -> None:
    """Make sure every rank holds the updated weights before they are read outside a forward pass."""
    for chunk in wrapped:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def routers(chunks: Sequence[torch.nn.Module]) -> list[Router]:
    """Every router of this rank's layers."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Router)]
