"""What others take of an export: accelerate and llama.cpp's table of names themselves, vLLM's loaders as facts."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_WEIGHT, _BOTH = r"\.weight", r"\.(weight|bias)"
_LLAMA_TRUNK = (
    r"(model\.embed_tokens|model\.norm|lm_head)" + _WEIGHT,
    r"model\.layers\.\d+\.(input_layernorm|post_attention_layernorm)" + _WEIGHT,
)
_ATTENTION = r"model\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)"
_NORMS_OF_HEADS = r"model\.layers\.\d+\.self_attn\.(q_norm|k_norm)" + _WEIGHT
_NETWORK = r"model\.layers\.\d+\.mlp\.(gate_proj|up_proj|down_proj)"
_EXPERTS = r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate_proj|up_proj|down_proj)" + _WEIGHT
_ROUTER = r"model\.layers\.\d+\.mlp\.gate" + _WEIGHT
_LATENT = (
    r"model\.layers\.\d+\.self_attn\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj"
    r"|q_a_layernorm|kv_a_layernorm)" + _WEIGHT
)
_DEEPSEEK = (
    *_LLAMA_TRUNK,
    _LATENT,
    _NETWORK + _WEIGHT,
    _EXPERTS,
    _ROUTER,
    r"model\.layers\.\d+\.mlp\.gate\.e_score_correction_bias",
    r"model\.layers\.\d+\.mlp\.shared_experts\.(gate_proj|up_proj|down_proj)" + _WEIGHT,
)
VLLM: dict[str, tuple[str, ...]] = {
    "LlamaForCausalLM": (*_LLAMA_TRUNK, _ATTENTION + _BOTH, _NETWORK + _BOTH),
    "MistralForCausalLM": (*_LLAMA_TRUNK, _ATTENTION + _BOTH, _NETWORK + _BOTH),
    "Qwen2ForCausalLM": (*_LLAMA_TRUNK, _ATTENTION + _BOTH, _NETWORK + _WEIGHT),
    "Qwen3ForCausalLM": (*_LLAMA_TRUNK, _ATTENTION + _BOTH, _NORMS_OF_HEADS, _NETWORK + _WEIGHT),
    "GPT2LMHeadModel": (
        r"transformer\.(wte|wpe)\.weight",
        r"transformer\.ln_f" + _BOTH,
        r"transformer\.h\.\d+\.(ln_1|ln_2|attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)" + _BOTH,
    ),
    "GPTNeoXForCausalLM": (
        r"(gpt_neox\.embed_in|embed_out)\.weight",
        r"gpt_neox\.final_layer_norm" + _BOTH,
        r"gpt_neox\.layers\.\d+\.(input_layernorm|post_attention_layernorm|attention\.query_key_value|attention\.dense"
        r"|mlp\.dense_h_to_4h|mlp\.dense_4h_to_h)" + _BOTH,
    ),
    "MixtralForCausalLM": (
        *_LLAMA_TRUNK,
        _ATTENTION + _WEIGHT,
        r"model\.layers\.\d+\.block_sparse_moe\.gate" + _WEIGHT,
        r"model\.layers\.\d+\.block_sparse_moe\.experts\.\d+\.(w1|w2|w3)" + _WEIGHT,
    ),
    "Qwen2MoeForCausalLM": (
        *_LLAMA_TRUNK,
        _ATTENTION + _BOTH,
        _NETWORK + _WEIGHT,
        _EXPERTS,
        _ROUTER,
        r"model\.layers\.\d+\.mlp\.shared_expert\.(gate_proj|up_proj|down_proj)" + _WEIGHT,
        r"model\.layers\.\d+\.mlp\.shared_expert_gate" + _WEIGHT,
    ),
    "Qwen3MoeForCausalLM": (
        *_LLAMA_TRUNK,
        _ATTENTION + _BOTH,
        _NORMS_OF_HEADS,
        _NETWORK + _WEIGHT,
        _EXPERTS,
        _ROUTER,
    ),
    "OlmoeForCausalLM": (*_LLAMA_TRUNK, _ATTENTION + _WEIGHT, _NORMS_OF_HEADS, _EXPERTS, _ROUTER),
    "GptOssForCausalLM": (
        *_LLAMA_TRUNK,
        _ATTENTION + _BOTH,
        r"model\.layers\.\d+\.self_attn\.sinks",
        r"model\.layers\.\d+\.mlp\.router" + _BOTH,
        r"model\.layers\.\d+\.mlp\.experts\.(gate_up_proj|down_proj)(_bias)?",
    ),
    "DeepseekV2ForCausalLM": _DEEPSEEK,
    "DeepseekV3ForCausalLM": _DEEPSEEK,
    "DeepseekForCausalLM": (*_DEEPSEEK, _ATTENTION + _WEIGHT),
}
"""Names that vLLM's loader of each class puts somewhere: the parameters of its models/{llama,qwen2,qwen3,gpt2,gpt_neox,
mixtral,qwen2_moe,qwen3_moe,olmoe,gpt_oss,deepseek_v2}.py, with `stacked_params_mapping` and the experts of their
`load_weights` undone. The classes are those of its registry (models/registry.py, commit 0002bff)."""

LLAMA_CPP = {
    "LlamaForCausalLM": "LLAMA",
    "MistralForCausalLM": "LLAMA",
    "Qwen2ForCausalLM": "QWEN2",
    "Qwen3ForCausalLM": "QWEN3",
    "GPT2LMHeadModel": "GPT2",
    "GPTNeoXForCausalLM": "GPTNEOX",
    "MixtralForCausalLM": "LLAMA",
    "Qwen2MoeForCausalLM": "QWEN2MOE",
    "Qwen3MoeForCausalLM": "QWEN3MOE",
    "OlmoeForCausalLM": "OLMOE",
    "GptOssForCausalLM": "GPT_OSS",
    "DeepseekV2ForCausalLM": "DEEPSEEK2",
    "DeepseekV3ForCausalLM": "DEEPSEEK2",
    "DeepseekForCausalLM": "DEEPSEEK",
}
"""The architecture of gguf that llama.cpp's converter takes for each class."""
BY_ACCELERATE_ALONE = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GPT2LMHeadModel",
    "GptOssForCausalLM",
)
"""Classes whose files have the names that transformers 5 has in memory. It renames and stacks those of the others as it
reads them, which accelerate's own loader does not do; `from_pretrained` with a device map does."""
NO_DENSE_LAYERS = ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM")
"""Classes of which llama.cpp knows only models whose every layer has experts."""


