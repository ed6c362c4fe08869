"""Counts and formulas against published test vectors, and state memory against what training really allocates."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_ext.canonical.counts import count_parameters
from megatron_ext.config import (
    Bf16Precision,
    Fp32Precision,
    LoraConfig,
    LoraTarget,
    ModelConfig,
    MultiLatentAttention,
    ParallelConfig,
    Precision,
    PreferenceTask,
    RunConfig,
    TrainConfig,
    load_run,
)
from megatron_ext.config.layout import resolve_layout
from megatron_ext.planning.check import describe_run
from megatron_ext.planning.flops import training_flops_per_token
from megatron_ext.planning.memory import state_memory
from megatron_ext.runtime.core_guard import versions
from megatron_ext.runtime.device import choose_device
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from megatron_ext.training.planned import stated_plan
from tests.support.minimal_run import load, mapping
from tests.support.workspace import ROOT
from tests.unit.planning.known_models import TANUKI_8X8B


def test_parameters_of_tanuki_8x8b() -> None:
    counts = count_parameters(TANUKI_8X8B)
    assert counts.total == 46_973_325_312
    assert counts.active == 13_150_457_856


def test_parameters_of_tanuki_8b() -> None:
    dense = replace(TANUKI_8X8B, num_moe_experts=None, vocab_size=65040, make_vocab_size_divisible_by=16)
    assert count_parameters(dense).total == count_parameters(dense).active == 7_512_395_776


@pytest.mark.parametrize(
    ("recipe", "total", "active"),
    [
        ("llmjp4_32b_a3.8b", 32_139_028_992, 3_827_476_992),
        ("llmjp3_8x1.8b", 9_266_759_680, None),
        # As OpenAI's model card (arXiv 2508.10925, table 1) has them: 20.91B, and 3.61B active with one of the two
        # matrices of the vocabulary.
        ("gpt_oss_20b", 20_914_757_184, 3_608_307_264 + 201_088 * 2880),
    ],
)
def test_recipes_have_the_parameters_of_the_published_models(recipe: str, total: int, active: int | None) -> None:
    counts = count_parameters(load_run(ROOT / "examples" / "recipes" / f"{recipe}.yaml").model)
    assert counts.total == total
    assert active is None or counts.active == active


def test_the_recipe_of_64_experts_has_the_size_of_its_files() -> None:
    counts = count_parameters(load_run(ROOT / "examples" / "recipes" / "jiniac_5b.yaml").model)
    assert 2 * counts.total == pytest.approx(10.06e9, rel=1e-3)  # GB in bf16


def test_vocabulary_padding_is_not_counted() -> None:
    padded = replace(TANUKI_8X8B, vocab_size=65000)
    assert count_parameters(padded).total == 46_973_325_312 - 24 * 2 * 4096


def test_training_flops_of_tanuki_8x8b() -> None:
    assert training_flops_per_token(TANUKI_8X8B, 4096) == pytest.approx(80.518e9, rel=1e-5)


def test_what_is_outside_of_windows_is_not_counted() -> None:
    """Of 4,096 queries each sees itself and up to 127 before it, in half of the layers."""
    length, window = 4096, 128
    windows = replace(TANUKI_8X8B, sliding_window=window, window_attn_skip_freq=2)
    seen = sum(min(query + 1, window) for query in range(length)) / length
    saved = 6 * TANUKI_8X8B.num_layers / 2 * 2 * TANUKI_8X8B.hidden_size * (length / 2 - seen)
    difference = training_flops_per_token(TANUKI_8X8B, length) - training_flops_per_token(windows, length)
    assert difference == pytest.approx(saved, rel=1e-3)  # a query's own key, of which causal attention counts half
    longer = replace(windows, sliding_window=length)
    assert training_flops_per_token(longer, length) == training_flops_per_token(TANUKI_8X8B, length)


def test_shared_and_dense_layers_are_counted() -> None:
    base = training_flops_per_token(TANUKI_8X8B, 4096)
    shared = training_flops_per_token(replace(TANUKI_8X8B, moe_shared_expert_intermediate_size=1000), 4096)
    assert shared - base == pytest.approx(6 * 3 * 4096 * 1000 * 32)
    one_dense = training_flops_per_token(replace(TANUKI_8X8B, moe_first_k_dense=1), 4096)
    assert base - one_dense == pytest.approx(6 * 3 * 4096 * 14336)


def test_frozen_weights_ask_for_no_gradient_of_theirs() -> None:
    tokens, rank = 4096, 16
    adapted = training_flops_per_token(TANUKI_8X8B, tokens, LoraConfig(targets=[LoraTarget(rank=rank)]))
    core = 32 * 4096 * tokens
    of_weights = training_flops_per_token(TANUKI_8X8B, tokens) / 6 - core
    # Two of eight experts work: 26,624 widths of attention and 442,368 / 4 of experts in each of 32 layers.
    of_adapters = 32 * rank * (26_624 + 442_368 / 4)
    assert adapted == pytest.approx(4 * of_weights + 6 * (core + of_adapters))
    adapters, task = LoraConfig(targets=[LoraTarget(rank=rank)]), PreferenceTask(kind="preference")
    compared = training_flops_per_token(TANUKI_8X8B, tokens, adapters, task)
    assert compared - adapted == pytest.approx(2 * (of_weights + core)), "the reference is a forward pass of the base"


def allocated_bytes(run: RunConfig) -> int:
    """Bytes of weights, gradient buffers, master weights and moments that this rank holds."""
    from megatron_ext.mcore.build import build_trainable

    device = choose_device(run.runtime)
    trainable = build_trainable(run, split_process_group(run.parallel, run.runtime), device)
    parameters = [parameter for chunk in trainable.chunks for parameter in chunk.parameters()]
    weights = sum(p.numel() * p.element_size() for p in parameters)
    weights += sum(p.numel() * p.main_grad.element_size() for p in parameters if p.requires_grad)
    states = 0
    for part in trainable.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for main in group["params"]:
                moments = part.optimizer.state[main]
                states += sum(t.numel() * t.element_size() for t in moments.values())
                states += main.numel() * 4 if run.precision.kind == "bf16" else 0
    trainable.release()
    return weights + states


@pytest.mark.parametrize("precision", [Fp32Precision(kind="fp32"), Bf16Precision(kind="bf16")], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "degrees",
    [
        {},
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
        },
        {"pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2},
        {"use_distributed_optimizer": False, "expert_model_parallel_size": 2},
        {"context_parallel_size": 2, "expert_model_parallel_size": 2},
    ],
    ids=["dp4", "tp2 ep2", "pp2 ep2", "plain ep2", "cp2 ep2"],
)
def test_state_memory_is_what_training_allocates(precision: Precision, degrees: dict[str, Any], pool: GlooPool) -> None:
    model, parallel = tiny_model(moe=True), ParallelConfig(**degrees)
    run = load(mapping(train={"global_batch_size": 8}))
    run = replace(run, model=model, parallel=parallel, precision=precision, data=replace(run.data, sequence_length=32))
    layout = resolve_layout(parallel, TrainConfig(train_iters=1, global_batch_size=8), 4)
    if precision.kind == "bf16":
        run = replace(run, optimizer=replace(run.optimizer, exp_avg_dtype="bf16", exp_avg_sq_dtype="bf16"))
    measured = max(pool.run(4, allocated_bytes, run))
    estimated = state_memory(run, layout).bytes
    print(f"estimated {estimated:,} bytes, allocated {measured:,}")
    # Shards of the distributed optimizer are cut by buffer, not by parameter, so ranks differ by some parameters.
    assert estimated == pytest.approx(measured, rel=0.02)


def test_state_memory_beside_a_frozen_base(pool: GlooPool) -> None:
    model, adapters = tiny_model(moe=True), LoraConfig(targets=[LoraTarget(match=["*"], rank=8)])
    parallel = ParallelConfig(pipeline_model_parallel_size=2, expert_model_parallel_size=2)
    run = replace(load(mapping(train={"global_batch_size": 8})), model=model, parallel=parallel, adapters=adapters)
    layout = resolve_layout(parallel, TrainConfig(train_iters=1, global_batch_size=8), 4)
    measured = max(pool.run(4, allocated_bytes, run))
    assert state_memory(run, layout).bytes == pytest.approx(measured, rel=0.02)


def test_state_memory_knows_which_layers_virtual_stages_put_together() -> None:
    run, model = load(mapping()), tiny_model(moe=True, moe_first_k_dense=0, moe_layer_freq=2)

    def parameters(chunks: int | None) -> int:
        parallel = ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=chunks)
        layout = resolve_layout(parallel, TrainConfig(train_iters=1, global_batch_size=8), 2)
        return state_memory(replace(run, model=model, parallel=parallel), layout).parameters

    one_expert = 3 * model.hidden_size * model.expert_ffn_hidden_size
    # Layers 0 and 2 have experts, beside a router and a shared expert. In two chunks a stage the first one has both.
    moe_layer = 4 * one_expert + 4 * model.hidden_size + 3 * model.hidden_size * 64
    dense_layer = 3 * model.hidden_size * model.ffn_hidden_size
    # Without chunks each stage has one of them, and the last one the final norm beside the output layer.
    assert parameters(2) - parameters(None) == moe_layer - dense_layer - model.hidden_size


def test_check_prints_grid_and_counts_and_reloads() -> None:
    from megatron_ext.config.load import load_config
    from megatron_ext.config.root import RunConfig
    from megatron_ext.config.yaml_text import parse_yaml

    run = load(mapping(parallel={"tensor_model_parallel_size": 2}))
    text = describe_run(run, 4)
    assert "rank grid of 4 processes: TP 2 x CP 1 x DP 2 x PP 1" in text
    assert f"{count_parameters(run.model).total:,} in all" in text
    assert "(the fewest this layout needs" in describe_run(run, None)
    assert f"installed       {versions()}" in text
    assert "overlap         on CUDA gradients are reduced during the backward pass, weights gathered " in text
    assert "overlap         none" in describe_run(replace(run, runtime=replace(run.runtime, device="cpu")), 4)
    assert "overlap         none" in describe_run(run, 2)
    resolved = text.split("rank grid")[0]
    assert load_config(RunConfig, parse_yaml(resolved, source="t"), source="t") == run


def test_check_says_what_the_guard_will_do() -> None:
    off = describe_run(load(mapping()), 1)
    assert (
        "guard           3 steps in a row that are not finite are skipped, the next one ends the run; off: guard."
        in off
    )
    settings = {"spikes": {"sigma": 5}, "rollback": {}, "max_nonfinite_in_row": 0}
    kept = {"save_interval": 50, "keep_last": 4}
    checkpoint = {**mapping()["checkpoint"], **kept}
    on = describe_run(load(mapping(guard=settings, checkpoint=checkpoint)), 1)
    assert "guard           a step that is not finite takes the run back; steps 5 sigma above the 128 before" in on
    assert "goes back to a checkpoint 100 to 149 steps before" in on
    assert "off: guard" not in on


def test_check_prints_the_length_and_the_micro_batches_of_stages() -> None:
    stages = [
        {"name": "short", "mix": {"ja": 1}, "steps": 3},
        {"name": "long", "mix": {"ja": 1}, "samples": 20, "sequence_length": 64, "global_batch_size": 4},
    ]
    sources = {"ja": {"path": "a", "tokens": 10_000}}
    run = load(
        mapping(data={"train": [], "cache_dir": None, "sources": sources, "stages": stages}, train={"train_iters": 0})
    )
    text = describe_run(run, 2, stated_plan(run.data, run.train))
    assert "train_iters: 8" in text
    train, data = run.train, run.data
    each = [(train.global_batch_size, data.sequence_length), (4, 64)]
    shapes = [
        f"{batch // (train.micro_batch_size * 2)} of {train.micro_batch_size} x {length}" for batch, length in each
    ]
    assert f"micro-batches   {', '.join(shapes)} tokens" in text


LATENT = MultiLatentAttention(kv_lora_rank=512, qk_head_dim=128, qk_pos_emb_head_dim=64, v_head_dim=128)
DEEPSEEK_V2_LITE = ModelConfig(
    num_layers=27,
    hidden_size=2048,
    ffn_hidden_size=10944,
    num_attention_heads=16,
    vocab_size=102400,
    multi_latent_attention=LATENT,
    num_moe_experts=64,
    moe_ffn_hidden_size=1408,
    moe_router_topk=6,
    moe_first_k_dense=1,
    moe_shared_expert_intermediate_size=2816,
)
GPT2_SMALL = ModelConfig(
    num_layers=12,
    hidden_size=768,
    ffn_hidden_size=3072,
    num_attention_heads=12,
    vocab_size=50257,
    max_position_embeddings=1024,
    position_embedding_type="learned_absolute",
    normalization="LayerNorm",
    activation_func="gelu_tanh",
    gated_linear_unit=False,
    add_bias_linear=True,
    untie_embeddings_and_output_weights=False,
)
DENSE_DEEPSEEK: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 256,
    "first_k_dense_replace": 2,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
}


def transformers_model(name: str, heads: str, **fields: Any) -> Any:
    """A small model of transformers."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**fields, attn_implementation="eager", use_cache=False)
    return getattr(transformers, f"{name}{heads}")(config)


