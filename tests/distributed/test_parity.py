"""Every layout trains like one process: the parity grid."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config import (
    AdaptiveAuxLoss,
    Bf16Precision,
    GumbelNoise,
    InputJitter,
    LearnedNoise,
    MultiLatentAttention,
    ParallelConfig,
    PreferenceTask,
    RecomputeConfig,
    SftTask,
)
from megatron_ext.proving.parity import Cell, Difference, Trajectory, compare, run_layout
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import SOURCES, random_batch, tiny_model
from tests.distributed.layouts import ADAPTERS, DENSE, MOE, TOLERANCE, GridCase, layout
from tests.support.product import alternating

# A wrong gradient is in the norm of the first step and the loss of the second; what the optimizer keeps wrongly between
# steps, in the loss of the third. With --product, five, as the table in README.md has them.
STEPS = 3


DOCUMENTS = [
    layout("DP2", 2),
    layout("TP2 SP EP2 ETP1", 2, tp=2, sp=True, ep=2, etp=1),
    layout("PP2 VPP2", 2, pp=2, vpp=2),
    layout("EP2 all-to-all", 2, ep=2),
    layout("CP2", 2, cp=2),
    layout("CP4 EP2", 4, cp=4, ep=2),
    layout("TP2 SP CP2 PP2 EP2 ETP2", 8, tp=2, sp=True, cp=2, pp=2, ep=2, etp=2),
]
WITH_DOCUMENTS = "MoE, documents"
LATENT = MultiLatentAttention(kv_lora_rank=24, q_lora_rank=40, qk_head_dim=8, qk_pos_emb_head_dim=8, v_head_dim=8)
LATENT_ATTENTION: dict[str, Any] = {"multi_latent_attention": LATENT, "num_query_groups": None}
# Labels with weights between 0 and 1, packed samples, and noise on the embeddings.
SFT = SftTask(kind="sft", weighting="row", neftune_alpha=5.0)
# The reference by switching adapters off, and by a table; sums and means of answers' tokens.
DPO = PreferenceTask(kind="preference", nll=0.5)
DPO_BY_MEANS = PreferenceTask(kind="preference", log_probs="mean", beta=1.0, balance_losses=True)
ALONE = ParallelConfig(use_distributed_optimizer=False)
KINDS = {
    "dense": Cell(tiny_model(), ALONE),
    "MoE": Cell(tiny_model(moe=True), ALONE),
    WITH_DOCUMENTS: Cell(tiny_model(moe=True), ALONE, documents=True),
    "latent, LoRA": Cell(tiny_model(**LATENT_ATTENTION), ALONE, adapters=ADAPTERS),
    "MoE, LoRA": Cell(tiny_model(moe=True), ALONE, adapters=ADAPTERS),
    "dense, LoRA, SFT": Cell(tiny_model(), ALONE, documents=True, task=SFT, adapters=ADAPTERS),
    "MoE, SFT": Cell(tiny_model(moe=True), ALONE, documents=True, task=SFT),
    "dense, LoRA, DPO": Cell(tiny_model(), ALONE, task=DPO, adapters=ADAPTERS),
    "MoE, DPO": Cell(tiny_model(moe=True), ALONE, task=DPO_BY_MEANS),
    "dense, LoRA": Cell(tiny_model(), ALONE, adapters=ADAPTERS),
    "latent MoE, LoRA": Cell(tiny_model(moe=True, **LATENT_ATTENTION), ALONE, adapters=ADAPTERS),
}
"""What every layout must train as one process does."""
EVERY_RUN = (
    ("dense", DENSE),
    ("MoE", MOE),
    (WITH_DOCUMENTS, DOCUMENTS),
    ("latent, LoRA", [layout("TP2", 2, tp=2)]),
    ("MoE, LoRA", [layout("TP2 SP PP2 EP2 ETP1", 4, tp=2, sp=True, pp=2, ep=2, etp=1)]),
    ("dense, LoRA, SFT", [layout("TP2 SP CP2", 4, tp=2, sp=True, cp=2)]),
    ("MoE, SFT", [layout("CP2 PP2 EP2", 4, cp=2, pp=2, ep=2)]),
    ("dense, LoRA, DPO", [layout("TP2 SP CP2", 4, tp=2, sp=True, cp=2)]),
    ("MoE, DPO", [layout("CP2 PP2 VPP2 EP2", 4, cp=2, pp=2, vpp=2, ep=2)]),
)
# Ways of splitting adapters that those above have met, or that other models have.
WITH_PRODUCT = (
    ("dense, LoRA", [layout("TP2", 2, tp=2), layout("TP2 SP", 2, tp=2, sp=True), layout("CP2 DP2", 4, cp=2)]),
    ("dense, LoRA", [layout("TP2 SP PP2 DP2", 8, tp=2, sp=True, pp=2)]),
    ("MoE, LoRA", [layout("DP2", 2), layout("EP2", 2, ep=2), layout("PP2 VPP2 EP2", 4, pp=2, vpp=2, ep=2)]),
    ("MoE, LoRA", [layout("TP2 SP EP2 ETP1", 2, tp=2, sp=True, ep=2, etp=1)]),
    ("latent MoE, LoRA", [layout("TP2 SP CP2 EP2 ETP1", 4, tp=2, sp=True, cp=2, ep=2, etp=1)]),
)
CASES = [(kind, entry) for kind, layouts in EVERY_RUN for entry in layouts]
PRODUCT_CASES = [(kind, entry) for kind, layouts in WITH_PRODUCT for entry in layouts]
RECOMPUTE = {"no recompute": RecomputeConfig(), "full recompute": RecomputeConfig(granularity="full", logits=True)}
# Each layout meets one combination of optimizer and recompute; with --product, all four.
OPTIONS = [(optimizer, recompute) for recompute in RECOMPUTE for optimizer in (True, False)]


class References(dict[str, Trajectory]):
    """Each kind on one process, trained when it is asked for."""

    def __init__(self, pool: GlooPool, kinds: dict[str, Cell]) -> None:
        super().__init__()
        self._pool, self._kinds = pool, kinds

    def __missing__(self, kind: str) -> Trajectory:
        self[kind] = run_layout(self._pool, self._kinds[kind], 1)
        return self[kind]


@pytest.fixture(scope="module")
def kinds(request: pytest.FixtureRequest) -> dict[str, Cell]:
    """How each kind is trained in the grid."""
    steps = 5 if request.config.getoption("--product") else STEPS
    return {kind: replace(cell, steps=steps) for kind, cell in KINDS.items()}


@pytest.fixture(scope="module")
def references(pool: GlooPool, kinds: dict[str, Cell]) -> References:
    """Each kind on one process, without any option."""
    return References(pool, kinds)


@pytest.fixture(scope="module")
def table(repository: Path) -> Iterator[dict[tuple[str, str], dict[str, Difference]]]:
    """Collects measured differences; a complete grid is written into tests/README.md."""
    rows: dict[tuple[str, str], dict[str, Difference]] = {}
    yield rows
    if len(rows) == len(CASES) + len(PRODUCT_CASES) and all(len(cells) == len(OPTIONS) for cells in rows.values()):
        write_table(repository / "tests" / "README.md", rows)


def name_of(value: tuple[str, GridCase] | tuple[bool, str]) -> str:
    """The name of a case or of an option."""
    first, second = value
    return f"{first}-{second.name}" if isinstance(second, GridCase) else column_of(bool(first), second)


@pytest.mark.parametrize(
    ("case", "option"),
    [
        *alternating(CASES, OPTIONS),
        *(pytest.param(*both, marks=pytest.mark.product) for both in itertools.product(PRODUCT_CASES, OPTIONS)),
    ],
    ids=name_of,
)
def test_layout_equals_one_process(
    case: tuple[str, GridCase],
    option: tuple[bool, str],
    pool: GlooPool,
    kinds: dict[str, Cell],
    references: References,
    table: dict[tuple[str, str], dict[str, Difference]],
) -> None:
    kind, entry = case
    distributed_optimizer, recompute = option
    parallel = replace(entry.parallel, use_distributed_optimizer=distributed_optimizer)
    again = RECOMPUTE[recompute]
    if kinds[kind].adapters is not None:  # of the output layer too, which then has logits
        again = replace(again, logits=False)
    cell = replace(kinds[kind], parallel=parallel, recompute=again)
    difference = compare(run_layout(pool, cell, entry.processes), references[kind])
    assert min(references[kind].norms) > 0.1
    table.setdefault((kind, entry.name), {})[column_of(*option)] = difference
    print(f"{kind} {entry.name}, {column_of(*option)}: {difference.loss:.1e}, gradient norm {difference.norm:.1e}")
    assert difference.worst < TOLERANCE


@pytest.mark.parametrize("kind", ["dense", "MoE", WITH_DOCUMENTS, "MoE, SFT"])
def test_the_losses_of_the_sources_make_up_the_loss(kind: str, references: References) -> None:
    """Each layout reports what one process does of every source: `compare` has their losses and units too."""
    one = references[kind]
    for step, loss in enumerate(one.losses):
        sources = one.sources[step * SOURCES : (step + 1) * SOURCES]
        units = sum(count for _, count in sources)
        assert len({mean for mean, _ in sources}) == SOURCES
        assert sum(mean * count for mean, count in sources) / units == pytest.approx(loss, rel=1e-6)


OVERLAPPED = [
    ("dense", layout("DP4", 4), {"overlap_param_gather": False}, "no recompute"),
    ("dense", layout("CP2 PP2 DP2", 8, cp=2, pp=2), {"use_distributed_optimizer": False}, "no recompute"),
    ("MoE", layout("EP2 DP4", 4, ep=2), {}, "no recompute"),
    (
        "MoE",
        layout("TP2 SP EP2 DP2", 4, tp=2, sp=True, ep=2, etp=1),
        {"moe_shared_expert_overlap": True},
        "no recompute",
    ),
    # Its halves are used within the forward pass of another module: only a call of their own waits for them.
    ("MoE, LoRA", layout("EP2 DP2", 2, ep=2), {}, "no recompute"),
    ("MoE", layout("TP2 SP PP2 VPP2 EP2 DP2", 8, tp=2, sp=True, pp=2, vpp=2, ep=2, etp=1), {}, "full recompute"),
]


@pytest.mark.parametrize(
    ("kind", "entry", "options", "recompute"), OVERLAPPED, ids=[f"{kind}-{case.name}" for kind, case, *_ in OVERLAPPED]
)
def test_overlap_as_it_is_on_cuda_changes_nothing(
    kind: str,
    entry: GridCase,
    options: dict[str, bool],
    recompute: str,
    pool: GlooPool,
    kinds: dict[str, Cell],
    references: References,
) -> None:
    parallel = replace(entry.parallel, **options).settled(on_cuda=True, copies=2)
    assert parallel.overlap_grad_reduce is True
    assert parallel.overlap_param_gather is (options.keys() <= {"moe_shared_expert_overlap"})
    cell = replace(kinds[kind], parallel=parallel, recompute=RECOMPUTE[recompute])
    difference = compare(run_layout(pool, cell, entry.processes), references[kind])
    print(f"{kind} {entry.name}: loss {difference.loss:.1e}, gradient norm {difference.norm:.1e}")
    assert difference.worst < TOLERANCE


@pytest.mark.parametrize(
    "modules", [["core_attn"], ["moe"], ["shared_experts"], ["mlp", "layernorm"], ["layernorm"]], ids="-".join
)
def test_selective_recompute_changes_nothing(
    modules: list[str], pool: GlooPool, kinds: dict[str, Cell], references: References
) -> None:
    recompute = RecomputeConfig(granularity="selective", modules=modules)
    difference = compare(run_layout(pool, replace(kinds["MoE"], recompute=recompute), 1), references["MoE"])
    assert difference.worst < TOLERANCE


GATE = {"moe_router_pre_softmax": True, "moe_router_norm_topk_prob": True}
FEATURES: dict[str, dict[str, Any]] = {
    "Gumbel noise": {"moe_router_noise": GumbelNoise(kind="gumbel")},
    "learned noise": {"moe_router_noise": LearnedNoise(kind="learned")},
    "input jitter": {"moe_router_noise": InputJitter(kind="input_jitter", eps=0.1)},
    "sequence balance loss, z-loss": {"moe_router_load_balancing_type": "seq_aux_loss", "moe_z_loss_coeff": 1e-2},
    "global balance loss": {"moe_router_load_balancing_type": "global_aux_loss"},
    "a list of balance losses": {
        "moe_router_load_balancing_type": ["seq_aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [1e-2, 3e-2],
    },
    "adaptive coefficient": {"moe_adaptive_aux_loss": AdaptiveAuxLoss(beta=0.5)},
    "sigmoid, groups, expert bias": {
        "moe_router_score_function": "sigmoid",
        "moe_router_num_groups": 2,
        "moe_router_group_topk": 1,
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_gating_normalization": None,
    },
    "capacity": {"moe_expert_capacity_factor": 0.8},
    "capacity by position, adaptive": {
        "moe_expert_capacity_factor": 0.8,
        "moe_token_drop_policy": "position",
        "moe_adaptive_aux_loss": AdaptiveAuxLoss(beta=0.5),
    },
    "gated shared expert": {"moe_shared_expert_gate": True, **GATE},
}
FEATURE_LAYOUTS = [
    layout("DP2", 2),
    layout("TP2 SP EP2 ETP1", 2, tp=2, sp=True, ep=2, etp=1),
    layout("TP2 SP CP2 EP2 ETP1", 4, tp=2, sp=True, cp=2, ep=2, etp=1),
    layout("TP2 SP PP2 VPP2 EP2 ETP2", 8, tp=2, sp=True, pp=2, vpp=2, ep=2, etp=2),
]


# Features of different parts of a router, which a fault in one of them shows in as it does alone.
TOGETHER = [
    ("Gumbel noise", "sequence balance loss, z-loss", "gated shared expert"),
    ("learned noise", "adaptive coefficient", "capacity"),
    ("input jitter", "a list of balance losses"),
    ("sigmoid, groups, expert bias",),
    ("capacity by position, adaptive", "gated shared expert"),
]


def test_every_feature_is_met() -> None:
    met = {name for names in TOGETHER for name in names}
    assert met == FEATURES.keys() - {"global balance loss"}, "which the list of losses has"


@pytest.mark.parametrize(
    "features",
    [*TOGETHER, *(pytest.param((name,), marks=pytest.mark.product) for name in FEATURES)],
    ids=" + ".join,
)
def test_every_router_feature_equals_one_process(features: tuple[str, ...], pool: GlooPool) -> None:
    """Also with recompute: noise must then be drawn again as it was, and nothing be counted twice."""
    settings = {key: value for name in features for key, value in FEATURES[name].items()}
    cell = Cell(tiny_model(moe=True, **settings), ParallelConfig(), steps=STEPS)
    is_global = "global" in str(settings)
    # Where there is a capacity, one process fills its experts up to it, and the layouts do not.
    filled = replace(cell.model, moe_pad_expert_input_to_capacity="moe_expert_capacity_factor" in settings)
    alone = replace(cell, model=filled)
    plain = {rows: run_layout(pool, replace(alone, micro_batch=rows), 1) for rows in ((1, 2) if is_global else (1,))}
    for entry in FEATURE_LAYOUTS:
        # The global balance loss sees the micro-batches of all data-parallel ranks at once; one process sees them at
        # once as one larger micro-batch.
        together = 2 if is_global and entry.data_parallel == 2 else 1
        for recompute in RECOMPUTE if entry.name == "DP2" else ("full recompute",):
            # Compiling takes seconds: one of them stands for all, with noise, recompute, a capacity and split tokens.
            compiled = (features, entry.name) == (TOGETHER[1], "TP2 SP EP2 ETP1")
            there = replace(cell, parallel=entry.parallel, recompute=RECOMPUTE[recompute], compile_router=compiled)
            difference = compare(run_layout(pool, there, entry.processes), plain[together])
            print(f"{', '.join(features)}; {entry.name}, {recompute}: {difference.loss:.1e}, {difference.norm:.1e}")
            assert difference.worst < TOLERANCE, entry.name


def test_recomputed_attention_sees_the_same_documents(
    pool: GlooPool, kinds: dict[str, Cell], references: References
) -> None:
    """And so does attention whose inputs are in the host's memory meanwhile, with micro-batches in flight."""
    recompute = RecomputeConfig(
        granularity="selective", modules=["core_attn", "layernorm"], offload_layers=2, offload_min_bytes=1
    )
    parallel = ParallelConfig(context_parallel_size=2, pipeline_model_parallel_size=2)
    cell = replace(kinds[WITH_DOCUMENTS], parallel=parallel, recompute=recompute)
    assert compare(run_layout(pool, cell, 4), references[WITH_DOCUMENTS]).worst < TOLERANCE


