#!/usr/bin/env python
"""The planner's memory of a rank beside what training really needs, for random models in random layouts.

  python benchmarks/memory_plan.py --record          # 36 of them on up to 8 processes, minutes on two quiet cores

Each trains two steps on CPU processes, where every tensor is counted while it lives (testing/live_memory.py); the
fullest rank's peak of the second is compared. What a device's allocator and libraries need beside is not in it.
"""

import argparse
import random
import statistics
import sys
from typing import Any

from report import hardware, markdown_table, record, versions

from megatron_ext.config import RunConfig, load_config
from megatron_ext.errors import ConfigError
from megatron_ext.planning.peak_memory import PeakMemory, peak_memory
from megatron_ext.testing.live_memory import MeasuredMemory, measure_step
from megatron_ext.testing.pool import GlooPool

ACCEPTED = 0.10
IMBALANCE = 1.1
"""Of fresh routers over a few thousand tokens."""
SEED = 18
PROCESSES = 8


def random_run(choose: random.Random) -> tuple[RunConfig, int]:
    """A run of a random model in a random layout, and how many processes it has."""
    while True:
        processes = choose.choice([1, 2, 2, 4, 4, 8])
        raw = _random_mapping(choose)
        try:
            run = load_config(RunConfig, raw, source="random")
            run.resolve(processes)
        except ConfigError:
            continue  # no legal one: another
        return run, processes


def _random_mapping(choose: random.Random) -> dict[str, Any]:
    moe, latent = choose.random() < 0.6, choose.random() < 0.15
    heads = choose.choice([4, 8])
    parallel = _random_layout(choose, moe)
    model = _random_model(choose, heads, moe)
    if latent:
        model |= _latent_attention(choose)
    if moe:
        model |= _random_experts(choose)
        parallel |= {
            "expert_model_parallel_size": choose.choice([1, 2, 4]),
            "expert_tensor_parallel_size": choose.choice([1, None]),
            "moe_token_dispatcher_type": choose.choice(["alltoall", "alltoall", "allgather"]),
        }
    return {
        "model": model,
        "parallel": parallel,
        "recompute": _random_recompute(choose, moe),
        "precision": {"kind": choose.choice(["fp32", "bf16"])},
        "train": {"train_iters": 2, "global_batch_size": 32, "micro_batch_size": choose.choice([1, 2, 4])},
        "optimizer": {"kind": "adam", "lr": 1e-3},
        "schedule": {"kind": "constant"},
        "data": {"sequence_length": choose.choice([256, 512]), "tokenizer": "t", "train": [{"path": "a"}]},
        "checkpoint": {"directory": "d"},
        "runtime": {"device": "cpu", "threads": 1},
    }


def _random_layout(choose: random.Random, moe: bool) -> dict[str, Any]:
    """Section `parallel`, without what experts add."""
    tp = choose.choice([1, 1, 2, 4])
    layout = {
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1 and (moe or choose.random() < 0.7),
        "pipeline_model_parallel_size": choose.choice([1, 1, 2, 4]),
        "context_parallel_size": choose.choice([1, 1, 1, 2]),
        "use_distributed_optimizer": choose.random() < 0.8,
    }
    if layout["pipeline_model_parallel_size"] > 1 and choose.random() < 0.5:
        layout["virtual_pipeline_model_parallel_size"] = 2
    return layout