def test_parameters_of_gpt2_and_deepseek_v2_lite_are_the_published_ones() -> None:
    assert count_parameters(GPT2_SMALL).total == 124_439_808
    counts = count_parameters(DEEPSEEK_V2_LITE)
    assert counts.total == 15_706_484_224
    # "2.4B activated" (arXiv 2405.04434, appendix B) leaves out the output layer's or the embedding's 0.2B.
    assert counts.active == pytest.approx(2.66e9, rel=0.01)


def measured_flops(network: Any, sequence_length: int) -> float:
    """FLOPs of one token's forward pass, counted operation by operation over whole [S, S] score matrices."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, sequence_length, dtype=torch.long))
    return counter.get_total_flops() / sequence_length


@pytest.mark.parametrize("rank", [40, None], ids=["latent queries", "direct queries"])
def test_training_flops_of_latent_attention_are_those_that_transformers_runs(rank: int | None) -> None:
    network = transformers_model("DeepseekV2", "ForCausalLM", q_lora_rank=rank, **DENSE_DEEPSEEK)
    latent = MultiLatentAttention(
        kv_lora_rank=48, q_lora_rank=rank, qk_head_dim=32, qk_pos_emb_head_dim=16, v_head_dim=24
    )
    model = ModelConfig(
        num_layers=2,
        hidden_size=128,
        ffn_hidden_size=320,
        num_attention_heads=4,
        vocab_size=256,
        multi_latent_attention=latent,
    )
    assert_forward_is_a_third(model, network)


def test_training_flops_of_gpt2_are_those_that_transformers_runs() -> None:
    model = replace(GPT2_SMALL, num_layers=2, vocab_size=256, make_vocab_size_divisible_by=1)
    network = transformers_model("GPT2", "LMHeadModel", n_layer=2, vocab_size=256)
    assert_forward_is_a_third(model, network)


def assert_forward_is_a_third(model: ModelConfig, network: Any) -> None:
    # Per token a + b * S; of the score matrix we count the causal half.
    at_64, at_128 = measured_flops(network, 64), measured_flops(network, 128)
    slope = (at_128 - at_64) / 64
    expected = at_64 - 64 * slope + 64 * slope / 2
    print(f"forward {training_flops_per_token(model, 64) / 3:,.0f} by formula, {expected:,.0f} counted")
    assert training_flops_per_token(model, 64) / 3 == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["biases", "projection norm", "latent"])
def test_state_memory_knows_what_tensor_parallelism_splits(kind: str, pool: GlooPool) -> None:
    features: dict[str, Any] = {
        "biases": {
            "add_bias_linear": True,
            "normalization": "LayerNorm",
            "position_embedding_type": "learned_absolute",
        },
        "projection norm": {"qk_layernorm": "projection"},
        "latent": {
            "num_query_groups": None,
            "multi_latent_attention": MultiLatentAttention(
                kv_lora_rank=24, q_lora_rank=40, qk_head_dim=16, qk_pos_emb_head_dim=8, v_head_dim=12
            ),
        },
    }
    model = tiny_model(moe=True, **features[kind])
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, use_distributed_optimizer=False)
    run = load(mapping(train={"global_batch_size": 8}))
    run = replace(run, model=model, parallel=parallel, data=replace(run.data, sequence_length=32))
    layout = resolve_layout(parallel, TrainConfig(train_iters=1, global_batch_size=8), 2)
    # The plain optimizer cuts nothing, so both must be the same to the byte.
    assert state_memory(run, layout).bytes == pool.run(2, allocated_bytes, run)[0]