# Weights and activations are rounded to 4e-3, differently where matrices are split or keys come in other blocks; loss
# and norm average over many. The largest differences seen are 4e-5 and 1.3e-3.
BF16_TOLERANCE = Difference(loss=5e-4, norm=1e-2)


BF16_LAYOUTS = [
    layout("CP2", 2, cp=2),
    layout("TP2 SP CP2 EP2 ETP1", 4, tp=2, sp=True, cp=2, ep=2, etp=1),
    layout("CP2 PP2", 4, cp=2, pp=2),
]


@pytest.fixture(scope="module")
def bf16_references(pool: GlooPool) -> dict[bool, Trajectory]:
    """The MoE on one process in bf16, without and with documents."""
    alone = Cell(KINDS["MoE"].model, ParallelConfig(), Bf16Precision(kind="bf16"), steps=STEPS)
    return {documents: run_layout(pool, replace(alone, documents=documents), 1) for documents in (False, True)}


@pytest.mark.parametrize(
    ("entry", "documents", "recompute"),
    alternating(BF16_LAYOUTS, [False, True], list(RECOMPUTE)),
    ids=lambda value: getattr(value, "name", str(value)).replace(" ", "-"),
)
def test_context_parallelism_in_bf16(
    entry: GridCase, documents: bool, recompute: str, pool: GlooPool, bf16_references: dict[bool, Trajectory]
) -> None:
    precision = Bf16Precision(kind="bf16")
    cell = Cell(KINDS["MoE"].model, entry.parallel, precision, RECOMPUTE[recompute], steps=STEPS, documents=documents)
    difference = compare(run_layout(pool, cell, entry.processes), bf16_references[documents])
    print(f"{entry.name}, {recompute}: loss {difference.loss:.1e}, gradient norm {difference.norm:.1e}")
    assert difference.loss < BF16_TOLERANCE.loss
    assert difference.norm < BF16_TOLERANCE.norm


