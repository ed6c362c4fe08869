"""Faults put into real steps: every rank decides alike, nothing has moved, and the first place is named."""

import math
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext.config import ParallelConfig
from megatron_ext.mcore.gradients import GROUPS, gradient_statistics
from megatron_ext.mcore.model import gather_parameters
from megatron_ext.mcore.optimizer import optimizer_steps
from megatron_ext.monitoring.events import Event
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from megatron_ext.training.guard.guard import Guard
from megatron_ext.training.session import Session
from megatron_ext.training.verdict import Figures, Skip, Take, Verdict
from tests.distributed.runs import Part, open_part

MOE = tiny_model(
    moe=True,
    moe_gating_normalization=None,
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    hidden_dropout=0.1,
)
FAULT = "decoder.layers.{}.self_attention.linear_qkv.weight"


def everything(session: Session) -> dict[str, torch.Tensor]:
    """All tensors that a checkpoint of this rank would have, and its random state."""
    gather_parameters(session.wrapped)
    tensors = {f"{s.key} {s.offset}": s.data.clone() for s in session.checkpoints.tensors()}
    return {**tensors, "random": torch.get_rng_state(), "steps": torch.tensor(optimizer_steps(session.optimizer))}


def weight_of(session: Session, layer: int) -> torch.nn.Parameter | None:
    """A weight of the layer of this number, where this rank has it."""
    for chunk in session.chunks:
        for one in chunk.decoder.layers:
            if one.layer_number == layer + 1:
                return one.self_attention.linear_qkv.weight
    return None


class Poison:
    """Makes the gradient of a weight NaN, `times` times from when it is armed."""

    def __init__(self, weight: torch.nn.Parameter | None) -> None:
        self.times, self._weight = 0, weight
        if weight is not None:
            weight.register_hook(self._spoil)

    def _spoil(self, gradient: torch.Tensor | None) -> torch.Tensor | None:
        if not self.times:
            return gradient
        self.times -= 1
        if gradient is None:  # the product has added it to its sum already
            self._weight.main_grad.fill_(math.nan)
            return None
        return gradient * math.nan


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def meet_nan_gradients(part: Part, rank: int, layer: int) -> tuple[list[Event], list[Any], bool, dict[str, Any]]:
    """Steps 2 and 3 get a gradient of NaN on `rank`: one whenever it is computed, the other only once."""
    events: list[Event] = []
    with open_part(part, Guard(part.run_config().guard, events.append)) as session:
        poison = Poison(weight_of(session, layer) if dist.get_rank() == rank else None)
        verdicts, unmoved = [], []
        for times in (0, 10**6, 1, 0):
            before, poison.times = everything(session), times
            verdicts.append(session.step(session.stream.next()).verdict)
            unmoved.append(equal(before, everything(session)))
        poison.times = 0
        assert unmoved == [False, True, True, False]
        assert [type(verdict) for verdict in verdicts] == [Take, Skip, Skip, Take]
        return events, verdicts, session.state.iteration == 4, everything(session)


def pass_over_steps(part: Part) -> dict[str, Any]:
    with open_part(part) as session:
        while session.state.iteration < 4:
            if session.skips_next():
                session.pass_over()
            else:
                session.step(session.stream.next())
        return everything(session)


