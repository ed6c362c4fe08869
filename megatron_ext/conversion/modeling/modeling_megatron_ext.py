"""A Llama-shaped language model with Mixture-of-Experts layers, as trained by megatron_ext.

Depends on torch and transformers only. Attention, cache, generation and everything around the feed-forward layers is
transformers' Llama; what is defined here is the router with gating-logit normalization, routed experts and shared
experts.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from .configuration_megatron_ext import MegatronExtConfig


class MegatronExtMLP(nn.Module):
    """One gated feed-forward network: an expert, or the shared experts together."""

    def __init__(self, hidden_size, intermediate_size):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden):
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class MegatronExtExperts(nn.ModuleList):
    """The routed experts. Called with the routing already decided, so that an engine can put its own kernels here."""

    def forward(self, hidden_states, topk_ids, topk_weights):
        """hidden_states [T, H], topk_ids and topk_weights [T, K] -> [T, H]."""
        output = torch.zeros_like(hidden_states)
        for number in topk_ids.unique().tolist():
            token, slot = torch.where(topk_ids == number)
            contribution = self[number](hidden_states[token]) * topk_weights[token, slot].unsqueeze(-1)
            output.index_add_(0, token, contribution.to(output.dtype))
        return output


class MegatronExtMoE(nn.Module):
    """Router, routed experts and shared experts of one layer."""

    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.softmax_before_topk = config.softmax_before_topk
        self.scaling_factor = config.routed_scaling_factor
        self.normalization = config.gating_normalization
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = MegatronExtExperts(
            MegatronExtMLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts)
        )
        self.shared_expert = None
        if config.shared_expert_intermediate_size is not None:
            self.shared_expert = MegatronExtMLP(config.hidden_size, config.shared_expert_intermediate_size)

    def route(self, hidden):
        """Hidden [T, H] -> expert ids [T, K] and their weights [T, K], in fp32 as in training."""
        logits = F.linear(hidden.float(), self.gate.weight.float())
        if self.normalization is not None:
            centred = logits - logits.mean(dim=-1, keepdim=True)
            deviation = logits.std(dim=-1, correction=self.normalization["correction"], keepdim=True)
            logits = self.normalization["scale"] * centred / (deviation + self.normalization["eps"])
        if self.softmax_before_topk:
            weights, ids = logits.softmax(dim=-1).topk(self.top_k, dim=-1)
        else:
            selected, ids = logits.topk(self.top_k, dim=-1)
            weights = selected.softmax(dim=-1)
        if self.scaling_factor is not None:
            weights = weights * self.scaling_factor
        return ids, weights

    def forward(self, hidden_states):
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        output = self.experts(hidden, *self.route(hidden))
        if self.shared_expert is not None:
            output = output + self.shared_expert(hidden)
        return output.view(hidden_states.shape)


class MegatronExtDecoderLayer(LlamaDecoderLayer):
    """Llama's layer, with experts in the layers that have them."""

    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        if config.moe_layer_pattern[layer_idx]:
            self.mlp = MegatronExtMoE(config)


class MegatronExtPreTrainedModel(LlamaPreTrainedModel):
    """What transformers needs to know about loading and placing the model."""

    config_class = MegatronExtConfig
    _no_split_modules = ["MegatronExtDecoderLayer"]
    # Which experts run depends on the tokens, so the forward pass is no single graph.
    _can_compile_fullgraph = False


class MegatronExtModel(MegatronExtPreTrainedModel, LlamaModel):
    """The layers without the output head."""

    def __init__(self, config):
        MegatronExtPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(MegatronExtDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class MegatronExtForCausalLM(MegatronExtPreTrainedModel, LlamaForCausalLM):
    """The language model."""

    def __init__(self, config):
        MegatronExtPreTrainedModel.__init__(self, config)
        self.model = MegatronExtModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


__all__ = ["MegatronExtConfig", "MegatronExtForCausalLM", "MegatronExtModel"]
