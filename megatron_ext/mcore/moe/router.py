"""The router: which experts each token is sent to, with what weights, and what it is told about balance."""

#   S sequence, B micro-batch, T = S x B tokens of this rank, E experts, K experts a token, H hidden

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.config import GumbelNoise, InputJitter, LearnedNoise, ModelConfig
from megatron_ext.errors import CheckpointError
from megatron_ext.mcore.moe import balance, noise, sample_seeds
from megatron_ext.mcore.moe.counts import RouterCounts
from megatron_ext.mcore.moe.selection import (
    Capacity,
    choose,
    normalize_gating_logits,
    probabilities_of,
    scores_of,
    weights_of,
)
from megatron_ext.mcore.moe.tokens import TokenGrid


class _GatingLinear(torch.autograd.Function):
    """`input @ weight.T` computed in fp32, keeping the input for the backward pass in the dtype it came in."""

    @staticmethod
    def forward(ctx: Any, tokens_TH: Tensor, weight_EH: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_TH, weight_EH)
        return tokens_TH.float() @ weight_EH.float().t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        tokens_TH, weight_EH = ctx.saved_tensors
        (grad_TE,) = grads
        grad_tokens = (grad_TE @ weight_EH.float()).to(tokens_TH.dtype)
        return grad_tokens, (grad_TE.t() @ tokens_TH.float()).to(weight_EH.dtype)