LAYOUTS = {
    "TP2": (ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True), 1, 2, "fp32"),
    "PP2, uneven": (
        ParallelConfig(pipeline_model_parallel_size=2, account_for_embedding_in_pipeline_split=True),
        1,
        1,
        "fp32",
    ),
    "EP2, overlapped": (
        ParallelConfig(expert_model_parallel_size=2, overlap_grad_reduce=True, overlap_param_gather=True),
        0,
        2,
        "bf16",
    ),
    "CP2": (ParallelConfig(context_parallel_size=2), 1, 3, {"kind": "fp8", "recipe": "delayed"}),
    "DP2, all-reduced": (ParallelConfig(use_distributed_optimizer=False), 1, 0, "fp32"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_that_is_not_finite_on_one_rank(layout: str, pool: GlooPool, tmp_path: Path) -> None:
    parallel, rank, layer, precision = LAYOUTS[layout]
    # Of three layers the first stage, which has the embedding, takes one.
    model = replace(MOE, num_layers=3) if parallel.account_for_embedding_in_pipeline_split else MOE
    part = Part(model, tmp_path / "met", parallel, precision)
    results = pool.run(2, meet_nan_gradients, part, rank, layer)
    for events, verdicts, went_on, _ in results:
        assert (str(events), verdicts, went_on) == (str(results[0][0]), results[0][1], True)  # NaN is not NaN
    always, once = results[0][0]
    print(always.text, once.text, sep="\n")
    assert [(one.kind, one.iteration) for one in (always, once)] == [("nonfinite", 2), ("nonfinite", 3)]
    named = {"where": FAULT.format(layer), "layer": layer, "group": "attention", "phase": "backward"}
    for event in (always, once):
        assert {key: event.details[key] for key in named} == named
    assert (always.details["rank"], always.details["reproducible"], once.details["reproducible"]) == (rank, True, False)
    assert "neither the data nor the weights" in once.text
    if layout == "DP2, all-reduced":
        assert once.details["ranks"] == [0, 1]  # reduced: nobody knows any more
    else:
        assert once.details["ranks"] == [rank]
    # As if both steps had been passed over unseen: weights, moments, biases, histories, random numbers.
    skipped = replace(part, directory=tmp_path / "passed", sections=(("train", {"skip_steps": [[2, 3]]}),))
    for (*_, met), passed in zip(results, pool.run(2, pass_over_steps, skipped), strict=True):
        assert equal(met, passed)


def statistics_of_a_step(part: Part) -> dict[tuple[int | None, str], tuple[float, ...]]:
    found: list[Any] = []
    with open_part(part) as session:
        layers = session.run.model.num_layers

        def look(figures: Figures) -> Verdict:
            found.append(gradient_statistics(session.chunks, session.optimizer, layers, session.groups.world))
            return Take()

        session.judge = look
        session.step(session.stream.next())
        squares = sum(one.norm**2 for one in found[0].values())
        result = session.step(session.stream.next())
        assert result.grad_norm == pytest.approx(math.sqrt(sum(one.norm**2 for one in found[1].values())), rel=1e-5)
        assert squares > 0
    return {place: astuple(one) for place, one in found[1].items()}


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        ParallelConfig(pipeline_model_parallel_size=2, use_distributed_optimizer=False),
        ParallelConfig(expert_model_parallel_size=2),
    ],
    ids=["TP2", "PP2, no distributed optimizer", "EP2"],
)
def test_gradient_statistics_are_those_of_one_process(parallel: ParallelConfig, pool: GlooPool, tmp_path: Path) -> None:
    model = tiny_model(moe=True, untie_embeddings_and_output_weights=parallel.expert_model_parallel_size > 1)
    (alone,) = pool.run(1, statistics_of_a_step, Part(model, tmp_path))
    for found in pool.run(2, statistics_of_a_step, Part(model, tmp_path, parallel)):
        assert found.keys() == alone.keys()
        for place, values in found.items():
            assert values == pytest.approx(alone[place], rel=2e-4, abs=1e-9), place
    assert {group for _, group in alone} == set(GROUPS) - (
        set() if model.untie_embeddings_and_output_weights else {"output"}
    )


def meet_nan_activations(part: Part) -> tuple[list[dict[str, Any]], list[str]]:
    """Step 2 gets an output of NaN on rank 3, step 3 a weight of NaN on rank 2."""
    events: list[Event] = []
    with open_part(part, Guard(part.run_config().guard, events.append)) as session:
        layers = session.chunks[0].decoder.layers
        session.step(session.stream.next())
        spoil = layers[2].mlp.linear_fc1.register_forward_hook(
            lambda module, inputs, output: (output[0] * math.nan, None)
        )
        if dist.get_rank() != 3:
            spoil.remove()
        session.step(session.stream.next())
        spoil.remove()
        if dist.get_rank() == 2:
            layers[1].self_attention.linear_proj.weight.data[0, 0] = math.nan
        session.step(session.stream.next())
        told = [{key: event.details[key] for key in ("rank", "where", "phase", "micro_batch")} for event in events]
        return told, [event.text for event in events]


def test_what_was_not_finite_in_the_forward_pass(pool: GlooPool, tmp_path: Path) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2)
    for found, texts in pool.run(4, meet_nan_activations, Part(tiny_model(), tmp_path, parallel)):
        assert [tuple(one.values()) for one in found] == [
            (3, "decoder.layers.2.mlp.linear_fc1", "forward", 0),
            (2, "decoder.layers.1.self_attention.linear_proj.weight", "weights", None),
        ]
        assert "first on rank 3 (TP 1, CP 1, DP 0, PP 0), micro-batch 0" in texts[0]
