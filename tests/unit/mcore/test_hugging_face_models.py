"""Every architectural feature against transformers' own models: logits and gradients with the same weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.checkpoint.naming import storage_plan
from megatron_ext.checkpoint.shapes import model_shapes
from megatron_ext.config import (
    Bf16Precision,
    DynamicRopeScaling,
    Fp32Precision,
    LinearRopeScaling,
    Llama3RopeScaling,
    ModelConfig,
    MultiLatentAttention,
    ParallelConfig,
    Precision,
    RecomputeConfig,
    RuntimeConfig,
    YarnRopeScaling,
    check_model,
)
from megatron_ext.mcore.model import build_chunks
from megatron_ext.mcore.state import pieces_of
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.runtime.seeds import seed_everything
from megatron_ext.testing.pool import GlooPool

Tensors = dict[str, Tensor]
LAYERS, HIDDEN, HEADS, GROUPS, VOCABULARY, LENGTH = 2, 64, 4, 2, 101, 48

BASE: dict[str, Any] = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": 96,
    "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY,
    "make_vocab_size_divisible_by": 1,
    "max_position_embeddings": LENGTH,
}
HF: dict[str, Any] = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_attention_heads": HEADS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}


@dataclass(frozen=True)
class Case:
    """A transformers model, ours, and how the weights (and gradients) of one are named and laid out in the other."""

    hf: Callable[[], Any]
    model: ModelConfig
    weights: Callable[[Tensors, ModelConfig], Tensors]


def _qkv(q: Tensor, k: Tensor, v: Tensor, groups: int) -> Tensor:
    return torch.cat([x.unflatten(0, (groups, -1)) for x in (q, k, v)], dim=1).flatten(0, 1)


def _trunk(hf: Tensors) -> Tensors:
    return {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
        "output_layer.weight": hf["lm_head.weight"],
    }


def _norms(hf: Tensors, theirs: str, ours: str) -> Tensors:
    return {
        f"{ours}.input_layernorm.weight": hf[f"{theirs}.input_layernorm.weight"],
        f"{ours}.pre_mlp_layernorm.weight": hf[f"{theirs}.post_attention_layernorm.weight"],
    }


def llama_like(hf: Tensors, model: ModelConfig) -> Tensors:
    """Llama, Qwen2, Qwen3 and OLMoE: whatever of their tensors there is."""
    out = _trunk(hf)
    for n in range(LAYERS):
        theirs, ours = f"model.layers.{n}", f"decoder.layers.{n}"
        out |= _norms(hf, theirs, ours)
        for kind in ("weight", "bias"):
            if f"{theirs}.self_attn.q_proj.{kind}" in hf:
                parts = [hf[f"{theirs}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
                out[f"{ours}.self_attention.linear_qkv.{kind}"] = _qkv(*parts, model.query_groups)
            if f"{theirs}.self_attn.o_proj.{kind}" in hf:
                out[f"{ours}.self_attention.linear_proj.{kind}"] = hf[f"{theirs}.self_attn.o_proj.{kind}"]
            if f"{theirs}.mlp.gate_proj.{kind}" in hf:
                gate_up = [hf[f"{theirs}.mlp.{x}_proj.{kind}"] for x in ("gate", "up")]
                out[f"{ours}.mlp.linear_fc1.{kind}"] = torch.cat(gate_up)
                out[f"{ours}.mlp.linear_fc2.{kind}"] = hf[f"{theirs}.mlp.down_proj.{kind}"]
        for x in "qk":
            if f"{theirs}.self_attn.{x}_norm.weight" in hf:
                out[f"{ours}.self_attention.{x}_layernorm.weight"] = hf[f"{theirs}.self_attn.{x}_norm.weight"]
        if f"{theirs}.mlp.gate.weight" in hf:
            out[f"{ours}.mlp.router.weight"] = hf[f"{theirs}.mlp.gate.weight"]
            for e, fc1 in enumerate(hf[f"{theirs}.mlp.experts.gate_up_proj"]):
                out[f"{ours}.mlp.experts.{e}.linear_fc1.weight"] = fc1
                out[f"{ours}.mlp.experts.{e}.linear_fc2.weight"] = hf[f"{theirs}.mlp.experts.down_proj"][e]
    return out


def gpt2(hf: Tensors, model: ModelConfig) -> Tensors:
    out = {
        "embedding.word_embeddings.weight": hf["transformer.wte.weight"],
        "embedding.position_embeddings.weight": hf["transformer.wpe.weight"],
        "decoder.final_layernorm.weight": hf["transformer.ln_f.weight"],
        "decoder.final_layernorm.bias": hf["transformer.ln_f.bias"],
    }
    for n in range(LAYERS):
        theirs, ours = f"transformer.h.{n}", f"decoder.layers.{n}"
        for kind in ("weight", "bias"):
            out[f"{ours}.input_layernorm.{kind}"] = hf[f"{theirs}.ln_1.{kind}"]
            out[f"{ours}.pre_mlp_layernorm.{kind}"] = hf[f"{theirs}.ln_2.{kind}"]
            # Conv1D stores [in, out].
            q, k, v = hf[f"{theirs}.attn.c_attn.{kind}"].t().chunk(3)
            out[f"{ours}.self_attention.linear_qkv.{kind}"] = _qkv(q, k, v, HEADS)
            out[f"{ours}.self_attention.linear_proj.{kind}"] = hf[f"{theirs}.attn.c_proj.{kind}"].t()
            out[f"{ours}.mlp.linear_fc1.{kind}"] = hf[f"{theirs}.mlp.c_fc.{kind}"].t()
            out[f"{ours}.mlp.linear_fc2.{kind}"] = hf[f"{theirs}.mlp.c_proj.{kind}"].t()
    return out


def gpt_neox(hf: Tensors, model: ModelConfig) -> Tensors:
    out = {
        "embedding.word_embeddings.weight": hf["gpt_neox.embed_in.weight"],
        "output_layer.weight": hf["lm_head.weight"],
        "decoder.final_layernorm.weight": hf["gpt_neox.final_layer_norm.weight"],
        "decoder.final_layernorm.bias": hf["gpt_neox.final_layer_norm.bias"],
    }
    names = {
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "pre_mlp_layernorm",
        # Query, key and value of a head stand together: Megatron's layout where every head is a group.
        "attention.query_key_value": "self_attention.linear_qkv",
        "attention.dense": "self_attention.linear_proj",
        "mlp.dense_h_to_4h": "mlp.linear_fc1",
        "mlp.dense_4h_to_h": "mlp.linear_fc2",
    }
    for n in range(LAYERS):
        for theirs, ours in names.items():
            for kind in ("weight", "bias"):
                out[f"decoder.layers.{n}.{ours}.{kind}"] = hf[f"gpt_neox.layers.{n}.{theirs}.{kind}"]
    return out


def deepseek(hf: Tensors, model: ModelConfig) -> Tensors:
    """Every tensor of the latent attention is copied as it is."""
    out = _trunk(hf)
    names = {
        "q_proj": "linear_q_proj",
        "q_a_proj": "linear_q_down_proj",
        "q_a_layernorm": "q_layernorm",
        "q_b_proj": "linear_q_up_proj",
        "kv_a_proj_with_mqa": "linear_kv_down_proj",
        "kv_a_layernorm": "kv_layernorm",
        "kv_b_proj": "linear_kv_up_proj",
        "o_proj": "linear_proj",
    }
    for n in range(LAYERS):
        theirs, ours = f"model.layers.{n}", f"decoder.layers.{n}"
        out |= _norms(hf, theirs, ours)
        for name, megatron in names.items():
            if f"{theirs}.self_attn.{name}.weight" in hf:
                out[f"{ours}.self_attention.{megatron}.weight"] = hf[f"{theirs}.self_attn.{name}.weight"]
        gate_up = [hf[f"{theirs}.mlp.{x}_proj.weight"] for x in ("gate", "up")]
        out[f"{ours}.mlp.linear_fc1.weight"] = torch.cat(gate_up)
        out[f"{ours}.mlp.linear_fc2.weight"] = hf[f"{theirs}.mlp.down_proj.weight"]
    return out


def _hf(name: str, **changes: Any) -> Callable[[], Any]:
    """A transformers model by the name of its classes, built where it is needed."""

    def build() -> Any:
        import transformers

        config_class = getattr(transformers, f"{name}Config")
        heads = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
        return getattr(transformers, f"{name}{heads}")(config_class(**(HF | changes)))

    return build


def _llama(**changes: Any) -> Callable[[], Any]:
    return _hf("Llama", **({"num_key_value_heads": GROUPS, "rms_norm_eps": 1e-5} | changes))


def _scaled(name: str, scaling: Any, *, original: int = LENGTH, **rope: Any) -> Case:
    """Llama with a scaled rotary embedding; with `original` the model sees positions beyond that length."""
    parameters = {"rope_type": name, "rope_theta": 10000.0, "factor": scaling.factor, **rope}
    changes = {"num_query_groups": GROUPS, "rope_scaling": scaling, "max_position_embeddings": original}
    return Case(
        _llama(rope_parameters=parameters, max_position_embeddings=original),
        ModelConfig(**(BASE | changes)),
        llama_like,
    )


def _deepseek(version: str, latent: MultiLatentAttention, scaling: YarnRopeScaling | None = None) -> Case:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if scaling is not None:
        rope |= {"rope_type": "yarn", "factor": scaling.factor, "mscale": scaling.mscale}
        rope |= {"mscale_all_dim": scaling.mscale_all_dim}
        rope |= {"original_max_position_embeddings": scaling.original_max_position_embeddings}
    changes = {
        "num_key_value_heads": HEADS,
        "first_k_dense_replace": LAYERS,
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_nope_head_dim": latent.qk_head_dim,
        "qk_rope_head_dim": latent.qk_pos_emb_head_dim,
        "v_head_dim": latent.v_head_dim,
        "rope_parameters": rope,
        "rms_norm_eps": 1e-6,
    }
    # The norms of DeepSeek's latent vectors have this epsilon whatever the model's.
    model = ModelConfig(**BASE, multi_latent_attention=latent, layernorm_epsilon=1e-6, rope_scaling=scaling)
    return Case(_hf(f"Deepseek{version}", **changes), model, deepseek)


LATENT = MultiLatentAttention(kv_lora_rank=24, q_lora_rank=40, qk_head_dim=16, qk_pos_emb_head_dim=8, v_head_dim=12)
DIRECT = MultiLatentAttention(kv_lora_rank=24, qk_head_dim=16, qk_pos_emb_head_dim=8, v_head_dim=12)
LINEAR_BIASES = {"normalization": "LayerNorm", "gated_linear_unit": False, "add_bias_linear": True}
GPT2_FIELDS = {
    **BASE,
    **LINEAR_BIASES,
    "ffn_hidden_size": 256,
    "position_embedding_type": "learned_absolute",
    "activation_func": "gelu_tanh",
    "untie_embeddings_and_output_weights": False,
}


def _yarn(**changes: Any) -> YarnRopeScaling:
    return YarnRopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=12, **changes)


CASES = {
    "GPT-2": Case(
        _hf("GPT2", n_layer=LAYERS, n_embd=HIDDEN, n_head=HEADS, n_positions=LENGTH, tie_word_embeddings=True),
        ModelConfig(**GPT2_FIELDS),
        gpt2,
    ),
    "Qwen2": Case(
        _hf("Qwen2", num_key_value_heads=GROUPS, rms_norm_eps=1e-5),
        ModelConfig(**BASE, num_query_groups=GROUPS, add_qkv_bias=True),
        llama_like,
    ),
    "Qwen3": Case(
        _hf("Qwen3", num_key_value_heads=GROUPS, head_dim=24, rms_norm_eps=1e-5),
        ModelConfig(**BASE, num_query_groups=GROUPS, kv_channels=24, qk_layernorm="head"),
        llama_like,
    ),
    "OLMoE": Case(
        # All experts are selected: which ones, rounding to bf16 would decide otherwise for some tokens.
        _hf("Olmoe", num_key_value_heads=GROUPS, num_experts=4, num_experts_per_tok=4, rms_norm_eps=1e-5),
        ModelConfig(
            **BASE,
            num_query_groups=GROUPS,
            qk_layernorm="projection",
            num_moe_experts=4,
            moe_router_topk=4,
            moe_router_pre_softmax=True,
        ),
        llama_like,
    ),
    "GPT-NeoX": Case(
        _hf("GPTNeoX", use_parallel_residual=False, rotary_pct=0.25, hidden_act="gelu", layer_norm_eps=1e-5),
        ModelConfig(**BASE, **LINEAR_BIASES, activation_func="gelu", rotary_percent=0.25),
        gpt_neox,
    ),
    "Llama, GeGLU with biases": Case(
        _llama(hidden_act="gelu_pytorch_tanh", attention_bias=True, mlp_bias=True),
        ModelConfig(**BASE, num_query_groups=GROUPS, activation_func="gelu_tanh", add_bias_linear=True),
        llama_like,
    ),
    "Llama, linear": _scaled("linear", LinearRopeScaling(kind="linear", factor=4.0)),
    "Llama, dynamic": _scaled("dynamic", DynamicRopeScaling(kind="dynamic", factor=4.0), original=16),
    "Llama, dynamic within the original length": _scaled("dynamic", DynamicRopeScaling(kind="dynamic", factor=4.0)),
    "Llama, llama3": _scaled(
        "llama3",
        Llama3RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=12),
        original_max_position_embeddings=12,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    ),
    "Llama, yarn": _scaled("yarn", _yarn(), original_max_position_embeddings=12),
    "Llama, yarn with mscale": _scaled(
        "yarn",
        _yarn(mscale=1.0, mscale_all_dim=0.5, beta_fast=8.0, beta_slow=2.0),
        original_max_position_embeddings=12,
        mscale=1.0,
        mscale_all_dim=0.5,
        beta_fast=8.0,
        beta_slow=2.0,
    ),
    "DeepSeek-V2": _deepseek("V2", LATENT),
    "DeepSeek-V2, queries direct": _deepseek("V2", DIRECT),
    "DeepSeek-V2, yarn": _deepseek("V2", LATENT, _yarn(mscale=0.707, mscale_all_dim=0.9)),
    "DeepSeek-V3": _deepseek("V3", LATENT),
    "DeepSeek-V3, yarn": _deepseek("V3", DIRECT, _yarn(mscale=1.0, mscale_all_dim=1.0)),
}


@torch.no_grad()
def randomize(network: torch.nn.Module) -> None:
    """Weights at which every feature shows: no bias is 0, no norm is 1."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        if parameter.dim() == 1:
            offset = 0.0 if name.endswith("bias") else 1.0
            parameter.copy_(offset + 0.3 * torch.randn(parameter.shape, generator=generator))
        else:
            parameter.copy_(0.12 * torch.randn(parameter.shape, generator=generator))


