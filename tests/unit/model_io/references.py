"""Tiny models of transformers' own classes, with odd sizes and weights at which every feature shows."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model; none needs to be a power of two or a multiple of another but where its class says so."""

    layers: int = 3
    heads: int = 6
    groups: int = 3
    width: int = 8
    """Hidden size over heads."""
    head: int = 10
    """Width of a head where the class leaves it free; even."""
    ffn: int = 52
    vocabulary: int = 101
    experts: int = 6
    """A multiple of 3, for groups of experts."""
    chosen: int = 2
    expert: int = 22
    dense: int = 1
    """First layers without experts, where the class has that."""
    tied: bool = False

    @property
    def hidden(self) -> int:
        return self.heads * self.width


def _common(s: Sizes) -> dict[str, Any]:
    return {
        "vocab_size": s.vocabulary,
        "hidden_size": s.hidden,
        "intermediate_size": s.ffn,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.groups,
        "max_position_embeddings": 64,
        "tie_word_embeddings": s.tied,
    }


def _experts(s: Sizes) -> dict[str, Any]:
    return {
        "num_experts": s.experts,
        "num_experts_per_tok": s.chosen,
        "moe_intermediate_size": s.expert,
    }


def _latent(s: Sizes) -> dict[str, Any]:
    return {
        "num_key_value_heads": s.heads,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": s.width,
        "qk_rope_head_dim": s.head,
        "v_head_dim": s.width + 3,
        "rms_norm_eps": 1e-6,
        "n_routed_experts": s.experts,
        "num_experts_per_tok": s.chosen,
        "moe_intermediate_size": s.expert,
        "n_shared_experts": 2,
        "first_k_dense_replace": s.dense,
        "n_group": 3,
        "topk_group": 2,
    }


