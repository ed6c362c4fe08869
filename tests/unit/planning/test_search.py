"""The planner offers what the rules allow, all of it, and nothing else; its times are those of a GPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.config import (
    Bf16Precision,
    ParallelConfig,
    RecomputeConfig,
    RunConfig,
    load_config,
    to_mapping,
)
from megatron_ext.errors import ConfigError
from megatron_ext.planning.assumptions import GPUS, as_yaml, assumptions_for
from megatron_ext.planning.layer_memory import LayerFormulas, MicroBatch
from megatron_ext.planning.memory import stage_states
from megatron_ext.planning.peak_memory import peak_memory
from megatron_ext.planning.plan_plot import draw
from megatron_ext.planning.plan_run import planned_run, run_to_plan, write_planned
from megatron_ext.planning.plan_text import advice, table
from megatron_ext.planning.proven import PROVEN, is_proven, kind_of
from megatron_ext.planning.run_length import run_length, with_tokens
from megatron_ext.planning.search import MICRO_BATCHES, Candidate, candidates, search, tokens_a_second, with_layout
from megatron_ext.planning.step_time import step_time
from megatron_ext.testing.tiny import tiny_model
from megatron_ext.training.planned import expected_plan
from tests.distributed.layouts import DENSE, MOE
from tests.support.commands import TOOLS, command
from tests.support.minimal_run import load, mapping
from tests.support.recipes import FOLDER, NAMES, recipe
from tests.unit.planning.known_models import LLAMA_LAYERS, MEASURED_GIB, run_of

H100 = GPUS["h100"]
EXPERTS = {"num_moe_experts": 8, "moe_ffn_hidden_size": 32, "moe_first_k_dense": 1}


def small(*, moe: bool, heads: int = 8, layers: int = 4, batch: int = 16) -> RunConfig:
    model = {"num_layers": layers, "num_attention_heads": heads, "kv_channels": 16, **(EXPERTS if moe else {})}
    train = {"global_batch_size": batch}
    data = {"sequence_length": 2048}
    return load(mapping(model={**model, "max_position_embeddings": 2048}, train=train, data=data))


def is_accepted(run: RunConfig, processes: int) -> bool:
    """What --check says."""
    try:
        load_config(RunConfig, to_mapping(run), source="run").resolve(processes)
    except ConfigError:
        return False
    return True


@settings(max_examples=4)
@given(st.booleans(), st.sampled_from([4, 6, 8]), st.sampled_from([3, 4, 6]), st.sampled_from([4, 6]))
def test_what_is_offered_passes_check(moe: bool, heads: int, layers: int, processes: int) -> None:
    found = candidates(small(moe=moe, heads=heads, layers=layers, batch=24), processes, H100)
    assert found
    for candidate in found[:: max(len(found) // 8, 1)]:
        assert is_accepted(candidate.run, processes)


OFFERED = {moe: {(c.run.parallel, c.run.train.micro_batch_size) for c in candidates(small(moe=moe), 8, H100)}
           for moe in (False, True)}  # fmt: skip
DEGREE = st.sampled_from([1, 2, 4, 8])


@settings(max_examples=60)
@given(st.booleans(), DEGREE, st.sampled_from([1, 2]), DEGREE, st.sampled_from([None, 2]), DEGREE, DEGREE,
       st.sampled_from(MICRO_BATCHES))  # fmt: skip
def test_what_the_rules_allow_is_offered_and_nothing_else(
    moe: bool, tp: int, cp: int, pp: int, vpp: int | None, ep: int, etp: int, micro: int
) -> None:
    run = small(moe=moe)
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        context_parallel_size=cp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        expert_model_parallel_size=ep if moe else 1,
        expert_tensor_parallel_size=None if not moe or ep == 1 or etp > 1 and tp == 1 else (etp if etp == 1 else tp),
    )
    if parallel.expert_tensor_parallel_size == 1 and tp == 1:
        parallel = replace(parallel, expert_tensor_parallel_size=None)
    allowed = is_accepted(with_layout(run, parallel, micro, RecomputeConfig()), 8)
    assert ((parallel, micro) in OFFERED[moe]) == allowed


def test_the_parity_grid_is_what_is_called_proven() -> None:
    """The words of planning/proven.py are the layouts of tests/distributed/test_parity.py."""
    for is_moe, grid in ((False, DENSE), (True, MOE)):
        run = replace(load(mapping()), model=tiny_model(moe=is_moe))
        names = set()
        for case in grid:
            train = replace(run.train, global_batch_size=64)
            one = replace(run, parallel=case.parallel, train=train)
            names.add(kind_of(one, one.resolve(case.processes)))
        assert names == PROVEN[is_moe]


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_of_a_recipe_is_of_a_proven_kind(name: str) -> None:
    """And each is proven itself, in tests/distributed/test_recipes.py."""
    run, processes = recipe(name)
    assert is_proven(run, run.resolve(processes))
    said = (FOLDER / f"{name}.yaml").read_text()
    assert "What we would do otherwise" in said
    assert "a guess" in said.lower()


MEASURED_TFLOPS = {"dense": 450.8, "8x8B": 353.0, "64 experts": 233.1}
"""benchmarks/RESULTS.md, "One GPU": torch, bf16, one H100."""


@pytest.mark.parametrize("name", MEASURED_TFLOPS)
def test_a_step_takes_as_long_as_on_a_gpu(name: str) -> None:
    parallel, bf16 = ParallelConfig(use_distributed_optimizer=False), Bf16Precision(kind="bf16")
    run = run_of(MEASURED_GIB[name][0], parallel, samples=8, rows=2, length=4096, precision=bf16)
    layout = run.resolve(1)
    time = step_time(run, layout, stage_states(run, layout), run.step_shapes[0], H100)
    print(f"predicted {time.tflops:.1f} TFLOP/s, measured {MEASURED_TFLOPS[name]}")
    assert time.tflops == pytest.approx(MEASURED_TFLOPS[name], rel=0.10)


def test_a_dense_model_on_two_nodes_is_as_fast_as_a_team_reported(tmp_path: Path) -> None:
    """430 TFLOP/s of each of 16 H100 for a Llama of 35B, without Transformer Engine: all that is known of that run.

    The one figure of several GPUs that there is. Its length of samples and its layout were not told: hence 15%.
    """
    shape = tmp_path / "model.yaml"
    shape.write_text("model: {num_layers: 40, hidden_size: 8192, ffn_hidden_size: 28672, num_attention_heads: 64,"
                     " num_query_groups: 8, vocab_size: 65024}\n")  # fmt: skip
    best = search(run_to_plan(str(shape), ["parallel.overlap_grad_reduce=true"]), 16, H100, best=1).chosen[0]
    print(f"predicted {best.candidate.time.tflops:.0f} TFLOP/s, reported 430")
    assert best.candidate.time.tflops == pytest.approx(430, rel=0.15)


def test_what_costs_time_costs_time() -> None:
    run = run_of(replace(LLAMA_LAYERS, num_moe_experts=8), ParallelConfig(), samples=1024, rows=1, length=4096)

    def seconds(gpus: int = 8, **degrees: Any) -> float:
        recompute = degrees.pop("recompute", RecomputeConfig())
        one = with_layout(run, ParallelConfig(**degrees), 1, recompute)
        layout = one.resolve(gpus)
        return step_time(one, layout, stage_states(one, layout), one.step_shapes[0], H100).seconds

    assert seconds(recompute=RecomputeConfig(granularity="full")) > 1.2 * seconds()
    assert seconds(16) < 0.6 * seconds(8)
    by_kernels = replace(run, runtime=replace(run.runtime, device="cuda", kernels="triton"))
    dense = run_of(LLAMA_LAYERS, ParallelConfig(), samples=32, rows=4, length=4096)
    before, after = (peak_memory(one, one.resolve(8)) for one in (dense, replace(dense, runtime=by_kernels.runtime)))
    assert after.working < before.working
    assert after.kept == before.kept
    one, layout = by_kernels, by_kernels.resolve(8)
    assert step_time(one, layout, stage_states(one, layout), one.step_shapes[0], H100).compute < 0.95 * seconds()
    # A rank updates its share of the weights, of experts that fewer ranks have a larger one, and moments that the host
    # keeps cross the bus twice.
    one = with_layout(run, ParallelConfig(expert_model_parallel_size=8), 1, RecomputeConfig())
    layout, (held,) = one.resolve(8), stage_states(one, one.resolve(8))
    on_host = replace(one, optimizer=replace(one.optimizer, moments_on_host=True))
    here, there = (step_time(some, layout, [held], some.step_shapes[0], H100).optimizer for some in (one, on_host))
    updated = held.dense / 8 + held.experts
    assert here == pytest.approx(1.1 * updated * 42 / 2.7e12)
    assert there - here == pytest.approx(1.1 * updated * 2 * 8 / 50e9)
    # What three layers keep travels out beside a forward pass and in beside a backward pass.
    offload = RecomputeConfig(offload_layers=3)
    one = with_layout(run, ParallelConfig(expert_model_parallel_size=8), 1, offload)
    fast, slow = (
        step_time(one, layout, [held], one.step_shapes[0], replace(H100, host_gb_s=rate)).host for rate in (1e6, 0.001)
    )
    numbers = 1024 // 8
    micro = MicroBatch(1, 4096, imbalance=H100.expert_imbalance)
    moved = LayerFormulas(one.model, layout, one.parallel, one.precision, offload, micro).layer(is_moe=True).kept
    assert fast == 0
    assert slow == pytest.approx(numbers * 3 * 2 * moved / 1e6, rel=1e-3)  # beside which a layer's time is nothing
    # Over two nodes a token of two experts crosses once where both are on the other one; and shared experts hide some.
    sent = {"expert_model_parallel_size": 8}
    shared = replace(run, model=replace(run.model, moe_shared_expert_intermediate_size=4096))
    two_nodes = replace(H100, gpus_per_node=4)
    every_row, once, hidden = (
        step_time(one, layout, stage_states(one, layout), one.step_shapes[0], two_nodes).messages
        for one in (
            with_layout(shared, ParallelConfig(**sent, **more), 1, RecomputeConfig())
            for more in ({}, {"moe_token_dispatcher_type": "flex"}, {"moe_shared_expert_overlap": True})
        )
        for layout in [one.resolve(8)]
    )
    assert once == pytest.approx(0.75 * every_row)
    assert hidden < every_row
    # Chunks shorten the wait for the pipeline to fill.
    waits = {"pipeline_model_parallel_size": 4}
    assert seconds(virtual_pipeline_model_parallel_size=2, **waits) < seconds(**waits)


def test_assumptions_are_printed_as_they_are_read(tmp_path: Path) -> None:
    file = tmp_path / "ours.yaml"
    file.write_text("network_gb_s: 20\nname: ours\n")
    ours = assumptions_for("h200", str(file))
    assert (ours.network_gb_s, ours.name, ours.memory_gib) == (20, "ours", GPUS["h200"].memory_gib)
    file.write_text(as_yaml(ours))
    assert assumptions_for("h100", str(file)) == ours
    file.write_text("netwrk_gb_s: 20\n")
    with pytest.raises(ConfigError, match="did you mean 'network_gb_s'"):
        assumptions_for("h100", str(file))
    assert assumptions_for("H200", None) == GPUS["h200"]
    with pytest.raises(ConfigError, match="--gpu v100: must be one of h100, h200"):
        assumptions_for("v100", None)


def test_a_bare_shape_is_planned_and_written(tmp_path: Path) -> None:
    shape = tmp_path / "model.yaml"
    shape.write_text("model: {num_layers: 8, hidden_size: 1024, ffn_hidden_size: 4096, num_attention_heads: 16,"
                     " num_query_groups: 8, vocab_size: 32000}\n")  # fmt: skip
    run = run_to_plan(str(shape), [])
    found = search(run, 16, H100)
    length = replace(run_length(run), tokens=2e11)
    text = table(run, found, 16, H100, 14, length)
    assert f"{found.legal:,} are legal" in text
    assert "days for 200B" in text
    assert "predicted" in text
    assert "network_gb_s: 40.0" in text
    assert "host memory" not in text
    moments = replace(run.optimizer, moments_on_host=True)
    (choice, *_) = found.chosen
    moved = replace(choice.candidate.run, optimizer=moments, recompute=RecomputeConfig(offload_layers=1))
    memory = peak_memory(moved, choice.candidate.layout)
    candidate = replace(choice.candidate, run=moved)
    there = table(
        moved, replace(found, chosen=[replace(choice, candidate=candidate, memory=memory)]), 16, H100, 14, length
    )
    assert f"host memory     {memory.on_host / 2**30:.1f} GiB a GPU" in there
    assert "predicted with 50 GB/s each way" in there
    assert " 1 moved " in there
    assert len({choice.candidate.degrees for choice in found.chosen}) == len(found.chosen) == 5
    rates = [choice.candidate.time.seconds for choice in found.chosen]
    assert rates == sorted(rates)
    assert all(H100.fits(choice.memory.total) for choice in found.chosen)
    assert "Hoffmann" in advice(run, length, None)
    target = tmp_path / "planned.yaml"
    chosen = planned_run(found, 2, 2e11)
    write_planned(chosen, str(target))
    again = run_to_plan(str(target), [])
    assert again == chosen
    assert again.train.train_iters * 1024 * 4096 >= 2e11
    assert is_accepted(again, 16)
    with pytest.raises(ConfigError, match="is there already"):
        write_planned(chosen, str(target))
    with pytest.raises(ConfigError, match="the table has 5 layouts"):
        planned_run(found, 6, None)


def test_a_model_that_fits_nowhere_is_said_to() -> None:
    run = run_of(replace(LLAMA_LAYERS, num_layers=80), ParallelConfig(), samples=64, rows=1, length=4096)
    found = search(replace(run, precision=Bf16Precision(kind="bf16")), 4, H100)
    assert not found.chosen
    assert "none fits: the least that any needs is" in table(run, found, 4, H100, 14, run_length(run))
    with pytest.raises(ConfigError, match="no layout fits"):
        planned_run(found, 1, None)
    with pytest.raises(ConfigError, match="no layout fits"):
        draw(found, H100, "plan.png")


def test_none_that_fits_is_exit_code_1_and_tokens_beyond_all_text_2(tmp_path: Path) -> None:
    shape = tmp_path / "model.yaml"
    shape.write_text("model: {num_layers: 80, hidden_size: 8192, ffn_hidden_size: 28672, num_attention_heads: 64,"
                     " vocab_size: 32000}\n")  # fmt: skip
    files = {option: tmp_path / name for option, name in (("--plot", "plan.png"), ("--write", "planned.yaml"))}
    asked = [word for option, path in files.items() for word in (option, path)]
    process = command(TOOLS / "plan.py", shape, "--gpus", "2", *asked)
    assert (process.returncode, process.stderr) == (1, "")
    assert "none fits: the least that any needs is" in process.stdout
    for path in files.values():
        assert f"no layout fits, so {path} is not written" in process.stdout
        assert not path.exists()
    for tokens in (".nan", "1e30"):
        process = command(TOOLS / "plan.py", shape, "--gpus", "2", f"--tokens={tokens}")
        assert process.returncode == 2
        assert f"argument --tokens: '{tokens}'" in process.stderr


def test_a_run_of_stages_is_planned_by_all_of_them() -> None:
    stages = [
        {"name": "short", "mix": {"ja": 1}, "steps": 3, "lr_scale": 0.5},
        {"name": "long", "mix": {"ja": 1}, "steps": 2, "sequence_length": 1024, "global_batch_size": 4},
    ]
    sources = {"ja": {"path": "a", "tokens": 10_000_000}}
    data = {"train": [], "cache_dir": None, "sources": sources, "stages": stages}
    run = load(mapping(data=data, train={"train_iters": 0}, model={"max_position_embeddings": 1024}))
    found = candidates(run, 4, H100)
    assert found
    assert all(is_accepted(one.run, 4) for one in found[::7])
    assert max(one.run.train.micro_batch_size * one.layout.dp for one in found) == 4


def test_the_kind_of_step_that_most_tokens_are_in_is_the_one_that_is_timed() -> None:
    """A run that ends with a few long samples is not as slow as those, and its stages say how long it is."""
    run, _ = recipe("calm2_7b")
    length = run_length(run, expected_plan(run))
    assert length.tokens == pytest.approx(1.3e12, rel=1e-4)
    assert [(run.step_shapes[n].length, round(share, 3)) for n, share in length.kinds] == [(4096, 0.95), (32768, 0.05)]
    layout = run.resolve(64)
    states = stage_states(run, layout)
    short, long = (step_time(run, layout, states, shape, H100) for shape in run.step_shapes)
    one = Candidate(run, layout, states, short)
    days = (0.95 * short.seconds / short.tokens + 0.05 * long.seconds / long.tokens) * 1.3e12 / 86400
    assert length.tokens / tokens_a_second(one, length, H100) / 86400 == pytest.approx(days, rel=1e-3)
    assert run_length(run).tokens is None  # nothing is known of stages without a plan


def test_fewer_tokens_than_a_step_has_are_refused() -> None:
    run = small(moe=False, batch=16)
    length = run_length(run)
    assert with_tokens(run, length, 16 * 2048).tokens == 16 * 2048
    with pytest.raises(ConfigError, match=r"--tokens 32767: one step has 32,768 \(16 x 2,048\)"):
        with_tokens(run, length, 16 * 2048 - 1)


def test_what_is_prepared_says_how_long_stages_are(tmp_path: Path) -> None:
    data = {"train": [], "cache_dir": None, "sources": {"ja": {"path": str(tmp_path / "train")}},
            "stages": [{"name": "all", "take": {"ja": {"epochs": 2}}}]}  # fmt: skip
    run = load(mapping(data=data, train={"train_iters": 0}))
    assert expected_plan(run) is None
    (tmp_path / "train.bin").touch()
    (tmp_path / "dataset.json").write_text('{"vocab_size": 9, "splits": {"train": {"documents": 3, "tokens": 6401}}}')
    assert run_length(run, expected_plan(run)).tokens == 2 * 6400 // (8 * 64) * (8 * 64)


def test_the_steps_of_a_ramp_count_by_their_tokens() -> None:
    ramp = [{"steps": 10, "global_batch_size": 4}]
    run = load(mapping(train={"batch_size_ramp": ramp, "train_iters": 100, "global_batch_size": 8}))
    length = run_length(run)
    assert length.tokens == (10 * 4 + 90 * 8) * 64
    assert [(number, round(share, 4)) for number, share in length.kinds] == [(1, 0.9474), (0, 0.0526)]
    planned = planned_run(search(run, 1, H100), 1, length.tokens + 1)
    assert planned.train.train_iters == 101  # and not 96, as if none of the steps were shorter


def test_no_layout_is_a_clear_error() -> None:
    run = small(moe=False, batch=1)
    said = r"no layout.* on 7 GPUs.*train.global_batch_size=7 instead of 1\n.*that it has"
    with pytest.raises(ConfigError, match=said):
        search(run, 7, H100)


@pytest.mark.parametrize("longest", ["four", "null", "2k", "-4", ".nan", "[1]"])
def test_a_shape_that_is_wrong_is_said_by_the_loader(tmp_path: Path, longest: str) -> None:
    shape = tmp_path / "model.yaml"
    shape.write_text("model: {num_layers: 8, hidden_size: 1024, ffn_hidden_size: 4096, num_attention_heads: 16,"
                     f" vocab_size: 32000, max_position_embeddings: {longest}}}\n")  # fmt: skip
    with pytest.raises(ConfigError, match="model.max_position_embeddings"):
        run_to_plan(str(shape), [])