def _random_model(choose: random.Random, heads: int, moe: bool) -> dict[str, Any]:
    """Section `model` of a dense one with grouped-query attention."""
    return {
        "num_layers": choose.choice([4, 4, 8]),
        "hidden_size": choose.choice([64, 128]),
        "ffn_hidden_size": choose.choice([160, 256, 384]),
        "num_attention_heads": heads,
        "num_query_groups": choose.choice([heads // 2, heads]),
        "vocab_size": choose.choice([500, 2000]),
        "max_position_embeddings": 512,
        "gated_linear_unit": choose.random() < 0.85,
        "normalization": choose.choice(["RMSNorm", "RMSNorm", "LayerNorm"]),
        "qk_layernorm": choose.choice([None, None, "head"]),
        "untie_embeddings_and_output_weights": choose.random() < 0.8,
        "add_bias_linear": not moe and choose.random() < 0.15,
    }


def _latent_attention(choose: random.Random) -> dict[str, Any]:
    return {
        "qk_layernorm": None,
        "num_query_groups": None,
        "multi_latent_attention": {
            "q_lora_rank": choose.choice([None, 48]),
            "kv_lora_rank": 32,
            "qk_head_dim": 16,
            "qk_pos_emb_head_dim": 16,
            "v_head_dim": 32,
        },
    }


def _random_experts(choose: random.Random) -> dict[str, Any]:
    return {
        "num_moe_experts": choose.choice([4, 8]),
        "moe_router_topk": choose.choice([1, 2, 4]),
        "moe_router_pre_softmax": True,
        "moe_ffn_hidden_size": choose.choice([64, 128]),
        "moe_first_k_dense": choose.choice([0, 1]),
        "moe_shared_expert_intermediate_size": choose.choice([None, 64]),
        "moe_gating_normalization": choose.choice([None, {}]),
        "moe_aux_loss_coeff": 0.01,
    }


def _random_recompute(choose: random.Random, moe: bool) -> dict[str, Any]:
    kind = choose.choice([None, None, "full", "selective"])
    if kind == "full":
        return {"granularity": kind, "method": choose.choice(["uniform", "block"])}
    if kind == "selective":
        modules = ["core_attn", "mlp", *(["moe", "shared_experts"] if moe else [])]
        return {"granularity": kind, "modules": [choose.choice(modules)]}
    return {}


def _name(run: RunConfig, processes: int) -> str:
    """The run in a few words."""
    layout, model, recompute = run.resolve(processes), run.model, run.recompute
    degrees = {"TP": layout.tp, "CP": layout.cp, "PP": layout.pp, "EP": layout.ep, "ETP": layout.etp, "DP": layout.dp}
    if not model.is_moe:
        del degrees["EP"], degrees["ETP"]
    experts = f"{model.num_moe_experts} experts" if model.is_moe else "dense"
    parts = [
        f"{experts}, MLA" if model.multi_latent_attention else experts,
        " ".join(f"{name}{size}" for name, size in degrees.items() if size > 1 or name == "DP"),
    ]
    if run.parallel.sequence_parallel:
        parts.append("SP")
    if run.parallel.virtual_pipeline_model_parallel_size:
        parts.append("VPP2")
    parts += [run.precision.kind, f"{run.train.micro_batch_size} x {run.data.sequence_length}"]
    if recompute.granularity:
        parts.append(recompute.granularity if recompute.granularity == "full" else f"{recompute.modules[0]} again")
    return ", ".join(parts)


def _compare(pool: GlooPool, run: RunConfig, processes: int) -> tuple[PeakMemory, MeasuredMemory]:
    measured = pool.run(processes, measure_step, run)
    estimate = peak_memory(run, run.resolve(processes), on_cpu=True, imbalance=IMBALANCE)
    return estimate, max(measured, key=lambda rank: rank.peak)


def main() -> None:
    """Measure, compare, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=36, help="how many (36)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of what is drawn ({SEED})")
    parser.add_argument("--tiny", action="store_true", help="three, to see that it runs")
    parser.add_argument("--record", action="store_true", help="append to RESULTS.md")
    arguments = parser.parse_args()
    choose = random.Random(arguments.seed)
    rows, ratios, shares = [], [], []
    with GlooPool(PROCESSES) as pool:
        for number in range(3 if arguments.tiny else arguments.runs):
            run, processes = random_run(choose)
            estimate, measured = _compare(pool, run, processes)
            ratios.append(estimate.total / measured.peak)
            share = 1 - estimate.state / estimate.total
            shares.append(share)
            figures = [f"{bytes_ / 2**20:.1f}" for bytes_ in (estimate.total, measured.peak)]
            rows.append([_name(run, processes), *figures, f"{ratios[-1]:.3f}", f"{share:.0%}"])
            print(number, *rows[-1], sep=" | ", flush=True)
    worst = max(ratios, key=lambda ratio: abs(ratio - 1))
    table = markdown_table(["run", "estimate, MiB", "measured, MiB", "ratio", "no state"], rows)
    summary = (
        f"{len(rows)} random runs: estimate over measured between {min(ratios):.3f} and {max(ratios):.3f}, median "
        f"{statistics.median(ratios):.3f}; worst {worst:.3f}. What is no state is {min(shares):.0%} to "
        f"{max(shares):.0%} of the estimates."
    )
    where = f"{hardware()}. {versions('torch', 'megatron-core')}."
    text = f"By `benchmarks/memory_plan.py`.\n\n{where}\n\n{table}\n\n{summary}"
    print(f"\n{text}")
    if arguments.record:
        record("Memory of the planner beside counted tensors", text)
    sys.exit(0 if abs(worst - 1) <= ACCEPTED else 1)


if __name__ == "__main__":
    main()