def unknown_to_vllm(hf_class: str, names: Iterable[str]) -> list[str]:
    """Those of `names` for which vLLM's loader has no place."""
    accepted = re.compile("|".join(f"(?:{pattern})" for pattern in VLLM[hf_class]))
    return [name for name in names if not accepted.fullmatch(name)]


def unknown_to_llama_cpp(hf_class: str, names: Iterable[str], layers: int) -> list[str]:
    """Those of `names` that llama.cpp's converter has no name for, by its own table."""
    import gguf

    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, LLAMA_CPP[hf_class]), layers)
    return [name for name in names if table.get_name(_of_converter(name), try_suffixes=(".weight", ".bias")) is None]


def _of_converter(name: str) -> str:
    """What convert_hf_to_gguf.py calls a tensor before it asks the table: the experts of a layer are one tensor."""
    mixtral = re.fullmatch(r"model\.(layers\.\d+)\.block_sparse_moe\.experts\.\d+\.(w\d)\.weight", name)
    if mixtral:
        return f"{mixtral[1]}.feed_forward.experts.{mixtral[2]}.weight"
    name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    if gpt_oss := re.fullmatch(r"(.*\.experts\.)(?:gate_up|down)(_proj)(_bias)?", name):  # it splits gate from up
        projection = "down" if "down" in name else "gate"
        return f"{gpt_oss[1]}{projection}_proj.{'bias' if gpt_oss[3] else 'weight'}"
    return re.sub(r"\.experts\.\d+\.", ".experts.", name)


def dispatched_by_accelerate(directory: Path, network: Any) -> Any:
    """An empty model of `network`'s class that accelerate fills with the weights in `directory`."""
    import accelerate
    from transformers import AutoConfig

    with accelerate.init_empty_weights():
        empty = type(network)(AutoConfig.from_pretrained(directory))
    empty.tie_weights()
    return accelerate.load_checkpoint_and_dispatch(empty, str(directory), device_map={"": "cpu"})
