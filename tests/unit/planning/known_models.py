"""Models whose size is published or whose peak of memory a GPU reported, and runs of models."""

from dataclasses import replace
from typing import Any

from megatron_ext.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from tests.support.minimal_run import load, mapping

TANUKI_8X8B = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=65024,
    num_moe_experts=8,
)
LLAMA_LAYERS = ModelConfig(
    num_layers=8,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=32768,
)
MEASURED_GIB = {
    # benchmarks/RESULTS.md, "One GPU": torch, bf16, one H100, micro-batches of 2 x 4096.
    "dense": (LLAMA_LAYERS, 44.6),
    "8x8B": (replace(LLAMA_LAYERS, num_layers=1, num_moe_experts=8), 33.5),
    "64 experts": (
        replace(
            LLAMA_LAYERS,
            num_layers=4,
            hidden_size=2048,
            num_attention_heads=16,
            num_query_groups=16,
            num_moe_experts=64,
            moe_router_topk=6,
            moe_ffn_hidden_size=1408,
            moe_shared_expert_intermediate_size=2816,
        ),
        47.4,
    ),
}


def run_of(
    model: ModelConfig, parallel: ParallelConfig, *, samples: int, rows: int, length: int, **sections: Any
) -> RunConfig:
    """A run of `model` on CPU: micro-batches of `rows` rows of `length` tokens, `samples` of them a step."""
    run = load(mapping(runtime={"device": "cpu", "threads": 1}))
    train = TrainConfig(train_iters=2, global_batch_size=samples, micro_batch_size=rows)
    data = replace(run.data, sequence_length=length)
    return replace(run, model=model, parallel=parallel, train=train, data=data, **sections)