def our_network(model: ModelConfig, precision: Precision, weights: Tensors) -> Any:
    """Our model on one process, with `weights` by canonical name."""
    config = transformer_config(model, ParallelConfig(), precision, RecomputeConfig())
    (network,) = build_chunks(model, ParallelConfig(), config, torch.device("cpu"))
    shapes = model_shapes(model)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == shapes
    places = {}
    for name, (place, shape) in storage_plan(shapes).items():
        places.setdefault(place.key, torch.empty(shape))[place.stacked].copy_(weights[name])
    for pieces in pieces_of(network).values():
        for piece in pieces:
            box = tuple(slice(o, o + s) for o, s in zip(piece.offset, piece.box_shape, strict=True))
            piece.data.copy_(places[piece.key][box].view(piece.data.shape))
    return network


def gradients_by_name(network: Any, model: ModelConfig) -> Tensors:
    """The gradient of each weight, by canonical name."""
    places: Tensors = {}
    for weight, pieces in pieces_of(network).items():
        for piece in pieces:
            box = tuple(slice(o, o + s) for o, s in zip(piece.offset, piece.box_shape, strict=True))
            part = weight.grad.flatten()[piece.start : piece.start + piece.data.numel()]
            places.setdefault(piece.key, torch.zeros(piece.global_shape))[box] = part.view(piece.box_shape).float()
    plan = storage_plan(model_shapes(model))
    return {name: places[place.key][place.stacked] for name, (place, _) in plan.items()}


