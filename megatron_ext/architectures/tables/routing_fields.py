"""Config rules of experts: which layers have them, how wide they are, and how tokens are routed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_ext.architectures.tables.fields import ConfigRule, require_list, said
from megatron_ext.config import ModelConfig
from megatron_ext.errors import ConversionError

_PATTERN = ("moe_layer_freq", "moe_first_k_dense")


def _pattern_as_text(model: ModelConfig) -> str:
    return f"MoE layers {''.join(str(int(moe)) for moe in model.moe_layer_pattern)}"


@dataclass(frozen=True)
class EveryLayerMoe(ConfigRule):
    """Every layer has experts."""

    def hf_names(self) -> tuple[str, ...]:
        return ()

    def megatron_names(self) -> tuple[str, ...]:
        return _PATTERN

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        return {}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def unsupported_fields(self, model: ModelConfig) -> list[str]:
        return [_pattern_as_text(model)] if not all(model.moe_layer_pattern) else []


@dataclass(frozen=True)
class SparseStep(ConfigRule):
    """Qwen's pattern: every `decoder_sparse_step`-th layer from the step on has experts, `mlp_only_layers` never."""

    def hf_names(self) -> tuple[str, ...]:
        return ("decoder_sparse_step", "mlp_only_layers")

    def megatron_names(self) -> tuple[str, ...]:
        return _PATTERN

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        pattern = model.moe_layer_pattern
        for step in range(1, len(pattern) + 1):
            if pattern == [(layer + 1) % step == 0 for layer in range(len(pattern))]:
                return {"decoder_sparse_step": step, "mlp_only_layers": []}
        return {"decoder_sparse_step": 1, "mlp_only_layers": [layer for layer, moe in enumerate(pattern) if not moe]}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        step, dense = raw.get("decoder_sparse_step") or 1, raw.get("mlp_only_layers") or []
        layers = raw.get("num_hidden_layers")
        if isinstance(step, bool) or not isinstance(step, int):
            raise ConversionError(f"{said('decoder_sparse_step', step)}: expected a whole number of layers")
        require_list("mlp_only_layers", dense, "of numbers of layers")
        if not isinstance(layers, int) or (step == 1 and not dense):
            return {}
        return {"moe_layer_freq": [int(layer not in dense and (layer + 1) % step == 0) for layer in range(layers)]}


@dataclass(frozen=True)
class FirstDense(ConfigRule):
    """DeepSeek's pattern: the first layers are dense, and after them every layer, or every n-th one, has experts."""

    default: int
    every: bool = True
    """Whether the class knows no other than every layer; the field is then in some files, but must be 1."""

    def hf_names(self) -> tuple[str, ...]:
        return ("first_k_dense_replace", "moe_layer_freq")

    def megatron_names(self) -> tuple[str, ...]:
        return _PATTERN

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        first, frequency = self._said(model) or (0, 1)
        return {"first_k_dense_replace": first, "moe_layer_freq": frequency}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        frequency = raw.get("moe_layer_freq") or 1
        if self.every and frequency != 1:
            raise ConversionError(f"moe_layer_freq = {frequency!r}: transformers' class does not know the field")
        first = raw.get("first_k_dense_replace")
        return {"moe_first_k_dense": self.default if first is None else first, "moe_layer_freq": frequency}

    def unsupported_fields(self, model: ModelConfig) -> list[str]:
        return [] if self._said(model) else [_pattern_as_text(model)]

    def _said(self, model: ModelConfig) -> tuple[int, int] | None:
        pattern = model.moe_layer_pattern
        for frequency in range(1, 2 if self.every else len(pattern) + 1):
            for first in range(len(pattern)):
                if pattern == [layer >= first and layer % frequency == 0 for layer in range(len(pattern))]:
                    return first, frequency
        return None


@dataclass(frozen=True)
class ExpertWidth(ConfigRule):
    """The intermediate width of an expert under the name that dense models have for theirs."""

    hf: str

    def hf_names(self) -> tuple[str, ...]:
        return (self.hf,)

    def megatron_names(self) -> tuple[str, ...]:
        return ("ffn_hidden_size", "moe_ffn_hidden_size")

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        return {self.hf: model.expert_ffn_hidden_size}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        return {"ffn_hidden_size": raw[self.hf]} if raw.get(self.hf) is not None else {}