class Router(MegatronModule):
    """A linear gate in fp32 and everything that follows from its logits.

    Takes the place of megatron-core's TopKRouter in its MoE layer. The order of things: noise on the input, logits,
    z-loss, gating-logit normalization, noise on the logits, scores, selection, capacity, balance losses.

    Attributes:
        weight: [E, H]
        bias: [E], with `moe_router_linear_bias`; part of the logits.
        expert_bias: [E] in fp32, with `moe_router_enable_expert_bias`; part of the model.
        noise_weight: [E, H], with learned noise.
        aux_loss_coeff: coefficient of each balance loss; moves with `moe_adaptive_aux_loss`.
        counts: what has been routed since the last report, training passes only.
    """

    expert_bias: Tensor | None
    step_counts: Tensor
    global_counts_E: Tensor

    def __init__(
        self, *, config: TransformerConfig, pg_collection: ProcessGroupCollection, model: ModelConfig, **unused: Any
    ) -> None:
        super().__init__(config=config)
        assert model.num_moe_experts is not None
        self.model, self.num_experts = model, model.num_moe_experts
        self.layer_number: int | None = None
        self.tp_cp_group, self.stage_group = pg_collection.tp_cp, pg_collection.tp_dp_cp
        self.grid = TokenGrid(
            self.tp_cp_group,
            tp_size=pg_collection.tp.size() if config.sequence_parallel else 1,
            cp_size=pg_collection.cp.size(),
        )
        self.weight = self._gate()
        self.bias = self._parameter(self.num_experts) if model.moe_router_linear_bias else None
        if isinstance(model.moe_router_noise, LearnedNoise):
            self.noise_weight = self._gate()
        self.register_buffer(
            "expert_bias", torch.zeros(self.num_experts) if model.moe_router_enable_expert_bias else None
        )
        # Plain attributes, not buffers: they belong to the training, not to the model, and converting the model's
        # dtype must not round them.
        adapts = model.moe_adaptive_aux_loss is not None
        self.aux_loss_coeff = {
            kind: torch.tensor(weight) for kind, weight in model.balance_losses.items() if weight > 0 or adapts
        }
        self.capacity = None
        if model.moe_expert_capacity_factor is not None:
            self.capacity = Capacity(model.moe_expert_capacity_factor, model.moe_token_drop_policy)
        self._adapts = adapts
        self._is_still = False
        self.counts = RouterCounts(self.num_experts)
        self.begin_step()

    def _gate(self) -> torch.nn.Parameter:
        return self._parameter(self.num_experts, self.config.hidden_size)

    def _parameter(self, *shape: int) -> torch.nn.Parameter:
        where = {"dtype": self.config.params_dtype, "device": torch.get_default_device()}
        weight = torch.nn.Parameter(torch.empty(*shape, **where))
        # Each rank of a TP group has its own tokens, so each has a part of the gradient.
        weight.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]
        return weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Convert or move the parameters; the expert bias moves but stays in fp32, or small steps would be lost."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None:
            self.expert_bias = bias.to(self.weight.device)
        return self

    def hold_still(self) -> None:
        """Draw no noise and leave the bias where it is: what is trained is compared with what it was.

        Before the model is wrapped: the weights of learned noise have no gradient then, for which its reduction would
        wait.
        """
        self._is_still = True
        if isinstance(self.model.moe_router_noise, LearnedNoise):
            self.noise_weight.requires_grad_(False)

    def set_layer_number(self, layer_number: int) -> None:
        """Tell the router which layer it is in, counted from 1 over the whole model."""
        self.layer_number = layer_number

    def forward(self, hidden_SBH: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route each token.

        Returns:
            Weights [T, E] in fp32, zero where a token does not go, and which experts it goes to [T, E] (bool).
        """
        assert padding_mask is None, "samples are full: no padding reaches the router"
        length, batch = hidden_SBH.shape[:2]
        tokens_TH = hidden_SBH.reshape(-1, hidden_SBH.shape[-1])
        # Under full recompute the first pass runs without gradients; losses and counts belong to the second.
        learns = self.training and torch.is_grad_enabled()
        keys_T = self._noise_keys(length, hidden_SBH.device)
        raw_TE = self._gating(tokens_TH, keys_T)
        logits_TE = raw_TE
        if self.model.moe_gating_normalization is not None:
            logits_TE = normalize_gating_logits(raw_TE, self.model.moe_gating_normalization)
        noisy_TE = self._with_noise(logits_TE, tokens_TH, keys_T)
        scores_TE = scores_of(noisy_TE, self.model)
        experts_TK = choose(noisy_TE, scores_TE, self.model, self.expert_bias)
        weights_TK = weights_of(noisy_TE, scores_TE, experts_TK, self.model)
        weights_TE = torch.zeros_like(noisy_TE).scatter(1, experts_TK, weights_TK)
        chosen_TE = torch.zeros_like(noisy_TE, dtype=torch.bool).scatter_(1, experts_TK, True)
        kept_TE = self._within_capacity(weights_TE, chosen_TE, batch)
        if learns:
            self._count(chosen_TE, kept_TE, logits_TE)
            weights_TE = self._attach_losses(weights_TE, raw_TE, noisy_TE, scores_TE, chosen_TE, batch)
        return (weights_TE if kept_TE is chosen_TE else weights_TE * kept_TE), kept_TE

    def _noise_keys(self, length: int, device: torch.device) -> Tensor | None:
        """A key for the random numbers of each token [T]; None where nothing is drawn."""
        if self.model.moe_router_noise is None or self._is_still or not self.training:
            return None
        assert self.layer_number is not None
        positions = self.grid.positions(length, device)
        return noise.token_keys(sample_seeds.of_this_micro_batch(), positions, self.layer_number)

    def _gating(self, tokens_TH: Tensor, keys_T: Tensor | None) -> Tensor:
        """Raw logits [T, E] in fp32, of jittered tokens if so configured (the experts get them as they are)."""
        if keys_T is not None and isinstance(self.model.moe_router_noise, InputJitter):
            eps = self.model.moe_router_noise.eps
            factor = 1 + eps * (2 * noise.uniform(keys_T, tokens_TH.shape[-1]) - 1)
            tokens_TH = tokens_TH * factor.to(tokens_TH.dtype)
        logits: Tensor = _GatingLinear.apply(tokens_TH, self.weight)
        return logits if self.bias is None else logits + self.bias.float()

    def _with_noise(self, logits_TE: Tensor, tokens_TH: Tensor, keys_T: Tensor | None) -> Tensor:
        """The logits tokens are routed by in training."""
        kind = self.model.moe_router_noise
        if keys_T is not None and isinstance(kind, GumbelNoise):
            return logits_TE + kind.scale * noise.gumbel(keys_T, self.num_experts)
        if keys_T is not None and isinstance(kind, LearnedNoise):
            deviation_TE = F.softplus(_GatingLinear.apply(tokens_TH, self.noise_weight))
            return logits_TE + deviation_TE * noise.normal(keys_T, self.num_experts)
        return logits_TE

    @torch.no_grad()
    def _within_capacity(self, weights_TE: Tensor, chosen_TE: Tensor, batch: int) -> Tensor:
        """Which assignments stay; all in evaluation, as in the exported model.

        The capacity is that of the whole micro-batch: the ranks that share it decide together, so that a layout does
        not change which tokens are dropped.
        """
        if self.capacity is None or not self.training:
            return chosen_TE
        weights, chosen = (self.grid.gather(x, batch) for x in (weights_TE, chosen_TE))
        return self.grid.take(self.capacity.kept(weights, chosen, self.model.moe_router_topk), batch)

    def _attach_losses(
        self, weights_TE: Tensor, raw_TE: Tensor, logits_TE: Tensor, scores_TE: Tensor, chosen_TE: Tensor, batch: int
    ) -> Tensor:
        """`weights_TE`, whose backward pass also brings the gradients of all losses of this router.

        Each rank attaches its own part of a loss that is a mean over the micro-batch; megatron-core divides by the
        number of micro-batches and multiplies by CP, and gradients are summed over TP and averaged over DP x CP.
        """
        if self.model.moe_z_loss_coeff:
            value = balance.z_loss(raw_TE, self.grid.splits)
            self.counts.add_loss("z_loss", value)
            weights_TE = MoEAuxLossAutoScaler.apply(weights_TE, self.model.moe_z_loss_coeff * value)
        if not self.aux_loss_coeff:
            return weights_TE
        if self.expert_bias is not None:
            # The bias balances by itself; losses are of what the gate alone would choose (DeepSeek-V3, eq. 18).
            unbiased = choose(logits_TE, scores_TE, self.model, None)
            chosen_TE = torch.zeros_like(chosen_TE).scatter_(1, unbiased, True)
        probabilities_TE = probabilities_of(scores_TE, self.model)
        for kind, coefficient in self.aux_loss_coeff.items():
            value = self._balance_loss(kind, probabilities_TE, chosen_TE, batch)
            self.counts.add_loss(kind, value)
            weights_TE = MoEAuxLossAutoScaler.apply(weights_TE, coefficient * value)
        return weights_TE

    def _balance_loss(self, kind: str, probabilities_TE: Tensor, chosen_TE: Tensor, batch: int) -> Tensor:
        splits = self.grid.splits
        group = self.tp_cp_group if splits > 1 else None
        if kind == "seq_aux_loss":
            return balance.sequence_loss(chosen_TE, probabilities_TE, batch, splits, group)
        counts_E = chosen_TE.sum(dim=0)
        if kind == "aux_loss":
            return balance.micro_batch_loss(counts_E, probabilities_TE, splits, group)
        # Over the global batch (Qwen, arXiv 2501.11873, section 3): all data-parallel ranks, and the micro-batches
        # of this step that have been routed so far.
        self.global_counts_E = self.global_counts_E + balance.summed(counts_E, self.stage_group)
        return balance.micro_batch_loss(self.global_counts_E, probabilities_TE, splits, None)

    @torch.no_grad()
    def _count(self, chosen_TE: Tensor, kept_TE: Tensor, logits_TE: Tensor) -> None:
        load_E = chosen_TE.sum(dim=0)
        dropped = load_E.sum() - kept_TE.sum() if kept_TE is not chosen_TE else load_E.new_zeros(())
        self.counts.add(load_E, dropped, probabilities_of(scores_of(logits_TE, self.model), self.model))
        if self.follows_load:
            self.step_counts = self.step_counts + torch.cat((load_E, dropped[None]))

    @property
    def follows_load(self) -> bool:
        """Whether something here moves with the loads; the expert bias stays where the router is not trained."""
        return self._moves_bias or self._adapts

    @property
    def _moves_bias(self) -> bool:
        return self.model.moe_router_enable_expert_bias and self.weight.requires_grad and not self._is_still

    def begin_step(self) -> None:
        """Forget what has been counted towards the step that is beginning."""
        device = self.weight.device
        self.step_counts = torch.zeros(self.num_experts + 1, device=device)
        self.global_counts_E = torch.zeros(self.num_experts, device=device)

    @torch.no_grad()
    def update_from_load(self, counts_E: Tensor, dropped: Tensor) -> None:
        """Move the expert bias and the adaptive coefficient by the loads of a whole step."""
        if self.expert_bias is not None and self._moves_bias:
            self.expert_bias.copy_(
                balance.moved_bias(self.expert_bias, counts_E, self.model.moe_router_bias_update_rate)
            )
        if (adaptive := self.model.moe_adaptive_aux_loss) is not None:
            for coefficient in self.aux_loss_coeff.values():
                factor = self.model.moe_expert_capacity_factor
                coefficient.copy_(balance.adapted_coefficient(coefficient, counts_E, dropped, adaptive, factor))


def require_directions(routers: Sequence[Router]) -> None:
    """Refuse normalized routers that have nothing to normalize.

    Raises:
        CheckpointError: all experts of a router have the same weights (as when it is all zeros). Every token's logits
            are then equal, their deviation is zero, and the gradient is about 1 / eps times what it should be.
    """
    flat = [
        router.layer_number
        for router in routers
        if router.model.moe_gating_normalization is not None and bool((router.weight == router.weight[:1]).all())
    ]
    if flat:
        raise CheckpointError(
            f"the routers of layers {', '.join(map(str, flat))} (counted from 1) have the same weights for every "
            "expert: moe_gating_normalization divides by the deviation of their logits, which is 0. Start from routers "
            "drawn at random (tools/upcycle.py does), or unset model.moe_gating_normalization"
        )
