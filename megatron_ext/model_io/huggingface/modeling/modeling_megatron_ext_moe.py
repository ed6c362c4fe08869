"""Feed-forward networks of a megatron_ext model: dense, and Mixture-of-Experts with its router."""

#   T tokens, E experts, K experts a token is sent to, G groups of experts, H hidden

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_megatron_ext import MegatronExtConfig

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}
TINY = 1e-20  # keeps a sum of sigmoids away from zero, as in training


class MegatronExtMLP(nn.Module):
    """One feed-forward network: a dense layer's, an expert, or the shared experts together."""

    def __init__(self, config: MegatronExtConfig, intermediate_size):
        super().__init__()
        self.activation = ACTIVATIONS[config.hidden_act]
        self.limit, self.offset = config.glu_limit, config.glu_offset
        hidden, bias = config.hidden_size, config.use_bias
        self.gate_proj = nn.Linear(hidden, intermediate_size, bias=bias) if config.gated_mlp else None
        self.up_proj = nn.Linear(hidden, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden, bias=bias)

    def forward(self, hidden):
        """Hidden states [..., H] -> [..., H]."""
        if self.gate_proj is None:
            return self.down_proj(self.activation(self.up_proj(hidden)))
        gate, up = self.gate_proj(hidden), self.up_proj(hidden)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self.down_proj(self.activation(gate) * (up + self.offset))


class MegatronExtExperts(nn.ModuleList):
    """The routed experts. Called with the routing already decided, so that an engine can put its own kernels here."""

    def forward(self, hidden_TH, topk_ids_TK, topk_weights_TK):
        """Each token's experts' outputs, times their weights, summed: [T, H]."""
        output_TH = torch.zeros_like(hidden_TH)
        order = topk_ids_TK.flatten().argsort()
        counts_E = topk_ids_TK.flatten().bincount(minlength=len(self)).tolist()  # the only wait for the device
        tokens = (order // topk_ids_TK.shape[1]).split(counts_E)
        weights = topk_weights_TK.flatten()[order].unsqueeze(-1).split(counts_E)
        for expert, token, weight in zip(self, tokens, weights, strict=True):
            if len(token):
                output_TH.index_add_(0, token, (expert(hidden_TH[token]) * weight).to(output_TH.dtype))
        return output_TH


class MegatronExtRouter(nn.Module):
    """Which experts each token is sent to and with what weights, in fp32 as in training.

    The order of things: noise on the input, logits, normalization, noise on the logits, scores, selection, weights.
    Noise is drawn in training mode only.
    """

    def __init__(self, config: MegatronExtConfig):
        super().__init__()
        self.config, self.top_k = config, config.num_experts_per_tok
        self.normalization, self.noise = config.gating_normalization, config.router_noise
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_experts)) if config.router_bias else None
        if self.noise is not None and self.noise["kind"] == "learned":
            self.noise_weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.expert_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, hidden_TH):
        """Return expert ids [T, K] and their weights [T, K] in fp32."""
        logits_TE = self._logits(hidden_TH)
        sigmoid = self.config.scoring_func == "sigmoid"
        scores_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(dim=-1)
        ids_TK = self._choose(logits_TE.detach(), scores_TE.detach())
        if self.config.weights_sum_to_one:
            weights_TK = logits_TE.gather(1, ids_TK).softmax(dim=-1)
        else:
            weights_TK = scores_TE.gather(1, ids_TK)
            if self.config.norm_topk_prob:
                weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + TINY)
        if self.config.routed_scaling_factor is not None:
            weights_TK = weights_TK * self.config.routed_scaling_factor
        return ids_TK, weights_TK

    def _logits(self, hidden_TH):
        """What tokens are routed by [T, E]."""
        noise = self.noise["kind"] if self.noise is not None and self.training else None
        if noise == "input_jitter":
            eps = self.noise["eps"]
            hidden_TH = hidden_TH * torch.empty_like(hidden_TH).uniform_(1 - eps, 1 + eps)
        logits_TE = F.linear(hidden_TH.float(), self.weight.float())
        if self.bias is not None:
            logits_TE = logits_TE + self.bias.float()
        if self.normalization is not None:
            centred = logits_TE - logits_TE.mean(dim=-1, keepdim=True)
            deviation = logits_TE.std(dim=-1, correction=self.normalization["correction"], keepdim=True)
            logits_TE = self.normalization["scale"] * centred / (deviation + self.normalization["eps"])
        if noise == "gumbel":
            return logits_TE - self.noise["scale"] * torch.empty_like(logits_TE).exponential_().log()
        if noise == "learned":
            deviation = F.softplus(F.linear(hidden_TH.float(), self.noise_weight.float()))
            return logits_TE + deviation * torch.randn_like(logits_TE)
        return logits_TE

    def _choose(self, logits_TE, scores_TE):
        """The experts of each token [T, K]; a bias and groups take part in the choice only."""
        bias, groups = self.e_score_correction_bias, self.config.n_group
        # Logits order experts as scores do, without the ties that rounding makes of very small scores.
        choice_TE = logits_TE if bias is None and groups is None else scores_TE
        if bias is not None:
            choice_TE = choice_TE + bias.float()
        if groups is not None:
            members = choice_TE.unflatten(-1, (groups, -1))
            two = self.config.group_score == "top2_sum"
            worth_TG = members.topk(2, dim=-1).values.sum(dim=-1) if two else members.amax(dim=-1)
            best = worth_TG.topk(self.config.topk_group, dim=-1).indices
            closed_TG = torch.ones_like(worth_TG, dtype=torch.bool).scatter_(1, best, False)
            choice_TE = members.masked_fill(closed_TG.unsqueeze(-1), float("-inf")).flatten(1)
        return choice_TE.topk(self.top_k, dim=-1).indices


class MegatronExtMoE(nn.Module):
    """Router, routed experts and shared experts of one layer."""

    def __init__(self, config: MegatronExtConfig):
        super().__init__()
        self.gate = MegatronExtRouter(config)
        self.experts = MegatronExtExperts(
            MegatronExtMLP(config, config.moe_intermediate_size) for _ in range(config.num_experts)
        )
        shared = config.shared_expert_intermediate_size
        self.shared_expert = None if shared is None else MegatronExtMLP(config, shared)
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if config.shared_expert_gate else None

    def forward(self, hidden_states):
        """Hidden states [B, S, H] -> [B, S, H]."""
        hidden_TH = hidden_states.flatten(0, -2)
        output_TH = self.experts(hidden_TH, *self.gate(hidden_TH))
        if self.shared_expert is not None:
            shared_TH = self.shared_expert(hidden_TH)
            if self.shared_expert_gate is not None:
                shared_TH = shared_TH * self.shared_expert_gate(hidden_TH).sigmoid()
            output_TH = output_TH + shared_TH
        return output_TH.view(hidden_states.shape)