@pytest.mark.parametrize("kind", ["MoE", "MoE, SFT"])
def test_a_difference_would_be_seen(kind: str, pool: GlooPool, kinds: dict[str, Cell], references: References) -> None:
    """The grid can fail: without its balance loss, or its noise, the model trains measurably differently."""
    cell = kinds[kind]
    other = replace(cell, model=replace(cell.model, moe_aux_loss_coeff=0.0))
    if kind == "MoE, SFT":
        other = replace(cell, task=SftTask(kind="sft", weighting="row"))
    assert compare(run_layout(pool, other, 1), references[kind]).worst > 100 * TOLERANCE


def column_of(distributed_optimizer: bool, recompute: str) -> str:
    return f"{'distributed' if distributed_optimizer else 'plain'} optimizer, {recompute}"


def write_table(path: Path, rows: dict[tuple[str, str], dict[str, Difference]]) -> None:
    """Replace the table between the markers of `path`."""
    columns = [column_of(*option) for option in OPTIONS]
    lines = ["| model | layout | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for kind, name in sorted(rows, key=lambda row: list(KINDS).index(row[0])):
        cells = rows[kind, name]
        figures = [f"{cells[c].loss:.0e} / {cells[c].norm:.0e}" for c in columns]
        lines.append(f"| {kind} | {name} | " + " | ".join(figures) + " |")
    begin, end = "<!-- parity grid: written by tests/distributed/test_parity.py -->", "<!-- end of parity grid -->"
    before, _, rest = path.read_text().partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{begin}\n" + "\n".join(lines) + f"\n{end}{after}")


def test_random_batches_are_the_same_everywhere() -> None:
    one = random_batch(3, samples=4, micro_batch=1, dp_rank=1, dp_size=2)
    two = random_batch(3, samples=4, micro_batch=1, dp_rank=0, dp_size=1)
    assert torch.equal(one[0].tokens, two[1].tokens)
    assert torch.equal(one[0].seeds, two[1].seeds)