YARN = {
    "rope_type": "yarn",
    "rope_theta": 20000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 12,
    "mscale": 0.707,
    "mscale_all_dim": 0.9,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 12,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def _build(name: str, head: str = "ForCausalLM") -> Callable[..., Any]:
    def build(fields: Mapping[str, Any], **changes: Any) -> Any:
        config = getattr(transformers, f"{name}Config")(**{**fields, **changes}, attn_implementation="eager")
        config._experts_implementation = "eager"  # the others want widths that are multiples of 16 bytes
        return getattr(transformers, f"{name}{head}")(config)

    return build


def windows(*which: int, layers: int) -> dict[str, Any]:
    """Windows in some layers, as those classes of Qwen say it whose other layers have none."""
    types = ["sliding_attention" if layer in which else "full_attention" for layer in range(layers)]
    return {"use_sliding_window": True, "sliding_window": 7, "layer_types": types, "max_window_layers": min(which)}


def llama(s: Sizes, **changes: Any) -> Any:
    return _build("Llama")(_common(s), **({"head_dim": s.head, "rms_norm_eps": 1e-5} | changes))


def llama_with_biases(s: Sizes) -> Any:
    return llama(s, attention_bias=True, mlp_bias=True, hidden_act="gelu_pytorch_tanh", rope_parameters=LLAMA3)


def mistral(s: Sizes, **changes: Any) -> Any:
    return _build("Mistral")(_common(s), **({"head_dim": s.head, "sliding_window": 5} | changes))


def qwen2(s: Sizes, **changes: Any) -> Any:
    window = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": s.layers // 2}
    rope = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    return _build("Qwen2")(_common(s), **(rope | window | changes))


def qwen3(s: Sizes) -> Any:
    return _build("Qwen3")(_common(s), head_dim=s.head)


def gpt2(s: Sizes, **changes: Any) -> Any:
    fields = {
        "vocab_size": s.vocabulary,
        "n_embd": s.hidden,
        "n_layer": s.layers,
        "n_head": s.heads,
        "n_positions": 64,
        "n_inner": s.ffn,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return _build("GPT2", "LMHeadModel")(fields, **changes)


def gpt_neox(s: Sizes) -> Any:
    rope = {"rope_type": "default", "rope_theta": 20000.0, "partial_rotary_factor": 0.5}
    fields = {name: value for name, value in _common(s).items() if name != "num_key_value_heads"}
    return _build("GPTNeoX")(fields, use_parallel_residual=False, rope_parameters=rope, layer_norm_eps=1e-5)


def mixtral(s: Sizes, **changes: Any) -> Any:
    fields = {"head_dim": s.head, "num_local_experts": s.experts, "num_experts_per_tok": s.chosen}
    return _build("Mixtral")(_common(s), **(fields | changes))


def qwen2_moe(s: Sizes, **changes: Any) -> Any:
    fields = {"shared_expert_intermediate_size": 2 * s.expert + 1}
    if "mlp_only_layers" not in changes:
        fields |= {"decoder_sparse_step": 2}
    return _build("Qwen2Moe")(_common(s) | _experts(s), **(fields | changes))


def qwen3_moe(s: Sizes) -> Any:
    dense = list(range(s.dense))
    fields = {"mlp_only_layers": dense, "norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 6}
    return _build("Qwen3Moe")(_common(s) | _experts(s), head_dim=s.head, **fields)


def olmoe(s: Sizes) -> Any:
    return _build("Olmoe")(_common(s), num_experts=s.experts, num_experts_per_tok=s.chosen)


def gpt_oss(s: Sizes, **changes: Any) -> Any:
    """A limit that numbers exceed, a window shorter than the text, and YaRN from dimension 0.8 to 2.9, not rounded."""
    fields = {"head_dim": s.head, "num_local_experts": s.experts, "num_experts_per_tok": s.chosen}
    fields |= {"intermediate_size": s.expert, "sliding_window": 7, "swiglu_limit": 0.4}
    rope = {"rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "original_max_position_embeddings": 12}
    rope |= {"beta_fast": 1.0, "beta_slow": 0.2, "truncate": False}
    return _build("GptOss")(_common(s), **(fields | {"rope_parameters": rope} | changes))


def deepseek_v2(s: Sizes, **changes: Any) -> Any:
    fields = {"topk_method": "group_limited_greedy", "q_lora_rank": 20, "routed_scaling_factor": 1.5}
    return _build("DeepseekV2")(_common(s) | _latent(s), **(fields | {"rope_parameters": YARN} | changes))


def deepseek_v3(s: Sizes, **changes: Any) -> Any:
    return _build("DeepseekV3")(_common(s) | _latent(s), **({"q_lora_rank": 20, "num_mtp_layers": 0} | changes))


def deepseek_v1(s: Sizes) -> Any:
    """Llama's attention with transformers' DeepSeek-V2 experts, which are those of the first version if unscaled."""
    network = _build("Llama")(_common(s), rms_norm_eps=1e-6)
    fields = _latent(s) | {"topk_method": "greedy", "routed_scaling_factor": 1.0, "hidden_size": s.hidden}
    experts = transformers.DeepseekV2Config(num_attention_heads=s.heads, **(fields | {"q_lora_rank": None}))
    for layer in network.model.layers[s.dense :]:
        layer.mlp = DeepseekV2Moe(experts)
    return network


class _TanukiGate(MixtralTopKRouter):
    """Mixtral's gate over standardised logits."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        logits = (logits - logits.mean(-1, keepdim=True)) / (logits.std(-1, keepdim=True) + 1e-5)
        weights, indices = logits.float().softmax(-1).topk(self.top_k, dim=-1)
        return logits, weights / weights.sum(-1, keepdim=True), indices


def tanuki(s: Sizes) -> Any:
    network = mixtral(s)
    for layer in network.model.layers:
        layer.mlp.gate = _TanukiGate(network.config)
    return network


REFERENCES: dict[str, Callable[[Sizes], Any]] = {
    "LlamaForCausalLM": llama_with_biases,
    "MistralForCausalLM": mistral,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "GPT2LMHeadModel": gpt2,
    "GPTNeoXForCausalLM": gpt_neox,
    "MixtralForCausalLM": mixtral,
    "Qwen2MoeForCausalLM": qwen2_moe,
    "Qwen3MoeForCausalLM": qwen3_moe,
    "OlmoeForCausalLM": olmoe,
    "GptOssForCausalLM": gpt_oss,
    "DeepseekV2ForCausalLM": deepseek_v2,
    "DeepseekV3ForCausalLM": deepseek_v3,
    "DeepseekForCausalLM": deepseek_v1,
    "TanukiForCausalLM": tanuki,
}
"""A model of every class; the last two are made of transformers' parts, for their own code is in no package."""


@torch.no_grad()
def randomize(network: torch.nn.Module, *, spread: float = 0.12) -> None:
    """Weights at which every feature shows: no bias is 0, no norm is 1."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in network.state_dict(keep_vars=True).items():
        if tensor.dim() == 1:
            offset = 0.0 if name.endswith("bias") else 1.0
            tensor.copy_(offset + 0.3 * torch.randn(tensor.shape, generator=generator))
        else:
            tensor.copy_(spread * torch.randn(tensor.shape, generator=generator))


def raw_config(network: Any, hf_class: str, s: Sizes) -> dict[str, Any]:
    """The config.json of `network`, as its class would have it if transformers does not have the class."""
    config: dict[str, Any] = network.config.to_diff_dict()
    if hf_class == "TanukiForCausalLM":
        config |= {"architectures": [hf_class], "model_type": "Tanuki"}
    if hf_class == "DeepseekForCausalLM":
        fields = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts")
        config |= {name: _latent(s)[name] for name in (*fields, "first_k_dense_replace")}
        config |= {"architectures": [hf_class], "model_type": "deepseek", "norm_topk_prob": False}
        del config["head_dim"], config["mlp_bias"]
    return config


def save(network: Any, directory: Path, hf_class: str, s: Sizes) -> None:
    """Save as transformers does, and models whose class it does not have under the names that those have."""
    network.save_pretrained(directory)
    if hf_class == "DeepseekForCausalLM":
        tensors = per_expert(network.state_dict())
        if s.tied:  # written once, as transformers does
            del tensors["lm_head.weight"]
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    if hf_class in ("DeepseekForCausalLM", "TanukiForCausalLM"):
        config = raw_config(network, hf_class, s) | {"dtype": "float32"}
        (directory / "config.json").write_text(json.dumps(config))


def per_expert(tensors: Tensors) -> Tensors:
    """Experts one by one, as the older code of DeepSeek and Qwen has them."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(".experts.gate_up_proj"):
            for expert, fused in enumerate(tensor):
                stem = f"{name.removesuffix('gate_up_proj')}{expert}"
                gate, up = fused.chunk(2)
                result |= {f"{stem}.gate_proj.weight": gate.clone(), f"{stem}.up_proj.weight": up.clone()}
        elif name.endswith(".experts.down_proj"):
            for expert, down in enumerate(tensor):
                result[f"{name.removesuffix('down_proj')}{expert}.down_proj.weight"] = down.clone()
        else:
            result[name] = tensor.clone()
    return result