@dataclass(frozen=True)
class SharedCount(ConfigRule):
    """Shared experts as a number of experts of the routed ones' width, computed as one."""

    default: int | None
    """What absent means; None: there may be none."""
    hf: str = "n_shared_experts"
    width: str = "moe_intermediate_size"

    def hf_names(self) -> tuple[str, ...]:
        return (self.hf,)

    def megatron_names(self) -> tuple[str, ...]:
        return ("moe_shared_expert_intermediate_size",)

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        shared = model.moe_shared_expert_intermediate_size
        return {self.hf: None if shared is None else shared // model.expert_ffn_hidden_size}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        count, width = raw.get(self.hf, self.default), raw.get(self.width)
        if count is None and self.default is None:
            return {}
        if not isinstance(count, int) or not isinstance(width, int) or count < 1:
            raise ConversionError(f"{self.hf} = {count!r}, {self.width} = {width!r}: expected numbers above 0")
        return {"moe_shared_expert_intermediate_size": count * width}

    def unsupported_fields(self, model: ModelConfig) -> list[str]:
        shared = model.moe_shared_expert_intermediate_size
        fits = self.default is None if shared is None else shared % model.expert_ffn_hidden_size == 0
        return [] if fits else [f"moe_shared_expert_intermediate_size = {shared}"]


_SCORES = ("moe_router_pre_softmax", "moe_router_norm_topk_prob")


def _sums_to_one(model: ModelConfig) -> bool:
    """Whether the weights of a token's experts, before the scaling factor, sum to 1."""
    return not model.moe_router_pre_softmax or bool(model.moe_router_norm_topk_prob)


@dataclass(frozen=True)
class SumsToOne(ConfigRule):
    """Softmax weights of the selected experts that sum to 1, in every model of the class."""

    def hf_names(self) -> tuple[str, ...]:
        return ()

    def megatron_names(self) -> tuple[str, ...]:
        return _SCORES

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        return {}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def unsupported_fields(self, model: ModelConfig) -> list[str]:
        return [] if _sums_to_one(model) else ["moe_router_pre_softmax = True"]


@dataclass(frozen=True)
class NormalizedTopK(ConfigRule):
    """A flag for whether the selected experts' softmax probabilities are divided by their sum."""

    settable: bool = True
    """False: transformers' class ignores the flag and does not divide, so that it must not be set."""
    hf: str = "norm_topk_prob"

    def hf_names(self) -> tuple[str, ...]:
        return (self.hf,)

    def megatron_names(self) -> tuple[str, ...]:
        return _SCORES

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        return {self.hf: _sums_to_one(model)}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        if not raw.get(self.hf):
            return {"moe_router_pre_softmax": True}
        if not self.settable:
            raise ConversionError(f"{self.hf} = True: transformers' class does not divide by the sum, others may")
        return {"moe_router_pre_softmax": True, "moe_router_norm_topk_prob": True}

    def unsupported_fields(self, model: ModelConfig) -> list[str]:
        if self.settable or not _sums_to_one(model):
            return []
        return [
            f"moe_router_pre_softmax = {model.moe_router_pre_softmax}"
            if not model.moe_router_pre_softmax
            else "moe_router_norm_topk_prob = True"
        ]


@dataclass(frozen=True)
class SigmoidScores(ConfigRule):
    """DeepSeek-V3's scores: sigmoids, divided by the sum of the selected ones if the flag says so."""

    hf: str = "norm_topk_prob"

    def hf_names(self) -> tuple[str, ...]:
        return (self.hf, "scoring_func")

    def megatron_names(self) -> tuple[str, ...]:
        return ("moe_router_score_function", "moe_router_norm_topk_prob")

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        return {self.hf: model.normalizes_topk, "scoring_func": "sigmoid"}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        if (stated := raw.get("scoring_func", "sigmoid")) != "sigmoid":
            raise ConversionError(f"scoring_func = {stated!r}: transformers' class computes sigmoids")
        return {"moe_router_score_function": "sigmoid", "moe_router_norm_topk_prob": bool(raw.get(self.hf, True))}

    def unsupported_fields(self, model: ModelConfig) -> list[str]:
        score = model.moe_router_score_function
        return [] if score == "sigmoid" else [f"moe_router_score_function = {score!r}"]


@dataclass(frozen=True)
class Scaling(ConfigRule):
    """A factor on the weights of the selected experts; 1 is none."""

    default: float
    hf: str = "routed_scaling_factor"

    def hf_names(self) -> tuple[str, ...]:
        return (self.hf,)

    def megatron_names(self) -> tuple[str, ...]:
        return ("moe_router_topk_scaling_factor",)

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        return {self.hf: model.moe_router_topk_scaling_factor or 1.0}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        stated = raw.get(self.hf)
        factor = self.default if stated is None else stated
        return {} if factor == 1 else {"moe_router_topk_scaling_factor": factor}


@dataclass(frozen=True)
class GroupLimited(ConfigRule):
    """Routing to the best groups of experts only; one group is no limit.

    DeepSeek-V2 selects groups by their best expert, and only if `topk_method` says so; V3 always, by their best two.
    """

    score: Literal["max", "top2_sum"]
    method: str
    """The `topk_method` of the limit; V3's files name it, and its class knows no other."""
    default: tuple[int, int] | None = None
    """Groups and selected groups that absent fields mean; None: there is no limit."""

    def hf_names(self) -> tuple[str, ...]:
        return ("topk_method", "n_group", "topk_group")

    def megatron_names(self) -> tuple[str, ...]:
        return ("moe_router_num_groups", "moe_router_group_topk", "moe_router_group_score")

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        limited = model.moe_router_num_groups is not None or self.default is not None
        groups = {"n_group": model.moe_router_num_groups or 1, "topk_group": model.moe_router_group_topk or 1}
        return {"topk_method": self.method if limited else "greedy", **groups}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        unlimited = "greedy" if self.default is None else self.method
        stated = raw.get("topk_method") or unlimited
        if stated not in (unlimited, self.method):
            raise ConversionError(f"topk_method = {stated!r}: transformers' class has {unlimited} and {self.method}")
        if stated != self.method:
            return {}
        default = self.default or (None, None)
        groups, chosen = raw.get("n_group", default[0]), raw.get("topk_group", default[1])
        if groups == 1:
            return {}
        fields = {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}
        return fields | {"moe_router_group_score": self.score}

    def unsupported_fields(self, model: ModelConfig) -> list[str]:
        if model.moe_router_num_groups is None or model.moe_router_group_score == self.score:
            return []
        return [f"moe_router_group_score = {model.moe_router_group_score!r}"]


@dataclass(frozen=True)
class DeepSeekBalance(ConfigRule):
    """The balance loss that DeepSeek's own modelling code takes of each layer's softmax, over a sequence or a batch.

    It is `E * sum_i f_i P_i` there too (`MoEGate` of the models' repositories). Transformers' classes take none, so
    that an absent weight is none.
    """

    def hf_names(self) -> tuple[str, ...]:
        return ("aux_loss_alpha", "seq_aux")

    def megatron_names(self) -> tuple[str, ...]:
        return ("moe_router_load_balancing_type", "moe_aux_loss_coeff")

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        losses = model.balance_losses
        if model.moe_adaptive_aux_loss is not None or len(losses) != 1 or "global_aux_loss" in losses:
            return {"aux_loss_alpha": 0.0}  # DeepSeek's code takes an absent one for 0.001
        ((kind, weight),) = losses.items()
        return {"aux_loss_alpha": weight, "seq_aux": kind == "seq_aux_loss"}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        if not (weight := raw.get("aux_loss_alpha")):
            return {}
        kind = "seq_aux_loss" if raw.get("seq_aux", True) else "aux_loss"
        return {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": weight}
