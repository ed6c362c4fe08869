"""Published configurations, made small, with weights: our logits against transformers', one model for each feature."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from megatron_ext.architectures.registry import architecture_of
from megatron_ext.config import Fp32Precision, ParallelConfig, RuntimeConfig
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.runtime.seeds import seed_everything
from megatron_ext.testing.pool import GlooPool
from tests.unit.mcore.our_network import canonical, our_network, relative
from tests.unit.model_io.references import randomize

FILE = Path(__file__).parents[1] / "architectures" / "real_configs.json"
MODELS = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": "use_mrope, a window that is off",
    "mistralai/Mistral-7B-v0.1": "a window in every layer",
    "HuggingFaceTB/SmolLM2-135M": "rope_interleaved, which nothing reads; tied",
    "unsloth/Llama-3.2-1B": "llama3 scaling, tied, heads of a stated width",
    "NousResearch/Yarn-Llama-2-7b-64k": "YaRN that was trained with",
    "Luna-dream-02": "linear scaling, under both names of the type",
    "decapoda-research/llama-7b-hf": "no length, no groups, the class's former name",
    "rinna/japanese-gpt-1b": "gelu_fast",
    "rinna/japanese-gpt-neox-3.6b": "GPT-NeoX's own names of rotary embedding",
    "Llama-3-ELYZA-hermes-2x8B": "Llama's fields in Mixtral",
    "Qwen/Qwen2-57B-A14B": "shared expert behind a gate",
    "AIDC-AI/Marco-Mini-Base": "tied experts model",
    "allenai/OLMoE-1B-7B-0924": "norms over the projection",
    "deepseek-ai/DeepSeek-V2": "groups by their best expert, YaRN with mscale",
    "DeepSeek-V3 in bf16": "groups by their two best",
    "moonshotai/Moonlight-16B-A3B": "norms of two epsilons",
}
SMALL = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head"), 4),
    **dict.fromkeys(("hidden_size", "n_embd"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner"), 96),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 40),
    **{"vocab_size": 101, "sliding_window": 20, "head_dim": 24, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    **{"n_group": 4, "topk_group": 2, "q_lora_rank": 20, "kv_lora_rank": 12, "v_head_dim": 12},
    **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 8},
}


def small(raw: dict[str, Any]) -> dict[str, Any]:
    """The same model with other sizes; what is null, 1 or absent stays so, and so does every choice."""
    changed = {name: value for name, value in SMALL.items() if isinstance(raw.get(name), int) and raw[name] > 1}
    if (groups := raw.get("num_key_value_heads")) is not None:
        changed["num_key_value_heads"] = 4 if groups == raw["num_attention_heads"] else 2
    result = copy.deepcopy(raw) | changed
    for nested in (result.get("rope_scaling"), result.get("rope_parameters")):
        if nested and "original_max_position_embeddings" in nested:
            nested["original_max_position_embeddings"] = 12
    return {name: value for name, value in result.items() if not name.endswith("_token_id") and name != "auto_map"}


def measure(names: list[str]) -> dict[str, float]:
    """Largest difference of fp32 logits from transformers', relative to the largest one, of each model."""
    split_process_group(ParallelConfig(), RuntimeConfig(device="cpu"))
    seed_everything(0)
    entries, distances = json.loads(FILE.read_text(encoding="utf-8")), {}
    tokens = torch.randint(0, 101, (2, 48), generator=torch.Generator().manual_seed(1))
    for name in names:
        raw = small(entries[name]["config"])
        architecture = architecture_of(raw, source=name)
        config = CONFIG_MAPPING[architecture.model_type].from_dict(copy.deepcopy(raw))
        config._experts_implementation = "eager"  # the others want widths that are multiples of 16 bytes
        network = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
        randomize(network)
        model = replace(architecture.model_of(raw, source=name), make_vocab_size_divisible_by=1)
        weights = canonical(dict(network.state_dict()), architecture, model)
        ours = our_network(model, Fp32Precision(kind="fp32"), weights).eval()
        with torch.no_grad():
            theirs = network(tokens).logits
            logits = ours(tokens, torch.arange(48).expand(2, -1), None).float()
        distances[name] = relative(logits, theirs)
    return distances


def test_logits_are_transformers(pool: GlooPool) -> None:
    (distances,) = pool.run(1, measure, list(MODELS))
    for name, distance in distances.items():
        print(f"{name} ({MODELS[name]}): {distance:.1e}")
    # fp32 rounds to 6e-8; two layers of sums of up to 96 terms leave 1e-6 or so.
    assert max(distances.values()) < 1e-5