@dataclass(frozen=True)
class Run:
    """What one forward and backward pass gave."""

    logits: Tensor
    gradients: Tensors


def run_hugging_face(case: Case, dtype: torch.dtype, tokens: Tensor) -> tuple[Run, Tensors]:
    network = case.hf()
    randomize(network)
    weights = {name: p.detach().clone() for name, p in network.named_parameters()}
    network = network.to(dtype).eval()
    logits = network(tokens[:, :-1]).logits.float()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {name: p.grad.float() for name, p in network.named_parameters()}
    return Run(logits.detach(), case.weights(gradients, case.model)), case.weights(weights, case.model)


def run_ours(case: Case, precision: Precision, weights: Tensors, tokens: Tensor) -> Run:
    network = our_network(case.model, precision, weights).eval()
    positions = torch.arange(tokens.shape[1] - 1).expand(tokens.shape[0], -1)
    with torch.no_grad():
        logits = network(tokens[:, :-1], positions, None).float()
    network(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean().backward()
    return Run(logits, gradients_by_name(network, case.model))


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def distance(a: Run, b: Run) -> tuple[float, float]:
    """Largest difference relative to the largest value: of the logits, and of any weight's gradient."""
    assert a.gradients.keys() == b.gradients.keys()
    return relative(a.logits, b.logits), max(relative(a.gradients[n], b.gradients[n]) for n in b.gradients)


def measure(name: str) -> dict[str, tuple[float, float]]:
    """Distances to transformers' fp32 model: ours in fp32 and in bf16, and transformers' own in bf16."""
    split_process_group(ParallelConfig(), RuntimeConfig(device="cpu"))
    seed_everything(0)
    case = CASES[name]
    tokens = torch.randint(0, VOCABULARY, (2, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    reference, weights = run_hugging_face(case, torch.float32, tokens)
    rounded, _ = run_hugging_face(case, torch.bfloat16, tokens)
    return {
        "fp32": distance(run_ours(case, Fp32Precision(kind="fp32"), weights, tokens), reference),
        "bf16": distance(run_ours(case, Bf16Precision(kind="bf16"), weights, tokens), reference),
        "transformers in bf16": distance(rounded, reference),
    }


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_transformers(name: str, pool: GlooPool) -> None:
    check_model(CASES[name].model, source=name)
    (distances,) = pool.run(1, measure, name)
    for precision, (logits, gradients) in distances.items():
        print(f"{name}, {precision}: logits {logits:.1e}, gradients {gradients:.1e} of their scale")
    # fp32 rounds to 6e-8; two layers of sums of up to 256 terms leave 1e-6 or so.
    assert max(distances["fp32"]) < 1e-5
    # In bf16 as close to the exact result as transformers itself, rounded at other places.
    for ours, theirs in zip(distances["bf16"], distances["transformers in bf16"], strict=True):
        assert ours < 2 * theirs
